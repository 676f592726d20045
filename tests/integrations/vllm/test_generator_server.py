"""A real vLLM server as a search's policy: the local generator's tokens, and its end."""

from __future__ import annotations

import signal
import sys
from importlib.util import find_spec

import pytest

from guided_decode import load_scorer, tiny_tulu
from guided_decode.search import (
    MCTS,
    Blocks,
    EndpointError,
    RequestRefused,
    Retry,
    Sampling,
    ScorerJudge,
    block_search,
    connect_generator,
    load_generator,
    ppo_mcts,
    run,
    run_all,
)
from tests.integrations.vllm import vllm_server as servers
from tests.integrations.vllm.test_generator import extend

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.timeout(900),
]

COMMAND = (
    sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model",
    str(tiny_tulu.model_path("sft")), "--served-model-name", "tiny-tulu", "--host", "127.0.0.1",
    "--dtype", "float32", "--enforce-eager", "--max-logprobs", "-1", "--max-num-batched-tokens",
    "20000", *servers.SMALL,
)  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with servers.started(COMMAND, tmp_path_factory.mktemp("serve") / "log.txt") as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def local():
    return load_generator(tiny_tulu.model_path("sft"))


@pytest.fixture(scope="module")
def judge(local):
    critic = load_scorer("tiny-tulu-value", policy_tokenizer=tiny_tulu.model_path("sft"))
    return ScorerJudge(critic, terminals=local.eos_token_ids)


@pytest.fixture(scope="module")
def prompts(local):
    texts = tiny_tulu.held_out_prompts(6)
    return [tuple(local.encode(tiny_tulu.render(text))) for text in texts]


@pytest.fixture(scope="module")
def remote(server, local):
    address = f"http://127.0.0.1:{server.port}"
    with connect_generator(address, tokenizer=local._tokenizer) as remote:
        served = remote.served
        assert (served.model, served.dialect, served.max_model_len) == ("tiny-tulu", "vllm", 256)
        yield remote


def test_greedy_continuations_are_the_local_generators(remote, local, prompts):
    for how in (Sampling(0.0), Sampling(0.0, stop=("c1\n", "c0\n"))):
        found, expected = extend(remote, prompts, how=how), extend(local, prompts, how=how)
        for (own,), (other,) in zip(found, expected, strict=True):
            assert (own.tokens, own.reason) == (other.tokens, other.reason)
            assert own.log_probs == pytest.approx(other.log_probs, abs=1e-3)
    with pytest.raises(ValueError, match=r"leaves no room for another"):
        extend(remote, [[5] * 256])
    with pytest.raises(RequestRefused, match=r"refused the request \(400\).*out of vocabulary"):
        extend(remote, [[5, 999]])


def test_draws_depend_on_seed_and_number_alone(remote, prompts):
    how = Sampling(1.4, 0.98)
    together = extend(remote, prompts[:3], n=3, how=how, seeds=[5, 6, 7])
    (alone,) = extend(remote, prompts[1:2], n=2, how=how, seeds=[6])
    assert [each.tokens for each in alone] == [each.tokens for each in together[1][:2]]
    assert len({each.tokens for own in together for each in own}) > 3


def test_searches_without_chance_find_what_they_find_locally(remote, local, judge, prompts):
    greedy = Sampling(temperature=0.0)
    searches = {
        "blocks": lambda prompt: block_search(
            prompt, Blocks(2, 1, block=8), max_tokens=60, sampling=greedy
        ),
        "mcts": lambda prompt: ppo_mcts(prompt, MCTS(6, k=4, c_puct=0.5), max_tokens=8),
        "mcts, tempered": lambda prompt: ppo_mcts(
            prompt, MCTS(6, k=4, c_puct=0.5, prior_temperature=2.0), max_tokens=6
        ),
    }
    for search in searches.values():
        found = run_all([search(prompt) for prompt in prompts[:3]], remote, judge)
        for own, prompt in zip(found, prompts, strict=False):
            assert own.best.tokens == run(search(prompt), local, judge).best.tokens


def test_a_server_that_dies_ends_a_search_with_its_address(server, local, prompts):
    address = f"http://127.0.0.1:{server.port}"
    retry = Retry(attempts=2, first=0.1)
    with connect_generator(address, tokenizer=local._tokenizer, retry=retry) as remote:
        server.end(signal.SIGKILL)
        with pytest.raises(
            EndpointError, match=rf"{address}/v1/completions .*the last of 2 attempts"
        ):
            extend(remote, prompts)
