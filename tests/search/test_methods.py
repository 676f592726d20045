"""Each method against a plain implementation of its definition, on a tree that is enumerated."""

import math
from collections import Counter
from functools import partial

import pytest
from scipy.stats import chisquare

from guided_decode.search import (
    Blocks,
    Continuation,
    Judged,
    Sampling,
    best_of_n,
    block_search,
    prune_and_refill,
    run,
    sequential_monte_carlo,
    vote,
)
from guided_decode.search.methods.smc import effective_sample_size, systematic
from guided_decode.search.seeds import derive
from tests.search.toy import DEPTH, END, PROMPT, ToyJudge, ToyPolicy, probability, responses

SEEDS = range(25)
SAMPLING = Sampling()


def drawn(policy, prefix, seed, n, most=DEPTH):
    return [policy.continuation(prefix, derive(seed, i), most, SAMPLING).tokens for i in range(n)]


def ended(response):
    return response[-1:] == (END,) or len(response) >= DEPTH


def value(judge, response, finished):
    return judge.value(Judged(PROMPT, response, finished))


@pytest.mark.parametrize("seed", SEEDS)
def test_best_of_n_is_the_sample_with_the_highest_value(seed):
    policy, judge = ToyPolicy(seed), ToyJudge(seed)
    result = run(best_of_n(PROMPT, n=7, max_tokens=DEPTH, seed=seed), policy, judge)
    samples = drawn(policy, PROMPT, derive(seed, 0), 7)
    assert [each.tokens for each in result.candidates] == samples
    whole = [i for i, each in enumerate(samples) if END in each] or range(7)
    assert result.chosen == max(
        whole, key=lambda i: (value(judge, samples[i], END in samples[i]), -i)
    )
    for each in result.candidates:
        assert each.log_prob == pytest.approx(math.log(probability(policy, each.tokens)))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_votes_are_counted_by_answer(seed, weighted):
    policy, judge = ToyPolicy(seed), ToyJudge(seed)

    def answer(tokens):
        return tokens[0] if len(tokens) > 1 else None

    search = vote(PROMPT, answer=answer, n=9, weighted=weighted, max_tokens=DEPTH, seed=seed)
    result = run(search, policy, judge)
    samples = drawn(policy, PROMPT, derive(seed, 0), 9)
    votes = Counter()
    for each in samples:
        if len(each) > 1:
            votes[each[0]] += value(judge, each, END in each) if weighted else 1
    assert result.details["votes"] == pytest.approx(dict(votes))
    if votes:
        assert votes[answer(result.best.tokens)] == max(votes.values())
    assert bool(judge.calls) == weighted


def plain_block_search(policy, judge, blocks, seed):
    """The definition, tree by tree and beam by beam."""
    found = []
    for tree in range(blocks.trees):
        beams, room, number = [((), None)] * (blocks.width if blocks.spread else 1), blocks.width, 0
        while any(not ended(response) for response, _ in beams):
            children = [beam for beam in beams if ended(beam[0])]
            open_ = [response for response, _ in beams if not ended(response)]
            for i, parent in enumerate(open_):
                most = min(blocks.block, DEPTH - len(parent))
                place = derive(seed, tree, number, i)
                for piece in drawn(policy, PROMPT + parent, place, blocks.branches, most):
                    child = parent + piece
                    children.append((child, value(judge, child, ended(child))))
            children.sort(key=lambda child: child[1], reverse=True)
            beams = children[:room]
            if blocks.margin is not None:
                beams = [beam for beam in beams if children[0][1] - beam[1] <= blocks.margin]
            done = [beam for beam in beams if ended(beam[0])]
            if blocks.leave:
                found, room = found + done, room - len(done)
                beams = [beam for beam in beams if not ended(beam[0])]
            elif ended(beams[0][0]) and not blocks.patient:
                found, beams = found + done, []
            number += 1
        found += beams
    return found


SHAPES = [
    Blocks.cd(branches=3, block=2),
    Blocks.value_beam(width=3, branches=3),
    Blocks.value_beam(width=4, branches=2, margin=0.4),
    Blocks.vgs(blocks=6, width=2, block=2),
    Blocks.vgs(blocks=4, width=2, block=1, trees=3),
    Blocks.chunk_beam(width=2, branches=2, chunk=3),
    Blocks(width=3, branches=2, block=4, margin=0.2, trees=2, leave=True),
    Blocks(width=3, branches=2, block=2),
    Blocks(width=3, branches=2, block=2, margin=0.3, patient=True),
]


@pytest.mark.parametrize("blocks", SHAPES, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_block_search_keeps_what_its_definition_keeps(seed, blocks):
    policy, judge = ToyPolicy(seed), ToyJudge(seed)
    result = run(block_search(PROMPT, blocks, max_tokens=DEPTH, seed=seed), policy, judge)
    expected = plain_block_search(policy, judge, blocks, seed)
    assert sorted((each.tokens, each.score) for each in result.candidates) == sorted(expected)
    assert result.best.score == max(score for _, score in expected)
    assert all(each.finished for each in result.candidates)


@pytest.mark.parametrize(
    ("blocks", "first", "all_finished"),
    [
        (Blocks.vgs(blocks=6, width=2, block=2), 6, True),
        (Blocks.chunk_beam(width=2, branches=3, chunk=3), 6, True),
        (Blocks.dvts(trees=2, branches=3, block=2), 6, False),
        (Blocks.cd(branches=4, block=2), 4, False),
    ],
)
def test_published_searches_begin_and_end_as_their_code_does(blocks, first, all_finished):
    """VGS's generate_beam and chunk beam search's _search keep all beams from the first round on,
    each at the prompt, and until each is finished; where one is kept, it makes no difference."""
    for seed in SEEDS:
        search = block_search(PROMPT, blocks, max_tokens=DEPTH, seed=seed)
        request = next(search)
        assert len(request.prefixes) * request.n == first
        assert set(request.prefixes) == {PROMPT}
        assert len(set(request.seeds)) == len(request.seeds)
        found = run(block_search(PROMPT, blocks, max_tokens=DEPTH, seed=seed), ToyPolicy(seed),
                    ToyJudge(seed))  # fmt: skip
        assert not all_finished or len(found.candidates) == blocks.width
        search.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_blockwise_search_may_end_with_a_vote(seed):
    policy, judge = ToyPolicy(seed), ToyJudge(seed)
    blocks = Blocks.vgs(blocks=8, width=2, block=2, trees=2)
    search = block_search(
        PROMPT, blocks, max_tokens=DEPTH, seed=seed, answer=lambda tokens: tokens[0]
    )
    result = run(search, policy, judge)
    votes = Counter()
    for each in result.candidates:
        votes[each.tokens[0]] += each.score
    assert votes[result.best.tokens[0]] == pytest.approx(max(votes.values()))


class Stopping(ToyPolicy):
    """Token 1 completes the stop string."""

    def continuation(self, prefix, seed, most, how):
        found = super().continuation(prefix, seed, most, how)
        if not how.stop or 1 not in found.tokens:
            return found
        end = found.tokens.index(1) + 1
        return Continuation(found.tokens[:end], found.log_probs[:end], "stop")


@pytest.mark.parametrize(
    "method",
    [
        partial(block_search, blocks=Blocks(3, 2, 3)),
        partial(block_search, blocks=Blocks.vgs(4, 2, 3)),
        partial(prune_and_refill, n=4, block=3, margin=5.0),
        partial(sequential_monte_carlo, particles=4, block=3, threshold=0.0),
    ],
)
def test_a_stop_string_ends_a_response_where_that_is_asked_for(method):
    def found(seed, stop_ends):
        judge, stops = ToyJudge(seed), Sampling(stop=("x",))
        search = method(PROMPT, max_tokens=DEPTH, sampling=stops, seed=seed, stop_ends=stop_ends)
        candidates = run(search, Stopping(seed), judge).candidates
        for each in candidates:
            # The judge was told that it is at its end.
            assert each.finished
            assert each.score == value(judge, each.tokens, True)
        return [each.tokens for each in candidates]

    ending = [tokens for seed in SEEDS for tokens in found(seed, True)]
    assert any(1 in tokens for tokens in ending)
    assert not any(1 in tokens[:-1] for tokens in ending)
    assert any(1 in tokens[:-1] for seed in SEEDS for tokens in found(seed, False))


@pytest.mark.parametrize("margin", [0.1, 0.5, 5.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_pruned_places_response_goes_on_from_a_good_one(seed, margin):
    policy, judge = ToyPolicy(seed), ToyJudge(seed)
    search = prune_and_refill(PROMPT, n=6, block=2, margin=margin, max_tokens=DEPTH, seed=seed)
    result = run(search, policy, judge)
    beams, values, number, pruned = [()] * 6, [None] * 6, 0, 0
    while not all(ended(beam) for beam in beams):
        for i in range(6):
            if not ended(beams[i]):
                most = min(2, DEPTH - len(beams[i]))
                (piece,) = drawn(policy, PROMPT + beams[i], derive(seed, number, i), 1, most)
                beams[i] += piece
                values[i] = value(judge, beams[i], ended(beams[i]))
        good = [i for i in range(6) if not ended(beams[i]) and max(values) - values[i] <= margin]
        good.sort(key=lambda i: values[i], reverse=True)
        bad = [i for i in range(6) if not ended(beams[i]) and max(values) - values[i] > margin]
        taken = {i: good[j % len(good)] for j, i in enumerate(bad)} if good else {}
        beams = [beams[taken.get(i, i)] for i in range(6)]
        values = [values[taken.get(i, i)] for i in range(6)]
        pruned, number = pruned + len(taken), number + 1
    assert [each.tokens for each in result.candidates] == beams
    assert result.details == {"rounds": number, "pruned": pruned}
    assert (margin == 5.0) == (pruned == 0) or pruned == 0


def posterior(policy, judge, beta):
    """π(x)·exp(beta·V(x)) of every response, and its sum."""
    target = {
        x: probability(policy, x) * math.exp(beta * value(judge, x, True)) for x in responses()
    }
    return target, sum(target.values())


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("block", [1, 2, DEPTH])
def test_particles_converge_to_the_tilted_policy(block, threshold):
    policy, judge, n = ToyPolicy(3), ToyJudge(3), 10_000
    search = sequential_monte_carlo(
        PROMPT, particles=n, block=block, beta=1.0, threshold=threshold, max_tokens=DEPTH, seed=5
    )
    result = run(search, policy, judge)
    target, z = posterior(policy, judge, 1.0)
    assert result.details["log_normaliser"] == pytest.approx(math.log(z), abs=0.01)
    mass = Counter()
    for each, weight in zip(result.candidates, result.details["weights"], strict=True):
        mass[each.tokens] += weight
    assert sum(mass.values()) == pytest.approx(1)
    # Rare responses together, so that the statistic has its distribution.
    common = [x for x in target if target[x] / z > 0.005]
    expected = [target[x] / z for x in common]
    found = [mass[x] for x in common]
    expected, found = [*expected, 1 - sum(expected)], [*found, 1 - sum(found)]
    # Weighted and resampled particles are worth fewer than independent ones.
    worth = effective_sample_size([math.log(w) for w in result.details["weights"]]) / 2
    scaled = [each * worth for each in found]
    assert chisquare(scaled, [each * worth for each in expected]).pvalue > 1e-3
    assert bool(result.details["resampled"]) == (threshold == 1.0 and block < DEPTH)


def test_without_the_twist_it_is_the_policy():
    policy, judge = ToyPolicy(1), ToyJudge(1)
    search = sequential_monte_carlo(
        PROMPT, particles=50, block=2, beta=0.0, max_tokens=DEPTH, threshold=0.9
    )
    result = run(search, policy, judge)
    assert result.details["log_normaliser"] == pytest.approx(0.0)
    assert result.details["weights"] == pytest.approx([1 / 50] * 50)
    assert result.details["ess"] == pytest.approx([50.0] * len(result.details["ess"]))


def test_the_chosen_particle_is_drawn_by_weight():
    policy, judge = ToyPolicy(2), ToyJudge(2)
    chosen = Counter()
    for seed in range(400):
        search = sequential_monte_carlo(
            PROMPT, particles=2, block=DEPTH, beta=30.0, max_tokens=DEPTH, seed=seed
        )
        result = run(search, policy, judge)
        best = max(result.details["weights"])
        chosen[result.details["weights"][result.chosen] == best] += 1
    # At this beta the heavier of two particles has nearly all the weight.
    assert chosen[True] > 360


def test_systematic_resampling_draws_in_proportion():
    weights = [0.5, 0.25, 0.0, 0.25]
    for offset in (0.0, 0.3, 0.999):
        assert Counter(systematic(weights, offset)) == {0: 2, 1: 1, 3: 1}
    assert systematic([1.0, 0.0], 0.5, 3) == [0, 0, 0]


def test_settings_without_meaning_are_refused():
    for wrong in ({"width": 0}, {"block": -1}, {"margin": -0.1}, {"trees": 0}, {"branches": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Blocks(**wrong)
    with pytest.raises(ValueError, match="leave and patient: a response that leaves is not waited"):
        Blocks(leave=True, patient=True)
    with pytest.raises(ValueError, match=r"blocks=7 is no multiple of width=2"):
        Blocks.vgs(blocks=7, width=2)
    with pytest.raises(ValueError, match=r"choice='worst'"):
        run(sequential_monte_carlo(PROMPT, choice="worst"), ToyPolicy(), ToyJudge())
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"stop": ("",)}, {"stop": "\n"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Sampling(**wrong)
