"""What must hold of any model and workload: more of anything never takes less."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_decode import load_scorer
from guided_decode.checkpoints.plan.cards import find_card
from guided_decode.checkpoints.plan.floor import policy_bytes, scorer_bytes, unpacked_bytes
from guided_decode.checkpoints.plan.footprint import (
    MOST_FORWARD_TOKENS,
    Workload,
    policy_load,
    scorer_load,
)
from guided_decode.checkpoints.plan.model import PlannedModel
from guided_decode.checkpoints.plan.named import planned_scorer
from guided_decode.checkpoints.plan.placement import plan_of
from guided_decode.checkpoints.plan.ways import MOST_GPUS, Pair, Place, Way, usable
from guided_decode.checkpoints.plan.weight_forms import BF16, FORMS
from guided_decode.checkpoints.shape import LLAMA_2_13B, LLAMA_2_70B, Shape
from guided_decode.forward.activations import activation_bytes

ALL_FORMS = (BF16, *FORMS.values())
CARDS = [find_card(name) for name in ("L4", "L40S", "H100", "H200", "MI300X")]

few = settings(deadline=None, max_examples=40)
counts = st.integers(1, 64)
workloads = st.builds(Workload, counts, st.integers(1, 20_000), counts)


@st.composite
def models(draw, lm_head=None):
    """Decoders of up to some 100B weights, whose sizes eight GPUs divide."""
    kv_heads, groups = 8 * draw(st.integers(1, 4)), draw(st.integers(1, 8))
    heads = kv_heads * groups
    shape = Shape(
        layers=draw(st.integers(1, 80)),
        hidden=heads * draw(st.sampled_from([32, 64, 128])),
        intermediate=8 * draw(st.integers(16, 3584)),
        heads=heads,
        kv_heads=kv_heads,
        vocab=draw(st.integers(100, 256_000)),
        qkv_bias=draw(st.booleans()),
        tied=draw(st.booleans()),
    )
    head = draw(st.booleans()) if lm_head is None else lm_head
    return PlannedModel("any", "", shape, head, 0 if head else 1)


pairs = st.builds(Pair, models(lm_head=True), st.tuples(models()))


@few
@given(models(lm_head=True), models(), workloads, st.sampled_from(["batch", "length", "top_k"]))
def test_a_larger_workload_never_takes_less(policy, scorer, work, name):
    more = replace(work, **{name: getattr(work, name) + 1})
    assert policy_load(policy, more).total >= policy_load(policy, work).total
    assert scorer_load((scorer,), more).total >= scorer_load((scorer,), work).total
    assert policy_bytes(policy, more) >= policy_bytes(policy, work)
    assert scorer_bytes((scorer,), more) >= scorer_bytes((scorer,), work)


@few
@given(models(), workloads)
def test_a_more_precise_form_never_takes_less_and_all_take_less_than_bf16(model, work):
    takes = {form.name: model.weight_bytes(form) for form in ALL_FORMS}
    assert takes["bnb-4bit"] < takes["int4"] < takes["bnb-8bit"] == takes["fp8"]
    assert takes["fp8"] < takes["int8"] < takes["bf16"]
    for form in ALL_FORMS:
        assert scorer_bytes((model,), work, form) <= scorer_bytes((model,), work)


@few
@given(models(), workloads, st.sampled_from(ALL_FORMS))
def test_more_gpus_never_take_more_of_each_and_never_less_in_all(model, work, form):
    loads = [scorer_load((model,), work, form, shards) for shards in (1, 2, 4, 8)]
    for fewer, more in pairwise(loads):
        assert more.weights <= fewer.weights <= 2 * more.weights + 1
        assert more.cache <= fewer.cache <= 2 * more.cache
        assert more.activations <= fewer.activations


@few
@given(models(), models(), workloads)
def test_two_models_take_what_each_takes(one, other, work):
    both = scorer_load((one, other), work)
    assert both == scorer_load((one,), work) + scorer_load((other,), work)
    assert both.total == both.weights + both.cache + both.activations


@few
@given(pairs, workloads, st.sampled_from(CARDS))
def test_rows_are_the_largest_batch_that_fits(pair, work, card):
    for way in (Way(Place.ONE_GPU, beside=True), Way(Place.TENSOR_PARALLEL, shards=2)):
        rows = pair.most_rows(way, work, card)
        assert rows == 0 or pair.fits(way, replace(work, batch=rows), card)
        assert not pair.fits(way, replace(work, batch=rows + 1), card)


@few
@given(pairs, workloads, st.sampled_from(CARDS), st.integers(1, 16))
def test_the_way_to_take_fits_and_none_is_more_precise_on_the_gpus_there_are(
    pair, work, card, gpus
):
    plan = plan_of("any", pair, card, work, gpus=gpus)
    for one in plan.placements:
        assert one.fits == (one.fullest.bytes <= usable(card)) == (one.rows >= work.batch)
        assert (
            sum(gpu.count for gpu in one.gpus)
            == one.way.total
            == one.way.here + (one.way.elsewhere)
        )
        assert one.seconds > 0
        if one.way.policy_shards == 1:
            assert one.seconds >= plan.plain_seconds
    fitting = [one for one in plan.placements if one.fits]
    assert (plan.take is None) == (not fitting)
    here = [one for one in fitting if one.way.here <= gpus and not one.way.elsewhere]
    assert plan.enough == bool(here)
    if here:
        assert plan.take in here
        assert plan.take.way.form.bits == max(one.way.form.bits for one in here)
    elif fitting:
        assert plan.take.way.total == min(one.way.total for one in fitting)
    local = [one for one in plan.placements if not one.way.elsewhere]
    assert plan.smallest.fullest.bytes == min(one.fullest.bytes for one in local)
    assert all(one.way.here <= MOST_GPUS for one in local if one.way.shards > 1)


@few
@given(pairs, workloads, st.sampled_from(CARDS))
def test_every_way_places_each_weight_once(pair, work, card):
    """All GPUs together hold the policy's weights, and the scorer's but for what is on each."""
    for one in plan_of("any", pair, card, work).placements:
        way = one.way
        policy = sum(gpu.count * gpu.policy.weights for gpu in one.gpus)
        assert policy == pytest.approx(pair.policy.weight_bytes(), abs=way.policy_shards)
        scorer = sum(gpu.count * gpu.scorer.weights for gpu in one.gpus)
        (model,) = pair.scorer
        assert model.weight_bytes(way.form) - way.shards <= scorer
        copies = (way.shards - 1) * 2 * (model.shape.table + model.shape.parameters(lm_head=False))
        assert scorer <= model.weight_bytes(way.form) + copies


@pytest.mark.parametrize("kind", ["ppo-critic", "implicit"])
def test_a_loaded_scorer_holds_what_is_counted(kind):
    """Keys, values and weights of what `load_scorer` makes, in bfloat16."""
    name = {"ppo-critic": "tiny-tulu-value", "implicit": "tiny-tulu-ppo"}[kind]
    work = Workload(3, 100, 7)
    found, planned = planned_scorer(name)
    assert found == kind
    scorer = load_scorer(name, dtype="bfloat16", cache_tokens=work.cache_tokens)
    halves = [scorer] if kind == "ppo-critic" else [scorer._tuned, scorer.reference]
    load = scorer_load(planned, work)
    assert load.cache == sum(half.cache.pool.nbytes for half in halves)
    weights = sum(w.nbytes for half in halves for w in half.model.model.parameters())
    # The value head is held apart from its trunk.
    head = 2 * sum(model.labels * (model.shape.hidden + model.head_bias) for model in planned)
    assert load.weights == weights + head


def test_prompts_go_through_in_pieces_of_a_bounded_size():
    short, long = Workload(1, 2048), Workload(64, 4096)
    assert short.forward_tokens == 2048
    assert long.forward_tokens == MOST_FORWARD_TOKENS
    policy = PlannedModel("policy", "", LLAMA_2_13B, lm_head=True)
    own = activation_bytes(MOST_FORWARD_TOKENS, 5120, 13_824, 2)
    # And four rows of float32 logits for each of the batch.
    assert policy_load(policy, long).activations == own + 4 * 4 * 64 * 32_000


def test_an_unpacking_form_keeps_room_for_its_largest_matrix():
    critic = PlannedModel("critic", "", LLAMA_2_70B, lm_head=False, labels=1)
    kept, fused = (
        scorer_load((critic,), Workload(), FORMS[name]).activations for name in ("bnb-4bit", "int4")
    )
    assert kept - fused == 2 * 8192 * 28_672
    assert unpacked_bytes((critic,), FORMS["int4"]) == unpacked_bytes((critic,), BF16) == 0


def test_an_implicit_reward_reads_its_candidates_off_the_prefix():
    work = Workload(2, 100, 16)
    critic = PlannedModel("critic", "", LLAMA_2_70B, lm_head=False, labels=1)
    tuned = PlannedModel("tuned", "", LLAMA_2_70B, lm_head=True)
    kv = LLAMA_2_70B.kv_bytes()
    assert scorer_bytes((critic,), work) - critic.read_bytes() == 2 * 116 * kv
    assert scorer_bytes((tuned,), work) - tuned.read_bytes() == 2 * 101 * kv


@pytest.mark.parametrize("name", ["batch", "length", "top_k"])
@pytest.mark.parametrize("given", [0, -1, 1.5, True])
def test_a_workload_without_meaning_is_refused(name, given):
    with pytest.raises(ValueError, match=rf"{name}=.*expected an integer of at least 1"):
        Workload(**{name: given})
