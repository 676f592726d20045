"""Segment rejection against a plain reading of its definition, on a tree that is enumerated."""

import math
from collections import Counter
from dataclasses import replace

import pytest
from scipy.stats import chisquare

from guided_decode.search import Judged, Segments, run, segment_rejection
from guided_decode.search.methods.segment_rejection import acceptable, rising
from guided_decode.search.seeds import uniform
from tests.search.toy import DEPTH, END, PROMPT, VOCAB, ToyJudge, ToyPolicy, tempered

# Entropies of the toy are between 0.8 and 1.1 nats, its values between -1 and 1.
SHORT = Segments(target=0.6, entropy=1.0, shortest=1, longest=3, retries=4)


def entropy(policy, s):
    return -sum(p * math.log(p) for p in policy.probabilities(PROMPT + s))


def token(policy, s, segments, point):
    """The draw at one point of the distribution function, likeliest tokens first."""
    p = policy.probabilities(PROMPT + s)
    kept = sorted(range(VOCAB), key=lambda a: -p[a])[: segments.top_k]
    hot = tempered(p, segments.temperature)
    total = sum(hot[a] for a in kept)
    below = 0.0
    for a in kept:
        below += hot[a] / total
        if point < below:
            return a
    return kept[-1]


def plainly(policy, judge, segments, seed, depth=DEPTH):
    """The definition: every draw and every look anew. Also the attempts for each segment."""

    def value(s, ended):
        return judge.value(Judged(PROMPT, s, ended))

    def ended(s):
        return s[-1:] == (END,) or len(s) == depth

    r0 = (1 - segments.alpha) * value((), False) + segments.alpha * segments.target
    response, attempts, forced = (), [], 0
    while not ended(response):
        seen, rejected = [], 0
        while True:
            s = response
            while not ended(s) and len(s) - len(response) < segments.longest:
                written = len(s) - len(response)
                if written >= segments.shortest and entropy(policy, s) >= segments.entropy:
                    break
                point = uniform(seed, len(response), rejected, len(s))
                s += (token(policy, s, segments, point),)
            r = value(s, ended(s))
            seen.append((r, s))
            if rejected == segments.retries:
                forced += 1
                s = max(seen, key=lambda each: each[0])[1]
                break
            threshold = min(segments.target, r0 + len(s) * (segments.target - r0) / depth)
            chance = float(r >= threshold)
            if segments.accept == "soft":
                chance = min(1.0, math.exp((r - threshold) / segments.beta))
            if uniform(seed, len(response), rejected, -1) < chance:
                break
            rejected += 1
        response = s
        attempts.append(len(seen))
    return response, attempts, forced


SETTINGS = {
    "short": SHORT,
    "hard": replace(SHORT, accept="hard"),
    "no retries": replace(SHORT, retries=0),
    "many retries": replace(SHORT, target=0.95, beta=0.05, retries=20),
    "unsure at once": replace(SHORT, entropy=0.0, shortest=2),
    "by length": replace(SHORT, entropy=9.0, longest=2),
    "two tokens": replace(SHORT, top_k=2, temperature=1.3),
    "from the prompt": replace(SHORT, alpha=0.0, beta=0.2),
    "at the goal": replace(SHORT, alpha=1.0, target=-0.8),
    "the paper's": Segments(target=0.5),
}


@pytest.mark.parametrize("segments", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("seed", range(25))
def test_segments_are_accepted_as_the_definition_says(seed, segments):
    policy, judge = ToyPolicy(seed), ToyJudge(seed)
    result = run(segment_rejection(PROMPT, segments, max_tokens=DEPTH, seed=seed), policy, judge)
    response, attempts, forced = plainly(policy, judge, segments, seed)
    assert result.best.tokens == response
    assert result.details["attempts"] == attempts
    assert result.details["forced"] == forced
    assert sum(result.details["lengths"]) == len(response)
    assert result.best.score == judge.value(Judged(PROMPT, response, True))
    assert result.best.finished
    assert result.best.log_prob == pytest.approx(
        sum(math.log(policy.probabilities(PROMPT + response[:i])[a])
            for i, a in enumerate(response))
    )  # fmt: skip


def test_the_papers_defaults():
    own = Segments(target=8.5)
    assert (own.entropy, own.shortest, own.longest, own.alpha, own.beta) == (3.0, 4, 64, 0.5, 0.7)
    assert (own.accept, own.temperature, own.top_k, own.retries) == ("soft", 0.7, 40, 20)


def test_whole_responses_have_the_distribution_of_rejection_sampling():
    """One segment, and retries without end: π(x)·min(1, exp((r(x) − r*)/β)), normalised."""
    policy, judge, most = ToyPolicy(2), ToyJudge(2), 2
    segments = Segments(0.7, entropy=9.0, alpha=1.0, beta=0.5, temperature=1.0, retries=10_000)
    drawn = Counter(
        run(segment_rejection(PROMPT, segments, max_tokens=most, seed=seed), policy, judge)
        .best.tokens
        for seed in range(1500)
    )  # fmt: skip
    responses = [(END,), *((a, b) for a in range(END) for b in range(VOCAB))]
    weights = []
    for x in responses:
        p = math.prod(policy.probabilities(PROMPT + x[:i])[a] for i, a in enumerate(x))
        r = judge.value(Judged(PROMPT, x, True))
        weights.append(p * min(1.0, math.exp((r - 0.7) / 0.5)))
    expected = [1500 * each / sum(weights) for each in weights]
    assert chisquare([drawn[x] for x in responses], expected).pvalue > 1e-3


def test_a_distribution_is_asked_for_once_however_often_it_is_drawn_from():
    policy, asked = ToyPolicy(3), []

    class Watching:
        def next_tokens(self, prefixes, k, **how):
            asked.extend(prefixes)
            return policy.next_tokens(prefixes, k, **how)

    segments = replace(SHORT, target=1.5, beta=0.05, alpha=1.0, retries=20)
    result = run(segment_rejection(PROMPT, segments, max_tokens=DEPTH), Watching(), ToyJudge(3))
    assert result.details["attempts"][0] == 21
    assert len(set(asked)) == len(asked)
    assert result.spent.generated == len(asked)


def test_the_threshold_rises_to_the_goal_and_no_further():
    assert [rising(0.0, 2.0, share) for share in (0.0, 0.5, 1.0)] == [0.0, 1.0, 2.0]
    assert rising(5.0, 2.0, 0.1) == 2.0
    assert acceptable(1.0, 1.0, 0.999, SHORT)
    # No overflow, however far above.
    assert acceptable(1e9, 0.0, 0.999, SHORT)
    assert not acceptable(-1e9, 0.0, 0.0, SHORT)


def test_settings_without_meaning_are_refused():
    for wrong in (
        {"target": math.inf}, {"entropy": -1.0}, {"shortest": 0}, {"longest": 0}, {"alpha": 1.5},
        {"beta": 0.0}, {"accept": "maybe"}, {"temperature": 0.0}, {"top_k": 0}, {"retries": -1},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Segments(**{"target": 1.0} | wrong)
