"""Ways to place a pair: which are shown, and what lies where."""

from dataclasses import replace

import pytest

from guided_decode.checkpoints.plan.cards import GIB, Card, find_card
from guided_decode.checkpoints.plan.footprint import Workload, policy_load, scorer_load
from guided_decode.checkpoints.plan.model import PlannedModel
from guided_decode.checkpoints.plan.placement import make_plan, plan_of
from guided_decode.checkpoints.plan.ways import (
    SECOND_PROCESS,
    USABLE,
    Pair,
    Place,
    Way,
    card_for,
    usable,
)
from guided_decode.checkpoints.plan.weight_forms import BF16, FORMS
from guided_decode.checkpoints.shape import LLAMA_2_13B, LLAMA_2_70B, LLAMA_3_70B

WORK = Workload()
POLICY = PlannedModel("policy", "", LLAMA_2_13B, lm_head=True)
LARGE_POLICY = PlannedModel("large", "", LLAMA_3_70B, lm_head=True)
CRITIC = PlannedModel("critic", "", LLAMA_2_70B, lm_head=False, labels=1)
PAIR = Pair(POLICY, (CRITIC,))


def shown(plan):
    return [(str(one.way.place), one.way.form.name, one.way.total) for one in plan.placements]


def test_the_ways_of_the_70b_critic_on_80_gb():
    plan = plan_of("ppo-critic", PAIR, find_card("80GB"), WORK)
    assert shown(plan) == [
        ("one-gpu", "bf16", 1),
        ("one-gpu", "bnb-8bit", 1),
        ("one-gpu", "bnb-4bit", 1),
        # Of the rest the most precise that fits.
        ("own-gpu", "bnb-8bit", 2),
        ("tensor-parallel", "bf16", 3),
        ("tensor-parallel", "bf16", 4),
        ("served", "bnb-8bit", 2),
    ]


def test_a_way_beside_the_policy_holds_both_on_its_gpus():
    way = Way(Place.TENSOR_PARALLEL, shards=4, beside=True)
    shared, others = PAIR.gpus(way, WORK)
    assert (shared.count, others.count, way.total, way.here) == (1, 3, 4, 4)
    assert shared.policy == policy_load(POLICY, WORK)
    assert others.scorer == scorer_load((CRITIC,), WORK, BF16, 4)
    assert others.policy.total == 0
    # Two processes share the first GPU.
    assert shared.scorer.total == others.scorer.total + SECOND_PROCESS
    assert PAIR.needs(way, WORK) == shared.bytes


def test_a_way_apart_has_gpus_of_its_own():
    way = Way(Place.TENSOR_PARALLEL, shards=2)
    policy, scorer = PAIR.gpus(way, WORK)
    assert (policy.count, scorer.count, way.total) == (1, 2, 3)
    assert policy.scorer.total == scorer.policy.total == 0
    served = Way(Place.SERVED, FORMS["bnb-4bit"])
    assert (served.here, served.elsewhere, served.total) == (1, 1, 2)


def test_a_policy_larger_than_a_gpu_is_cut_too():
    pair, card = Pair(LARGE_POLICY, (CRITIC,)), find_card("80GB")
    assert pair.policy_shards(WORK, card) == 2
    plan = plan_of("reward-model", pair, card, WORK, gpus=4)
    ways = [one.way for one in plan.placements if one.way.place is not Place.ONE_GPU]
    assert {way.policy_shards for way in ways} == {2, 4}
    shared = next(way for way in ways if way.beside)
    # All of its GPUs hold an equal part of both.
    (gpu,) = pair.gpus(shared, WORK)
    assert (gpu.count, shared.policy_shards, shared.shards) == (4, 4, 4)
    assert gpu.policy.weights == LARGE_POLICY.weight_bytes() // 4
    # Of two ways on four GPUs the faster one.
    assert plan.take.way == shared
    assert plan.take.way.total == 4


def test_more_gpus_let_the_critic_stay_more_precise():
    taken = [
        plan_of("ppo-critic", PAIR, find_card("80GB"), WORK, gpus=gpus).take.way
        for gpus in (1, 2, 3, 8)
    ]
    assert [(str(way.place), way.form.name) for way in taken] == [
        ("one-gpu", "bnb-4bit"),
        ("own-gpu", "bnb-8bit"),
        ("tensor-parallel", "bf16"),
        ("tensor-parallel", "bf16"),
    ]


def test_what_heads_do_not_divide_is_not_cut():
    odd = replace(CRITIC, shape=replace(LLAMA_2_70B, kv_heads=2))
    assert Pair(POLICY, (odd,)).scorer_shards() == (2,)
    assert Pair(POLICY, (CRITIC, odd)).scorer_shards() == (2,)
    assert PAIR.scorer_shards() == (2, 4, 8)


def test_a_language_model_is_cut_where_its_vocabulary_divides():
    """As `load_scorer(tp_plan="auto")` has it, for both models of an implicit reward."""
    odd = replace(LLAMA_2_70B, vocab=32_002)
    tuned = PlannedModel("tuned", "", odd, lm_head=True)
    assert Pair(POLICY, (tuned, replace(tuned, shape=LLAMA_2_70B))).scorer_shards() == (2,)
    assert Pair(POLICY, (replace(CRITIC, shape=odd),)).scorer_shards() == (2, 4, 8)


def test_where_nothing_fits_the_smallest_way_is_known():
    card = Card("tiny", 4, 4.0, None)
    plan = plan_of("ppo-critic", PAIR, card, WORK)
    assert plan.take is None
    assert not plan.enough
    assert {one.rows for one in plan.placements} == {0}
    assert plan.smallest.way.shards == 8
    assert plan.placements[0].seconds is None
    assert plan.plain_seconds is None
    # A card of that size does, and a smaller one does not.
    needed = card_for(plan.smallest.fullest.bytes)
    for spare, fits in ((1 << 20, True), (-(1 << 20), False)):
        other = Card("other", 0, (needed + spare) / GIB, None)
        assert PAIR.fits(plan.smallest.way, WORK, other) is fits
    assert usable(find_card("H100")) == int(USABLE * find_card("H100").bytes)


def test_one_quantization_is_considered_where_one_is_asked_for():
    names = ("tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm", "tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm-value")
    plan = make_plan(*names, find_card("80GB"), WORK, quantization="int4")
    assert {one.way.form.name for one in plan.placements} == {"bf16", "int4"}
    assert plan.take.way.form.name == "int4"
    with pytest.raises(ValueError, match=r"quantization='int5': expected one of bnb-8bit, int8"):
        make_plan(*names, find_card("80GB"), WORK, quantization="int5")
    with pytest.raises(ValueError, match="gpus=0: expected at least 1"):
        make_plan(*names, find_card("80GB"), WORK, gpus=0)
