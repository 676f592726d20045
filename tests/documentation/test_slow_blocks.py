"""What takes minutes: requests to a server that runs, and the demo's figures."""

import json
import re
import shutil
import subprocess
from importlib.util import find_spec

import pytest
from typer.testing import CliRunner

from guided_decode import tiny_tulu
from guided_decode.cli.app import app
from tests import PATIENCE
from tests.documentation.markdown_blocks import markdown_files, read_blocks
from tests.documentation.outputs import demo_figures
from tests.integrations.vllm import vllm_server as servers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
needs_server = pytest.mark.skipif(
    find_spec("vllm") is None or shutil.which("curl") is None,
    reason="vLLM or curl is not installed",
)
BLOCKS = [block for file in markdown_files() for block in read_blocks(file)]
REQUESTS = [block for block in BLOCKS if "server" in block.clause("needs")]


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """Of a server, started as the documentation says."""
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    with servers.started([*servers.SERVE, *servers.SMALL], log) as server:
        server.wait_ready()
        yield server.port


def replies(block, port):
    """The JSON that each request of a block gets."""
    assert "127.0.0.1:8000/" in block.code
    code = block.code.replace("127.0.0.1:8000/", f"127.0.0.1:{port}/")
    ended = subprocess.run(
        [block.language, "-e", "-c", code], capture_output=True, text=True, timeout=PATIENCE
    )
    assert ended.returncode == 0, ended.stderr
    text, found = ended.stdout.strip(), []
    while text:
        reply, end = json.JSONDecoder().raw_decode(text)
        found.append(reply)
        text = text[end:].strip()
    return found


@needs_server
@pytest.mark.parametrize("block", REQUESTS, ids=str)
def test_a_server_answers_as_the_block_says(block, port):
    """Answers that comments name; a group prunes all but those that it keeps; one that abstains is
    ended by the token that it names; else a right one."""
    answered = replies(block, port)
    named = re.findall(r"# .*Answer: (\d+)$", block.code, re.MULTILINE)
    if named:
        texts = [reply["choices"][0]["message"]["content"] for reply in answered]
        assert [text.rpartition("Answer: ")[2] for text in texts] == named
        return
    (reply,) = answered
    size, keep = (re.search(rf'"{key}": (\d+)', block.code) for key in ("n", "guide_keep"))
    if size and keep:
        reasons = [choice["stop_reason"] for choice in reply["choices"]]
        assert len(reasons) == int(size[1])
        assert reasons.count(None) == int(keep[1])
        return
    stop = re.search(r'"stop_token_ids": \[(\d+)\]', block.code)
    if stop and "guide_abstain" in block.code:
        (choice,) = reply["choices"]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", int(stop[1]))
        assert reply["usage"]["completion_tokens"] > 10
        return
    (prompt,) = re.findall(r'"content": "(.+?)"', block.code)
    assert tiny_tulu.is_correct(prompt, reply["choices"][0]["message"]["content"])


def test_the_demo_prints_the_readmes_figures(monkeypatch):
    """Sampled answers and sums differ a little from machine to machine; seconds are not held."""
    monkeypatch.setenv("COLUMNS", "100")
    result = CliRunner().invoke(app, ["demo", "--no-plot"])
    assert result.exit_code == 0, result.output
    printed = result.stdout.partition("\n\n")[2].partition("\n\nguided: ")[0]
    (shown,) = [block.code for block in BLOCKS if block.clause("prints") == ("the demo's table",)]
    _, own = demo_figures(printed)
    _, readmes = demo_figures(shown)
    assert own.keys() == readmes.keys()
    for policy, rows in readmes.items():
        assert own[policy].keys() == rows.keys()
        for method, (accuracy, _, kl, policy_tokens, scorer_tokens, _) in rows.items():
            measured = own[policy][method]
            assert _number(measured[0]) == pytest.approx(_number(accuracy), abs=5)
            assert _number(measured[2]) == pytest.approx(_number(kl), abs=0.003)
            assert _number(measured[3]) == pytest.approx(_number(policy_tokens), rel=0.03)
            assert _number(measured[4]) == pytest.approx(_number(scorer_tokens), rel=0.1)


def _number(text):
    return float(text.strip("%≤"))
