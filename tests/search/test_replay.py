"""Every method, replayed on recorded answers, makes the same choices through a server."""

import pytest

from guided_decode import load_scorer, tiny_tulu
from guided_decode.search import METHODS, ScorerJudge, load_generator, run
from guided_decode.search.answers import final_answer
from guided_decode.search.servers import connect_generator
from tests.cli.search_runs import SMALL
from tests.search.recordings import Live, Recording
from tests.search.servers.completion_server import CompletionServer

MOST = 40


@pytest.fixture(scope="module")
def local():
    return load_generator(tiny_tulu.model_path("sft"))


@pytest.fixture(scope="module")
def judge(local):
    critic = load_scorer("tiny-tulu-value", policy_tokenizer=tiny_tulu.model_path("sft"))
    return ScorerJudge(critic, terminals=local.eos_token_ids)


@pytest.fixture(scope="module")
def server(local):
    model, tokenizer = Live(local), local._tokenizer
    with CompletionServer(model, tokenizer, max_logprobs=-1).running() as server:
        yield server


@pytest.fixture(scope="module")
def remote(server, local):
    with connect_generator(server.url, tokenizer=local._tokenizer) as remote:
        yield remote


def begun(name, local):
    method = METHODS[name]
    prompt = local.encode(tiny_tulu.render(tiny_tulu.held_out_prompts(3)[2]))

    def answer(tokens):
        return final_answer(local.decode(tokens))

    return method.begin(prompt, seed=11, max_tokens=MOST, answer=answer if method.votes else None,
                        **SMALL[name])  # fmt: skip


def assert_same(found, expected):
    """The same responses, scores and choice; figures to the rounding of logits."""
    assert [each.tokens for each in found.candidates] == [
        each.tokens for each in expected.candidates
    ]
    assert (found.chosen, found.stopped) == (expected.chosen, expected.stopped)
    for one, other in zip(found.candidates, expected.candidates, strict=True):
        assert one.finished == other.finished
        assert one.score == (None if other.score is None else pytest.approx(other.score, abs=1e-5))
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4)
    assert found.details.keys() == expected.details.keys()
    for name in ("visits", "lengths", "attempts", "resampled", "rounds", "votes"):
        assert found.details.get(name) == expected.details.get(name)
    spent = [(s.policy_tokens, s.scorer_tokens, s.generated, s.calls)
             for s in (found.spent, expected.spent)]  # fmt: skip
    assert spent[0] == spent[1]


@pytest.mark.parametrize("name", METHODS)
def test_a_server_with_the_same_answers_leads_to_the_same_choices(
    name, local, judge, server, remote
):
    recording = Recording(local)
    expected = run(begun(name, local), recording, judge)
    server.model = recording
    assert_same(run(begun(name, local), remote, judge), expected)
