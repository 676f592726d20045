"""Searches under way: side by side, replayed, and within their budgets."""

import math

import pytest

from guided_decode.search import (
    MCTS,
    Blocks,
    Budget,
    CallableJudge,
    Sampling,
    Segments,
    best_of_n,
    block_search,
    ppo_mcts,
    prune_and_refill,
    run,
    run_all,
    segment_rejection,
    sequential_monte_carlo,
    vote,
)
from tests.search.toy import DEPTH, PROMPT, ToyJudge, ToyPolicy

COMMON = {"max_tokens": DEPTH, "seed": 4}
PIECEWISE = {
    "best of n": lambda: best_of_n(PROMPT, n=5, **COMMON),
    "vote": lambda: vote(PROMPT, answer=len, n=5, weighted=True, **COMMON),
    "blocks": lambda: block_search(PROMPT, Blocks(2, 3, block=2), **COMMON),
    "trees": lambda: block_search(PROMPT, Blocks.vgs(4, 2, block=2, trees=2), **COMMON),
    "refill": lambda: prune_and_refill(PROMPT, n=5, block=2, margin=0.3, **COMMON),
    "smc": lambda: sequential_monte_carlo(PROMPT, particles=8, block=2, threshold=0.9, **COMMON),
}
METHODS = PIECEWISE | {
    "mcts": lambda: ppo_mcts(PROMPT, MCTS(), **COMMON),
    "mcts in batches": lambda: ppo_mcts(PROMPT, MCTS(c_puct=1.0, leaves=3, kl_coef=0.1), **COMMON),
    "segments": lambda: segment_rejection(PROMPT, SEGMENTS, **COMMON),
}
SEGMENTS = Segments(target=0.5, entropy=1.0, shortest=1, longest=3)
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def found(result):
    return result.candidates, result.chosen, result.details


def test_searches_side_by_side_share_calls_and_find_what_each_finds_alone():
    policy, judge = ToyPolicy(), ToyJudge()
    alone = [run(method(), policy, judge) for method in PIECEWISE.values()]
    calls = len(policy.calls) + len(judge.calls)
    together_policy, together_judge = ToyPolicy(), ToyJudge()
    together = run_all([method() for method in PIECEWISE.values()], together_policy, together_judge)
    assert [found(each) for each in together] == [found(each) for each in alone]
    assert [each.spent.policy_tokens for each in together] == [
        each.spent.policy_tokens for each in alone
    ]
    # As many calls as the longest search alone asks for, or few more.
    assert len(together_policy.calls) <= max(each.spent.calls for each in alone)
    assert len(together_policy.calls) + len(together_judge.calls) < calls / 2


@every_method
def test_a_recorded_search_makes_the_same_choices(method):
    policy, judge = ToyPolicy(), ToyJudge()
    extends, nexts, values = [], [], []

    class Recording:
        def extend(self, *asked, **how):
            extends.append(policy.extend(*asked, **how))
            return extends[-1]

        def next_tokens(self, *asked, **how):
            nexts.append(policy.next_tokens(*asked, **how))
            return nexts[-1]

        def judge(self, texts):
            values.append(judge.judge(texts))
            return values[-1]

    recorder = Recording()
    first = run(method(), recorder, recorder)

    class Replaying:
        def extend(self, *asked, **how):
            return extends.pop(0)

        def next_tokens(self, *asked, **how):
            return nexts.pop(0)

        def judge(self, texts):
            return values.pop(0)

    replayed = Replaying()
    assert found(run(method(), replayed, replayed)) == found(first)
    assert not extends
    assert not nexts
    assert not values


@every_method
def test_what_was_spent_is_the_search_trees_nodes(method):
    written, referred, judged, drawn = set(), set(), set(), 0
    policy, judge = ToyPolicy(), ToyJudge()

    class Counting:
        def extend(self, prefixes, n, **how):
            nonlocal drawn
            answers = policy.extend(prefixes, n, **how)
            for prefix, own in zip(prefixes, answers, strict=True):
                for each in own:
                    drawn += len(each.tokens)
                    whole = prefix + each.tokens
                    written.update(whole[: i + 1] for i in range(len(whole)))
            return answers

        def next_tokens(self, prefixes, k, *, references, **how):
            nonlocal drawn
            drawn += len(prefixes)
            for prefix, reference in zip(prefixes, references, strict=True):
                for read in (written, referred) if reference else (written,):
                    read.update(prefix[: i + 1] for i in range(len(prefix)))
            return policy.next_tokens(prefixes, k, references=references, **how)

        def judge(self, texts):
            for text in texts:
                whole = text.prompt + text.response
                judged.update(whole[: i + 1] for i in range(len(whole)))
            return judge.judge(texts)

    counting = Counting()
    spent = run(method(), counting, counting).spent
    assert (spent.policy_tokens, spent.scorer_tokens) == (
        len(written) + len(referred), len(judged),
    )  # fmt: skip
    assert spent.generated == drawn
    assert spent.seconds > 0


@every_method
@pytest.mark.parametrize("limit", ["policy_tokens", "scorer_tokens"])
def test_no_budget_is_exceeded_and_what_was_found_is_kept(method, limit):
    whole = run(method(), ToyPolicy(), ToyJudge())
    needed = getattr(whole.spent, limit)
    for most in range(1, needed + 1):
        result = run(method(), ToyPolicy(), ToyJudge(), Budget(**{limit: most}))
        assert getattr(result.spent, limit) <= most
        if result.stopped is not None:
            assert result.stopped == limit
        if result.candidates:
            assert result.best in result.candidates
        else:
            with pytest.raises(ValueError, match=rf"no response.*{limit} ended it"):
                _ = result.best
    assert run(method(), ToyPolicy(), ToyJudge(), Budget(**{limit: needed * 9})).stopped is None


def test_a_budget_that_cuts_responses_is_named():
    whole = run(METHODS["best of n"](), ToyPolicy(), ToyJudge())
    assert whole.stopped is None
    cut = 0
    for most in range(1, whole.spent.policy_tokens):
        result = run(METHODS["best of n"](), ToyPolicy(), ToyJudge(), Budget(policy_tokens=most))
        short = any(not each.finished and len(each.tokens) < DEPTH for each in result.candidates)
        assert (result.stopped == "policy_tokens") == (short or not result.candidates)
        cut += short
    assert cut


def test_a_search_stops_at_its_time():
    result = run(METHODS["blocks"](), ToyPolicy(), ToyJudge(), Budget(seconds=1e-9))
    assert (result.stopped, result.candidates) == ("seconds", ())


def test_a_search_that_ends_does_not_end_the_others():
    searches = [best_of_n(PROMPT, n=200, **COMMON), best_of_n(PROMPT, n=2, **COMMON)]
    large, small = run_all(searches, ToyPolicy(), ToyJudge(), Budget(policy_tokens=30))
    assert large.stopped == "policy_tokens"
    assert small.stopped is None
    assert len(small.candidates) == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda texts: [math.nan] * len(texts), "the judge answered nan for 5 texts"),
        (lambda texts: [1.0], "the judge answered 1 values for 5 texts"),
    ],
)
def test_a_judge_that_answers_no_number_is_refused(answer, message):
    with pytest.raises(ValueError, match=message):
        run(METHODS["best of n"](), ToyPolicy(), CallableJudge(answer))


def test_budgets_are_numbers_above_zero():
    for wrong in ({"policy_tokens": 0}, {"scorer_tokens": -3}, {"seconds": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Budget(**wrong)


def test_temperature_zero_is_greedy():
    search = best_of_n(PROMPT, n=3, max_tokens=DEPTH, sampling=Sampling(temperature=0.0))
    result = run(search, ToyPolicy(), ToyJudge())
    assert len({each.tokens for each in result.candidates}) == 1


def test_each_search_is_told_of_when_it_ends_and_not_when_all_have():
    policy, judge, told = ToyPolicy(), ToyJudge(), []

    def note(i, result):
        told.append((i, len(policy.calls), result))

    searches = [METHODS["smc"](), METHODS["best of n"](), METHODS["blocks"]()]
    results = run_all(searches, policy, judge, ended=note)
    assert sorted(i for i, _, _ in told) == [0, 1, 2]
    for i, _, result in told:
        assert found(result) == found(results[i])
    assert told[0][0] == 1
    assert told[0][1] < told[-1][1]
