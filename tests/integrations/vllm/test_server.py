"""A real server over HTTP: guided, plain and refused requests, siblings, aborts, load, the end."""

import itertools
import json
import math
import random
import re
import runpy
import shlex
import signal
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from guided_decode import GuidanceConfig, load_scorer, tiny_tulu
from guided_decode.integrations.transformers import GuidedDecoding
from tests import PATIENCE, ROOT
from tests.integrations.vllm import vllm_server as servers

pytestmark = [
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
    # A server takes its time to load where other tests run beside.
    pytest.mark.timeout(900),
]

EXAMPLE = ROOT / "examples" / "openai_client.py"
VALUES_EXAMPLE = ROOT / "examples" / "openai_values.py"
MESSAGES = tiny_tulu.validation_prompts(12)
PRUNE_TOKEN = 5
GUIDE = {"guide": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Started as a user would, with limits."""
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    command = [*servers.SERVE, *servers.SMALL, "--max-beta", "20", "--max-top-k", "32",
               "--max-group-size", "8"]  # fmt: skip
    with servers.started(command, log) as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def greedy():
    """Texts of Hugging Face's generate, by message: (plain, guided)."""
    path = tiny_tulu.model_path("sft")
    policy, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path),
        AutoTokenizer.from_pretrained(path),
    )
    critic = load_scorer("tiny-tulu-value", policy_tokenizer=tokenizer)
    guided = GuidedDecoding(critic, GuidanceConfig(beta=10.0, top_k=4))

    def text(message, **how):
        inputs = tokenizer(tiny_tulu.render(message), add_special_tokens=False, return_tensors="pt")
        output = policy.generate(**inputs, do_sample=False, max_new_tokens=100, **how)
        return tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)

    return {m: (text(m), text(m, custom_generate=guided)) for m in MESSAGES}


def chat(message, **more):
    messages = [{"role": "user", "content": message}]
    return {"messages": messages, "temperature": 0, "max_tokens": 100} | more


def answer(server, message, **more):
    response = server.post("/v1/chat/completions", **chat(message, **more))
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def pieces(server, message, **more):
    """The texts of a streamed answer, as they come."""
    body = {"model": "tiny-tulu", "stream": True} | chat(message, **more)
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])["choices"][0]["delta"].get("content") or ""


def group(**more):
    return {"guide_group": uuid.uuid4().hex, "guide_group_size": 8, "guide_keep": 2,
            "guide_every": 8} | more  # fmt: skip


def test_guided_and_plain_answers_are_those_of_generate(server, greedy):
    with ThreadPoolExecutor(8) as pool:
        plain = list(pool.map(lambda m: answer(server, m), MESSAGES))
        guided = list(pool.map(lambda m: answer(server, m, vllm_xargs=GUIDE), MESSAGES))
    assert plain == [greedy[m][0] for m in MESSAGES]
    assert guided == [greedy[m][1] for m in MESSAGES]
    assert plain != guided


def test_streamed_answers_are_the_same(server, greedy):
    for message in MESSAGES[:2]:
        parts = list(pieces(server, message, vllm_xargs=GUIDE))
        # How many depends on who is faster, the engine or its reader.
        assert len(parts) > 1
        assert "".join(parts) == greedy[message][1]
        assert "".join(pieces(server, message)) == greedy[message][0]


def test_the_greeting_is_a_guided_request_that_works(server):
    servers.until(lambda: "curl" in server.log.read_text())
    line = re.search(r"^curl .*$", server.log.read_text(), re.MULTILINE).group()
    words = shlex.split(line)
    url, body = next(w for w in words if w.startswith("http")), words[words.index("-d") + 1]
    headers = {"Content-Type": "application/json"}
    reply = httpx.post(url, content=body, headers=headers, timeout=PATIENCE).json()
    text = reply["choices"][0]["message"]["content"]
    assert tiny_tulu.is_correct(json.loads(body)["messages"][0]["content"], text)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"guide": "yes"}, "guide='yes': input should be a valid integer"),
        ({"guide": 2}, "guide=2: input should be less than or equal to 1"),
        ({"guide_beta": "10"}, "guide_beta='10': input should be a valid number"),
        ({"guide_top_k": 4.5}, "guide_top_k=4.5: input should be a valid integer"),
        ({"guide_top_k": 0}, "guide_top_k=0: input should be greater than or equal to 1"),
        ({"guide_top_p": 1.5}, "guide_top_p=1.5: input should be less than or equal to 1"),
        ({"guide_rule": "raise"}, "guide_rule='raise': input should be 'reweight' or 'prune'"),
        ({"guide_tail": ["mask"]}, "guide_tail=['mask']: input should be 'mask' or 'keep'"),
        ({"guide_scorer": "/etc"}, "unknown key 'guide_scorer'; known are guide, guide_beta"),
        ({"guide": 0, "guide_beta": 1.0}, "guide=0 was given together with guide_beta"),
        ({"guide_rule": "prune"}, 'rule="prune" was given without a margin'),
        ({"guide_margin": 0.1}, 'margin=0.1 was given with rule="reweight"'),
        ({"guide_top_k": 33}, "guide_top_k=33 is above the server's limit 32"),
        ({"guide_beta": -21.0}, "guide_beta=-21 is above the server's limit 20"),
        (group(guide_group_size=9), "guide_group_size=9 is above the server's limit 8"),
        (group(guide_group="short"), "guide_group='short': string should have at least 8"),
        (group(guide_keep=8), "guide_keep=8 with guide_group_size=8 prunes nobody"),
        ({"guide_group": "x" * 20}, "guide_group came without guide_group_size, guide_keep"),
        ({"guide_keep": 2}, "guide_keep came without guide_group"),
        (group(guide_prune_token=7), "guide_prune_token=7 is not among stop_token_ids=[5]"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_with_its_reason(server, keys, reason):
    body = chat(MESSAGES[0], vllm_xargs=keys, stop_token_ids=[PRUNE_TOKEN])
    response = server.post("/v1/chat/completions", **body)
    assert response.status_code == 400, response.text
    assert reason in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("keys", [GUIDE, {"guide_beta": 1e9}])
def test_beams_that_ask_for_guidance_are_refused(server, path, keys):
    body = chat(MESSAGES[0]) if "chat" in path else {"prompt": MESSAGES[0], "max_tokens": 8}
    beams = body | {"use_beam_search": True, "n": 2}
    response = server.post(path, **beams, vllm_xargs=keys)
    assert response.status_code == 400, response.text
    assert "vLLM's beam search drops vllm_xargs" in response.json()["error"]["message"]
    assert server.post(path, **beams).status_code == 200


def test_a_refusal_does_not_repeat_megabytes(server):
    keys = {f"guide_{'x' * 300}{i}": 1.0 for i in range(20_000)}
    response = server.post("/v1/chat/completions", **chat(MESSAGES[0], vllm_xargs=keys))
    assert response.status_code == 400
    assert len(response.content) < 1500


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({}, "expected the one id that ends a pruned sibling"),
        ({"stop_token_ids": [5], "min_tokens": 3}, "given together with min_tokens"),
        ({"stop_token_ids": [5], "structured_outputs": {"regex": "[0-9]+"}},
         "given together with structured_outputs"),
    ],
)  # fmt: skip
def test_groups_are_refused_with_what_may_forbid_their_prune_token(server, more, reason):
    body = chat(MESSAGES[0], vllm_xargs=group(), **more)
    response = server.post("/v1/chat/completions", **body)
    assert response.status_code == 400, response.text
    assert reason in response.json()["error"]["message"]


def test_prompt_embeddings_are_refused(server):
    response = server.post("/v1/completions", prompt_embeds="AAAA", vllm_xargs=GUIDE)
    assert response.status_code == 400
    assert "prompt_embeds" in response.json()["error"]["message"]


def test_an_abort_in_mid_stream_leaves_no_row_and_no_sibling(server, greedy):
    for keys in (GUIDE, group()):
        stream = pieces(server, MESSAGES[0], vllm_xargs=keys, stop_token_ids=[PRUNE_TOKEN])
        next(stream)
        next(stream)
        stream.close()
    # The worker looks at what has left when the next step comes.
    assert answer(server, MESSAGES[1], vllm_xargs=GUIDE) == greedy[MESSAGES[1]][1]
    servers.until(lambda: not server.metrics()["live_rows"])
    assert server.metrics()["live_rows"] == server.metrics()["groups"] == 0


def test_counters_are_on_metrics_and_move(server):
    fresh = tiny_tulu.validation_prompts(len(MESSAGES) + 1)[-1]
    before = server.metrics()
    text = answer(server, fresh, vllm_xargs=GUIDE)
    after = server.metrics()
    steps = after["guided_rows"] - before["guided_rows"]
    # A token a character, and EOS.
    assert len(text) / 2 < steps <= len(text) + 1
    assert after["rows_scored"] - before["rows_scored"] == steps
    for name in ("seconds", "scorer_seconds", "cache_hits", "forwards", "candidate_tokens"):
        assert after[name] > before[name], name
    assert all(after[name] == 0 for name in ("passthroughs", "unguided_rows", "clamps"))
    answer(server, fresh)
    assert server.metrics()["guided_rows"] == after["guided_rows"]


def test_six_of_eight_siblings_are_pruned(server):
    before = server.metrics()["pruned_siblings"]
    body = chat(MESSAGES[0], n=8, temperature=1.0, seed=3, stop_token_ids=[PRUNE_TOKEN],
                vllm_xargs=group(guide=1), return_token_ids=True)  # fmt: skip
    choices = server.post("/v1/chat/completions", **body).json()["choices"]
    pruned = [c for c in choices if c["stop_reason"] == PRUNE_TOKEN]
    assert len(choices) == 8
    assert len(pruned) == 6
    # Those that rank too low at a boundary end there: eight tokens more, and the prune token.
    assert all(len(c["token_ids"]) % 8 == 1 for c in pruned)
    assert server.metrics()["pruned_siblings"] == before + 6
    survivors = [c for c in choices if c["stop_reason"] is None]
    assert all(tiny_tulu.is_correct(MESSAGES[0], c["message"]["content"]) for c in survivors)


@pytest.fixture(scope="module")
def official(server):
    """The official client, as it comes."""
    from openai import OpenAI

    return OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", timeout=PATIENCE)


VALUED = {"vllm_xargs": {"guide": 1, "guide_values": 1}}


def of_generate(message):
    """prefix_values and advantages of Hugging Face's guided generate."""
    path = tiny_tulu.model_path("sft")
    tokenizer = AutoTokenizer.from_pretrained(path)
    critic = load_scorer("tiny-tulu-value", policy_tokenizer=tokenizer)
    inputs = tokenizer(tiny_tulu.render(message), add_special_tokens=False, return_tensors="pt")
    out = AutoModelForCausalLM.from_pretrained(path).generate(
        **inputs, do_sample=False, max_new_tokens=100, return_dict_in_generate=True,
        custom_generate=GuidedDecoding(critic, GuidanceConfig(beta=10.0, top_k=4), values=True),
    )  # fmt: skip
    return out.prefix_values[0].tolist(), out.advantages[0].tolist()


def near(found, expected):
    numbers = [math.nan if each is None else each for each in found]
    return numbers == pytest.approx(expected, abs=1e-4, nan_ok=True)


def test_the_official_client_reads_the_values_of_generate(official):
    message = MESSAGES[3]
    values, advantages = of_generate(message)
    assert len(values) > 20
    asked = {"model": "tiny-tulu", **chat(message), "extra_body": VALUED}
    whole = official.chat.completions.create(**asked)
    shown = whole.choices[0].model_extra["guided_decode"]
    assert near(shown["prefix_values"], values)
    assert near(shown["advantages"], advantages)
    assert whole.usage.completion_tokens == len(values)
    assert whole.choices[0].model_extra["token_ids"] is None

    pieces = []
    for chunk in official.chat.completions.create(**asked, stream=True):
        pieces += [c.model_extra["guided_decode"] for c in chunk.choices
                   if "guided_decode" in c.model_extra]  # fmt: skip
    assert len(pieces) > 1
    assert near([v for piece in pieces for v in piece["prefix_values"]], values)
    assert near([a for piece in pieces for a in piece["advantages"]], advantages)

    # A stop string cuts the text off, and no token.
    cut = official.chat.completions.create(**asked, stop=["Answer"])
    shown = cut.choices[0].model_extra["guided_decode"]
    tokens = cut.usage.completion_tokens
    assert "Answer" not in cut.choices[0].message.content
    assert tokens < len(values)
    assert near(shown["prefix_values"], values[:tokens])
    assert near(shown["advantages"], advantages[:tokens])


def test_each_sample_of_each_prompt_has_its_own_values(server, official):
    prompts = [tiny_tulu.render(message) for message in MESSAGES[:2]]
    asked = {"model": "tiny-tulu", "prompt": prompts, "n": 3, "temperature": 1.0, "seed": 5,
             "max_tokens": 30, "extra_body": VALUED}  # fmt: skip
    whole = official.completions.create(**asked)
    shown = [choice.model_extra["guided_decode"] for choice in whole.choices]
    assert len(shown) == 6
    assert sum(len(each["prefix_values"]) for each in shown) == whole.usage.completion_tokens
    assert all(len(each["prefix_values"]) == len(each["advantages"]) for each in shown)
    assert None not in [value for each in shown for value in each["prefix_values"]]
    # Samples of a prompt begin at its value; the other prompt has another one.
    first = [each["prefix_values"][0] for each in shown]
    assert len(set(first[:3])) == len(set(first[3:])) == 1
    assert first[0] != first[3]
    # What is added is what the next value has more.
    values, advantages = shown[0]["prefix_values"], shown[0]["advantages"]
    steps = [after - before for before, after in itertools.pairwise(values)]
    assert near(advantages[: len(steps)], steps)

    joined = {i: {"prefix_values": [], "advantages": []} for i in range(6)}
    for chunk in official.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            for name, numbers in choice.model_extra["guided_decode"].items():
                joined[choice.index][name] += numbers
    for i in range(6):
        assert near(joined[i]["prefix_values"], shown[i]["prefix_values"])
        assert near(joined[i]["advantages"], shown[i]["advantages"])


def test_a_request_that_is_not_guided_has_values_and_no_advantage(official, server, greedy):
    asked = {"model": "tiny-tulu", **chat(MESSAGES[0])}
    whole = official.chat.completions.create(
        **asked, extra_body={"vllm_xargs": {"guide_values": 1}}
    )
    assert whole.choices[0].message.content == greedy[MESSAGES[0]][0]
    shown = whole.choices[0].model_extra["guided_decode"]
    assert set(shown["advantages"]) == {None}
    assert None not in shown["prefix_values"]
    assert "guided_decode" not in official.chat.completions.create(**asked).choices[0].model_extra


def test_a_name_of_the_clients_own_is_refused(server):
    own = {"vllm_xargs": {"guide_values": 1, "guide_values_id": "0123456789abcdef"}}
    for path, body in (
        ("/v1/chat/completions", chat(MESSAGES[0])),
        ("/v1/completions", {"prompt": MESSAGES[0]}),
        ("/v1/responses", {"input": MESSAGES[0]}),
    ):
        response = server.post(path, **body, **own)
        assert response.status_code == 400, response.text
        assert "guide_values_id is for engines in process" in response.text


def test_the_example_client(server, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.port}/v1")
    runpy.run_path(str(EXAMPLE))
    output = capsys.readouterr().out
    assert re.search(r"^plain\n(.+\n)+", output).group().endswith("Answer: 9111\n")
    assert output.count("Answer: 10211") >= 2
    assert len(re.findall(r"^pruned  ", output, re.MULTILINE)) == 6
    assert len(re.findall(r"^finished  ", output, re.MULTILINE)) == 2


def test_the_example_that_shows_values(server, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.port}/v1")
    runpy.run_path(str(VALUES_EXAMPLE))
    output = capsys.readouterr().out
    assert re.search(r"^'1' +[+-]\d\.\d{3} +[+-]\d\.\d{3}$", output, re.MULTILINE), output
    assert re.search(r"Answer: 10211\n\d+ tokens: V from -?\d\.\d+ to -?\d\.\d+\n$", output), output


def _load(server, greedy, requests, rng):
    """Right answers among requests of 32 clients, some of which leave or ask for nonsense."""
    wrong, lock = [], threading.Lock()

    def one(plan):
        message, kind, cut = plan
        if kind == "bad":
            keys = {"guide_top_k": cut - 100}
            code = server.post("/v1/chat/completions", **chat(message, vllm_xargs=keys)).status_code
            ok = code == 400
        elif kind == "abort":
            stream = pieces(server, message, vllm_xargs=GUIDE)
            for _ in zip(range(cut), stream, strict=False):
                pass
            stream.close()
            ok = True
        elif kind == "values":
            body = chat(message, **VALUED)
            (choice,) = server.post("/v1/chat/completions", **body).json()["choices"]
            numbers = choice["guided_decode"]["prefix_values"]
            text = choice["message"]["content"]
            ok = text == greedy[message][1] and len(numbers) > len(text) / 2 and None not in numbers
        elif kind == "group":
            body = chat(message, n=4, temperature=1.0, stop_token_ids=[PRUNE_TOKEN],
                        vllm_xargs=group(guide_group_size=4))  # fmt: skip
            ok = len(server.post("/v1/chat/completions", **body).json()["choices"]) == 4
        else:
            guided = kind == "guided"
            keys = {"vllm_xargs": GUIDE} if guided else {}
            ok = answer(server, message, **keys) == greedy[message][guided]
        if not ok:
            with lock:
                wrong.append(plan)

    kinds = ["guided", "guided", "plain", "abort", "bad", "group", "values"]
    plans = [(rng.choice(MESSAGES), rng.choice(kinds), rng.randint(1, 20)) for _ in range(requests)]
    with ThreadPoolExecutor(32) as clients:
        list(clients.map(one, plans))
    return wrong


def _memory(server):
    return sum(process.memory_info().rss for process in server.processes())


def test_200_requests_of_32_clients_leave_nothing_behind(server, greedy):
    rng = random.Random(0)
    assert not _load(server, greedy, 100, rng)
    warm = _memory(server)
    assert not _load(server, greedy, 200, rng)
    assert server.client.get("/health").status_code == 200
    assert answer(server, MESSAGES[0], vllm_xargs=GUIDE) == greedy[MESSAGES[0]][1]
    servers.until(lambda: not server.metrics()["live_rows"])
    after = server.metrics()
    assert after["live_rows"] == after["groups"] == after["passthroughs"] == 0
    assert _memory(server) == pytest.approx(warm, rel=0.05)


def test_an_interrupt_ends_every_process(server):
    family = server.processes()
    folders = {process.environ().get("PROMETHEUS_MULTIPROC_DIR") for process in family} - {None}
    assert len(family) > 3
    assert server.end(signal.SIGINT) == 0
    assert not server.left()
    assert len(folders) == 1
    assert not any(Path(folder).exists() for folder in folders)


@pytest.mark.slow
def test_without_the_limits_in_the_environment_the_worker_clamps(tmp_path, greedy):
    config = {"scorer": "tiny-tulu-value", "beta": 10.0, "top_k": 4, "max_beta": 10.0,
              "max_top_k": 4, "max_group_size": 0}  # fmt: skip
    command = [*servers.PLAIN, *servers.SMALL, "--additional-config",
               json.dumps({"guided_decode": config})]  # fmt: skip
    metrics = tmp_path / "metrics"
    metrics.mkdir()
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(metrics)}
    with servers.started(command, tmp_path / "log.txt", environment) as server:
        server.wait_ready()
        plain, guided = greedy[MESSAGES[0]]
        assert answer(server, MESSAGES[0]) == plain
        assert answer(server, MESSAGES[0], vllm_xargs=GUIDE) == guided
        assert server.metrics()["clamps"] == 0
        above = {"guide_beta": 1e6, "guide_top_k": 200}
        assert answer(server, MESSAGES[0], vllm_xargs=above) == guided
        assert server.metrics()["clamps"] == 2
        # That the server's rule has no margin is known to the worker only.
        assert answer(server, MESSAGES[0], vllm_xargs={"guide_margin": 0.1}) == plain
        assert server.metrics()["clamps"] == 3
        body = chat(MESSAGES[0], n=8, temperature=1.0, stop_token_ids=[PRUNE_TOKEN],
                    vllm_xargs=group())  # fmt: skip
        choices = server.post("/v1/chat/completions", **body).json()["choices"]
        assert [c["stop_reason"] for c in choices] == [None] * 8
        assert server.metrics()["clamps"] == 11
        assert server.metrics()["pruned_siblings"] == 0
        response = server.post("/v1/chat/completions", **chat("", vllm_xargs={"guide_beta": "x"}))
        assert response.status_code == 400


@pytest.mark.slow
def test_nothing_is_left_of_a_server_that_is_stopped_while_it_loads(tmp_path):
    with servers.started([*servers.SERVE, *servers.SMALL], tmp_path / "log.txt") as server:
        # Ours, the API server, its resource tracker and its engine.
        servers.until(lambda: len(server.processes()) > 3)
        assert len(server.left()) > 3
        assert server.end(signal.SIGTERM) != 0
        servers.until(lambda: not server.left())
        assert not server.left()


@pytest.mark.slow
def test_the_exit_code_is_vllms(tmp_path):
    with servers.started([*servers.SERVE, "--no-such-option"], tmp_path / "log.txt") as server:
        assert server.process.wait(PATIENCE) == 2
        assert "unrecognized arguments: --no-such-option" in server.log.read_text()


@pytest.mark.slow
def test_nothing_is_left_of_a_server_whose_starter_was_killed(tmp_path):
    metrics = tmp_path / "metrics"
    metrics.mkdir()
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(metrics)}
    command = [*servers.SERVE, *servers.SMALL]
    with servers.started(command, tmp_path / "log.txt", environment) as server:
        server.wait_ready()
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        servers.until(lambda: not server.left())
        assert not server.left()
