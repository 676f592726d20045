"""A judge on vLLM's own pooling servers: the local judge's values, and what else they say."""

import json
import sys
from importlib.util import find_spec

import pytest

from guided_decode import load_scorer, tiny_tulu
from guided_decode.search import (
    Judged,
    ScorerJudge,
    best_of_n,
    connect_judge,
    load_generator,
    run_all,
)
from guided_decode.search.http_failures import EndpointError
from tests import models
from tests.checkpoints.tokenizer_files import word_tokenizer
from tests.integrations.vllm import vllm_server as servers
from tests.search.recordings import Recorded, Recording

pytestmark = [
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.slow,
    pytest.mark.timeout(900),
]
EOS = 2


def command(model, task, *more):
    return [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host",
        "127.0.0.1", "--dtype", "float32", "--enforce-eager", *servers.SMALL, "--runner", "pooling",
        "--pooler-config", json.dumps({"task": task}), *more,
    ]  # fmt: skip


def url(server):
    return f"http://127.0.0.1:{server.port}"


@pytest.fixture(scope="module")
def policy():
    return load_generator("tiny-tulu-sft")


@pytest.fixture(scope="module")
def critic():
    return load_scorer("tiny-tulu-value", policy_tokenizer=tiny_tulu.model_path("sft"))


def searches(policy):
    prompts = tiny_tulu.held_out_prompts(4)
    encoded = [policy.encode(tiny_tulu.render(prompt)) for prompt in prompts]
    return [best_of_n(ids, n=4, max_tokens=64, seed=i) for i, ids in enumerate(encoded)]


@pytest.mark.parametrize("task", ["token_classify", "classify"])
def test_a_critic_served_by_vllm_says_what_it_says_here(task, policy, critic, tmp_path):
    local = ScorerJudge(critic, terminals=policy.eos_token_ids)
    recording = Recording(policy)
    expected = run_all(searches(policy), recording, local)
    path = str(tiny_tulu.model_path("value"))
    with servers.started(command(path, task), tmp_path / "log.txt") as server:
        server.wait_ready()
        with connect_judge(
            url(server), kind="ppo-critic", terminals=policy.eos_token_ids,
            policy_tokenizer=tiny_tulu.model_path("sft"), api_key="unused",
        ) as judge:  # fmt: skip
            assert (judge.task, judge.served.root, judge.served.max_tokens) == (task, path, 256)
            found = run_all(searches(policy), Recorded(recording), judge)
            # Longer by one token each, so that there is something in the prefix cache.
            ids = tuple(policy.encode(tiny_tulu.render(tiny_tulu.held_out_prompts(1)[0])))
            pieces = [Judged(ids[:i], ids[i : i + 40], False) for i in range(1, len(ids), 5)]
            assert judge.judge(pieces) == pytest.approx(local.judge(pieces), abs=1e-4)
            with pytest.raises(
                ValueError, match="a text has 257 tokens, and the servers of .* 256"
            ):
                judge.judge([Judged((5,) * 257, (), False)])
    for one, other in zip(found, expected, strict=True):
        assert one.chosen == other.chosen
        scores = [each.score for each in other.candidates]
        assert [each.score for each in one.candidates] == pytest.approx(scores, abs=1e-4)


def test_a_reward_model_served_by_vllm_is_read_at_its_eos(tmp_path):
    path = str(tmp_path / "model")
    # Its attention on a CPU wants heads of a multiple of 32.
    models.tiny("llama", "sequence", hidden_size=128).save_pretrained(path)
    # vLLM serves none without a tokenizer.
    word_tokenizer().save_pretrained(path)
    local = ScorerJudge(load_scorer(path, "reward-model"))
    prompts = [tuple(ids) for ids in models.prompts([7, 20, 1], seed=3)]
    endings = [(), (5, 9, 11), (5, 9, EOS), (EOS,)]
    texts = [Judged(prompt, end, end[-1:] == (EOS,)) for prompt in prompts for end in endings]
    served = command(path, "classify", "--api-key", "s3cret")
    with servers.started(served, tmp_path / "log.txt") as server:
        server.client.headers["authorization"] = "Bearer s3cret"
        server.wait_ready()
        with connect_judge(url(server), api_key="s3cret") as judge:
            assert judge.described.family.kind == "reward-model"
            assert judge.judge(texts) == pytest.approx(local.judge(texts), abs=1e-4)
        with pytest.raises(
            EndpointError, match="answered 401 .*API key by an environment variable"
        ):
            connect_judge(url(server))
