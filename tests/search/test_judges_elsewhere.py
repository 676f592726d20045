"""Each method, replayed on recorded continuations: the same choices with the judge elsewhere."""

import pytest
from transformers import AutoModelForTokenClassification

from guided_decode import load_scorer, tiny_tulu
from guided_decode.search import (
    METHODS,
    ScorerJudge,
    connect_judge,
    find_method,
    load_generator,
    run_all,
)
from guided_decode.search.answers import final_answer
from guided_decode.search.http_failures import Retry
from tests.cli.search_runs import SMALL
from tests.search.pooling_server import PoolingServer
from tests.search.recordings import Recorded, Recording
from tests.search.scripted_server import DROPPED, Reply, scripted

MESSAGES = tiny_tulu.held_out_prompts(2)


@pytest.fixture(scope="module")
def policy():
    return load_generator("tiny-tulu-sft")


@pytest.fixture(scope="module")
def local(policy):
    critic = load_scorer("tiny-tulu-value", policy_tokenizer=tiny_tulu.model_path("sft"))
    return ScorerJudge(critic, terminals=policy.eos_token_ids)


def moody(server):
    """Answers as it does, but each fifth time."""

    def answer(path, body, number):
        found = server(path, body, number)
        mood = {0: DROPPED, 5: Reply({"error": "x"}, status=503), 10: Reply(b"<html>")}
        return mood.get(number % 15, found) if number > 12 else found

    return answer


@pytest.fixture(scope="module")
def remote(policy):
    """The critic on two servers, one of which fails now and then."""
    path = tiny_tulu.model_path("value")
    critic = AutoModelForTokenClassification.from_pretrained(path).eval()
    steady = PoolingServer(critic, "classify", root=str(path))
    with (
        scripted(moody(steady), steady) as servers,
        connect_judge(
            [server.url for server in servers], "tiny-tulu-value",
            terminals=policy.eos_token_ids, policy_tokenizer=tiny_tulu.model_path("sft"),
            retry=Retry(first=0.01, most=0.05),
        ) as judge,
    ):  # fmt: skip
        yield judge


def begun(name, policy):
    method = find_method(name)

    def answer(tokens):
        return final_answer(policy.decode(tokens))

    return [
        method.begin(
            policy.encode(tiny_tulu.render(message)), seed=5 + i, max_tokens=48,
            answer=answer if method.votes else None, **SMALL[name],
        )
        for i, message in enumerate(MESSAGES)
    ]  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_method_makes_the_same_choices(name, policy, local, remote):
    recording = Recording(policy)
    expected = run_all(begun(name, policy), recording, local)
    found = run_all(begun(name, policy), Recorded(recording), remote)
    for one, other in zip(found, expected, strict=True):
        assert one.chosen == other.chosen
        assert [each.tokens for each in one.candidates] == [e.tokens for e in other.candidates]
        scores = [each.score for each in other.candidates]
        assert [each.score for each in one.candidates] == pytest.approx(scores, abs=1e-4)
        spent, own = other.spent, one.spent
        assert (own.scorer_tokens, own.calls) == (spent.scorer_tokens, spent.calls)
