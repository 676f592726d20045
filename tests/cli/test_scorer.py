"""`guided-decode scorer`: a real process, its clients in other commands, and its end."""

import json
import re
import signal
import stat
import threading
import time
import urllib.request

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from guided_decode import PrefixHandle, load_scorer, tiny_tulu
from guided_decode.cli.app import app
from guided_decode.cli.checkpoints import open_scorer
from guided_decode.forward.weights import WeightWatch
from guided_decode.scoring.remote import RemoteScorer, ScorerServerError
from tests import models
from tests.serving import process
from tests.serving.process import free_port
from tests.serving.served import CLOSE

PROMPT = "What is 4785 + 5426?"
ASKED = ([[5, 6, 7]], torch.tensor([[3, 4]]))


def run(*args):
    return CliRunner().invoke(app, list(map(str, args)))


def refused(result, message):
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert re.search(message, result.stderr), result.stderr


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_tulu.model_path("value"))


@pytest.fixture(scope="module")
def server():
    """The embedded value model, as it is served without arguments."""
    with process.started("--metrics-port", free_port()) as server:
        yield server


def test_a_search_asks_it_what_it_asks_a_scorer_of_its_own(server):
    words = ["search", "--method", "cd", "--branches", 2, "--block", 16, "--max-new-tokens", 40,
             "--prompt", PROMPT]  # fmt: skip
    local, remote = (
        run(*words, "--policy", "tiny-tulu-sft", "--scorer", scorer)
        for scorer in ("tiny-tulu-value", server.address)
    )
    assert remote.exit_code == 0, remote.output
    own, other = (json.loads(result.stdout) for result in (local, remote))
    assert other["response"] == own["response"]
    assert other["score"] == pytest.approx(own["score"], abs=1e-5)
    assert other["cost"]["scorer_tokens"] == own["cost"]["scorer_tokens"]
    assert other["run"] != own["run"]


def test_it_says_where_it_is_and_answers_there(server, tokenizer):
    at = server.address
    assert server.said == (
        f"tiny-tulu-value is served at {at}: load_scorer('{at}'), or --scorer {at}\n"
    )
    remote = load_scorer(at, "ppo-critic", policy_tokenizer=tokenizer, bos="drop")
    local = load_scorer("tiny-tulu-value", policy_tokenizer=tokenizer)
    handle = PrefixHandle(tokenizer.encode(PROMPT))
    for token in (5, 6, 7):
        wanted, got = (s.score([handle], torch.tensor([[3, 4]])) for s in (local, remote))
        torch.testing.assert_close(got.values, wanted.values, **CLOSE)
        handle.append(token)


def test_generate_through_it_prints_what_the_local_scorer_does(server):
    words = ("generate", "--policy", "tiny-tulu-sft", "--prompt", PROMPT, "--beta", 10, "--top-k",
             4, "--compare", "--json")  # fmt: skip
    local = json.loads(run(*words, "--scorer", "tiny-tulu-value").stdout)
    result = run(*words, "--scorer", server.address)
    assert result.exit_code == 0, result.output
    remote = json.loads(result.stdout)
    for way in ("plain", "guided"):
        assert remote[way]["text"] == local[way]["text"]
        values = [[v for v in side[way]["values"] if v is not None] for side in (remote, local)]
        assert values[0] == pytest.approx(values[1], abs=1e-4)
    assert remote["guided"]["text"] != remote["plain"]["text"]
    assert tiny_tulu.is_correct(PROMPT, remote["guided"]["text"])


def test_score_through_it_writes_what_the_local_scorer_does(server, tmp_path):
    prompts = tiny_tulu.held_out_prompts(4)
    lines = [
        {"prompt": p, "response": tiny_tulu.worked_answer(*tiny_tulu.operands(p))} for p in prompts
    ]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines))
    written = {}
    for name, words in (
        ("local", ("--scorer", "tiny-tulu-value")),
        ("remote", ("--scorer", server.address, "--tokenizer", "tiny-tulu-value")),
    ):
        output = tmp_path / f"{name}.jsonl"
        for _ in range(2):
            result = run("score", chats, output, *words, "--per-token")
            assert result.exit_code == 0, result.output
        written[name] = [json.loads(line) for line in output.read_text().splitlines()]
    for one, other in zip(written["local"], written["remote"], strict=True):
        assert other["score"] == pytest.approx(one["score"], abs=1e-4)
        assert other["tokens"] == one["tokens"]
    # What another scorer wrote is not gone on with.
    refused(run("score", chats, tmp_path / "local.jsonl", "--scorer", server.address,
                "--tokenizer", "tiny-tulu-value"), "other settings|another")  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("generate", "--prompt", "x"), "--scorer tcp:.* is a server, which does not say"),
        (("generate", "--prompt", "x", "--policy", "tiny-tulu-sft", "--scorer-device", "cpu"),
         "--scorer-device cpu came with tcp://.*, whose server has placed its scorer"),
        (("generate", "--prompt", "x", "--policy", "tiny-tulu-sft", "--kind", "reward-model"),
         "--kind reward-model was given, but the scorer at tcp://.* has 'ppo-critic': start"),
        (("generate", "--prompt", "x", "--policy", "tiny-tulu-sft", "--cache-tokens", "9"),
         "--cache-tokens came with tcp://.*, whose server loaded its scorer itself: give it to"),
        (("generate", "--prompt", "x", "--policy", "tiny-tulu-sft", "--quantization", "int8"),
         "--quantization came with tcp://.*, whose server loaded its scorer itself: give it to"),
        (("score", "-", "-", "--tokenizer", "tiny-tulu-value", "--device-map", '{"": "cpu"}',
          "--gguf-file", "a.gguf"), "--gguf-file, --device-map came with tcp://.*: give them to"),
        (("generate", "--prompt", "x", "--policy", "tiny-tulu-sft", "--timeout", "0"),
         "--timeout 0.*: expected seconds above 0"),
        (("score", "-", "-"), "--scorer tcp://.* reads token ids, which are written here: pass "
                              "--tokenizer, the folder, registered name or Hub id of its model"),
        (("score", "-", "-", "--tokenizer", "tiny-tulu-value", "--device", "cpu"),
         "--device cpu came with tcp://"),
    ],
)  # fmt: skip
def test_what_its_clients_may_not_ask_for(server, words, message):
    stdin = '{"prompt": "a", "response": "b"}\n'
    result = CliRunner().invoke(app, [*words, "--scorer", server.address], input=stdin)
    refused(result, message)


def test_metrics_are_prometheus_own(server):
    port = server.process.args[server.process.args.index("--metrics-port") + 1]
    load_scorer(server.address).score(*ASKED)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    counted = dict(re.findall(r"^guided_decode_scorer_server_(\w+) (\S+)$", text, re.MULTILINE))
    assert float(counted["rows_total"]) >= 1
    assert float(counted["scorer_candidate_tokens_total"]) >= 2
    assert float(counted["waiting_tokens"]) == 0


def test_one_that_was_killed_comes_back_and_ends_in_order_when_it_is_asked_to():
    listen = f"tcp://127.0.0.1:{free_port()}"
    words = (models.saved("llama", "token"), "--kind", "verl-critic")
    with process.started(*words, listen=listen) as server:
        remote = RemoteScorer(listen)
        wanted = remote.score(*ASKED).values
        server.end(signal.SIGKILL)
        with pytest.raises(ScorerServerError, match="went away"):
            remote.score(*ASKED)
    with process.started(*words, listen=listen) as server:
        torch.testing.assert_close(answered(lambda: remote.score(*ASKED)).values, wanted, **CLOSE)
        handle, answers = PrefixHandle(models.prompts([400])[0]), []
        thread = threading.Thread(target=until_it_ends, args=(remote, handle, answers))
        thread.start()
        while not answers:
            time.sleep(0.01)
        assert server.end(signal.SIGTERM) == 0
        thread.join()
        assert server.process.stderr.read() == ""
    assert all(bool(answer.values.isfinite().all()) for answer in answers)


def answered(work, seconds=30):
    """What `work` returns once a server answers."""
    end = time.monotonic() + seconds
    while True:
        try:
            return work()
        except ScorerServerError:
            assert time.monotonic() < end
            time.sleep(0.1)


def until_it_ends(remote, handle, answers):
    while True:
        try:
            answers.append(remote.score([handle], torch.arange(90)[None]))
        except ScorerServerError:
            return


def test_keys_are_made_and_used(tmp_path):
    key = tmp_path / "scorer.key"
    result = run("scorer", "--new-key", key)
    assert result.exit_code == 0, result.output
    assert result.stdout == (
        f"{key} is for guided-decode scorer --key-file, {key}.client for its clients (key_file=): "
        "keep both secret\n"
    )
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    refused(run("scorer", "--new-key", key), "scorer.key: File exists")
    words = (models.saved("llama", "token"), "--kind", "verl-critic", "--key-file", key)
    with process.started(*words, listen="tcp://0.0.0.0:0") as server:
        port = server.address.rpartition(":")[2]
        assert f"load_scorer('tcp://HOST:{port}', key_file=FILE.client)" in server.said
        at = f"tcp://127.0.0.1:{port}"
        assert load_scorer(at, key_file=f"{key}.client").score(*ASKED)
        with pytest.raises(ScorerServerError, match="it wants a key"):
            RemoteScorer(at, connect_seconds=0.5)
        assert server.end(signal.SIGINT) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("no-such-model",), "no-such-model: unknown model"),
        (("tcp://127.0.0.1:7070",), "is where a scorer server listens: expected the model that"),
        (("--listen", "somewhere"), "'somewhere' is no address of a scorer server: expected tcp"),
        (("--listen", "tcp://0.0.0.0:7070"),
         "--listen tcp://0.0.0.0:7070 can be reached from other machines, and no keys were given: "
         "expected --key-file, as --new-key FILE makes it, a loopback or ipc:// address, or "
         "--insecure"),
        (("--max-sessions", "0"), "--max-sessions 0: expected at least 1"),
        (("--session-seconds", "-1"), "--session-seconds -1.*: expected seconds above 0"),
        (("--key-file", "/no/such/file"), "/no/such/file: No such file"),
    ],
)  # fmt: skip
def test_what_is_refused(words, message):
    refused(run("scorer", *words), message)


def test_an_address_that_is_taken_is_refused_before_anything_is_loaded(server):
    # This one could not be loaded without its kind.
    result = run("scorer", models.saved("llama", "token"), "--listen", server.address)
    refused(result, f"--listen {server.address} cannot be listened on .Address already in use.: ")


def test_the_server_looks_at_no_weights_again(monkeypatch):
    from guided_decode.cli import scorer as command

    held = []

    def keep(*given, **options):
        held.append(open_scorer(*given, **options))
        return held[0]

    monkeypatch.setattr(command, "open_scorer", keep)
    monkeypatch.setattr(command, "_serve", lambda server: None)
    result = CliRunner().invoke(app, ["scorer", "--listen", "tcp://127.0.0.1:0"])
    assert result.exit_code == 0, result.output
    monkeypatch.setattr(WeightWatch, "changed", lambda watch: pytest.fail("it looked"))
    assert not held[0].model.changed()
