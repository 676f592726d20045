"""The five checkpoints that the project exists for, against calculations by hand."""

import pytest

from guided_decode.checkpoints.plan.cards import GIB, find_card
from guided_decode.checkpoints.plan.footprint import Workload
from guided_decode.checkpoints.plan.named import planned_policy, planned_scorer
from guided_decode.checkpoints.plan.placement import make_plan
from guided_decode.checkpoints.plan.weight_forms import FORMS
from guided_decode.checkpoints.registry import find

CRITIC = "allenai/tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm-value"
FIVE = (
    CRITIC,
    "allenai/tulu-2-dpo-70b",
    "allenai/llama-3.1-tulu-2-70b-uf-mean-rm",
    "allenai/Llama-3.1-Tulu-3-8B-RM",
    "ContextualAI/Contextual_KTO_Mistral_PairRM",
)

# One layer: queries and outputs, keys and values; the feed-forward's three matrices; two norms.
LAYER_13B = 2 * 5120 * 5120 + 2 * 5120 * 5120 + 3 * 5120 * 13824 + 2 * 5120
LAYER_70B = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192
LAYER_8B = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
# Layers, the last norm, the embeddings.
TRUNK_13B = 40 * LAYER_13B + 5120 + 32_000 * 5120
TRUNK_L2_70B = 80 * LAYER_70B + 8192 + 32_000 * 8192
TRUNK_L3_70B = 80 * LAYER_70B + 8192 + 128_256 * 8192
TRUNK_TULU_8B = 32 * LAYER_8B + 4096 + 128_264 * 4096
TRUNK_MISTRAL = 32 * LAYER_8B + 4096 + 32_000 * 4096


def test_hand_calculations_give_the_sizes_that_were_published():
    published = {
        TRUNK_13B + 32_000 * 5120: 13.016e9,
        TRUNK_L2_70B + 32_000 * 8192: 68.98e9,
        TRUNK_L3_70B + 128_256 * 8192: 70.554e9,
        32 * LAYER_8B + 4096 + 2 * 128_256 * 4096: 8.030e9,
        TRUNK_MISTRAL + 32_000 * 4096: 7.242e9,
    }
    for by_hand, given in published.items():
        assert by_hand == pytest.approx(given, rel=1e-4)


# Scorers load no language-model head but for implicit rewards, which load two whole models.
@pytest.mark.parametrize(
    ("name", "kind", "by_hand"),
    [
        (FIVE[0], "ppo-critic", [TRUNK_L2_70B + 8192 + 1]),
        (FIVE[1], "implicit", [TRUNK_L2_70B + 32_000 * 8192] * 2),
        (FIVE[2], "reward-model", [TRUNK_L3_70B + 8192]),
        (FIVE[3], "reward-model", [TRUNK_TULU_8B + 4096]),
        (FIVE[4], "implicit", [TRUNK_MISTRAL + 32_000 * 4096] * 2),
    ],
)
def test_scorers_have_the_weights_of_a_hand_calculation(name, kind, by_hand):
    found, models = planned_scorer(name)
    assert found == kind
    assert [model.parameters for model in models] == by_hand
    for model, weights in zip(models, by_hand, strict=True):
        assert model.weight_bytes() == pytest.approx(2 * weights, rel=0.01)


@pytest.mark.parametrize(
    ("scorer", "by_hand", "kv_bytes"),
    [
        # A token's keys and values: 2 · layers · kv_heads · head_dim, two bytes each.
        (FIVE[0], TRUNK_13B + 32_000 * 5120, 2 * 40 * 40 * 128 * 2),
        (FIVE[1], TRUNK_13B + 32_000 * 5120, 2 * 40 * 40 * 128 * 2),
        (FIVE[2], TRUNK_L3_70B + 128_256 * 8192, 2 * 80 * 8 * 128 * 2),
        (FIVE[3], TRUNK_TULU_8B + 128_264 * 4096, 2 * 32 * 8 * 128 * 2),
        (FIVE[4], TRUNK_MISTRAL + 32_000 * 4096, 2 * 32 * 8 * 128 * 2),
    ],
)
def test_their_policies_have_the_weights_of_a_hand_calculation(scorer, by_hand, kv_bytes):
    policy = planned_policy(find(scorer).policy)
    assert policy.parameters == by_hand
    assert policy.weight_bytes() == 2 * by_hand
    assert policy.kv_bytes() == kv_bytes


def test_the_70b_critic_in_each_form():
    _, (critic,) = planned_scorer(CRITIC)
    matrices = 80 * (LAYER_70B - 2 * 8192)
    # Embeddings, norms and head stay in bfloat16.
    rest = 2 * (32_000 * 8192 + 80 * 2 * 8192 + 8192 + 8193)
    # One 8-bit scale for 64 weights, and one of 32 bits for 256 of these: 4.127 bits a weight.
    four = matrices * (0.5 + 1 / 64 + 4 / 64 / 256)
    assert critic.weight_bytes(FORMS["bnb-4bit"]) == pytest.approx(four + rest, rel=1e-6)
    assert four + rest == pytest.approx(35.8e9, rel=0.01)
    # Output rows of a layer: 8192 queries, 2 · 1024, 8192, 2 · 28672, 8192.
    rows = 80 * (8192 + 2048 + 8192 + 2 * 28672 + 8192)
    eight = matrices + 4 * rows
    assert critic.weight_bytes(FORMS["bnb-8bit"]) == eight + rest
    assert critic.weight_bytes(shards=4) == 2 * matrices // 4 + rest


def test_the_13b_policy_and_its_70b_critic_on_one_80_gb_gpu():
    plan = make_plan(find(CRITIC).policy, CRITIC, find_card("80GB"), Workload(1, 2048, 16))
    by_form = {one.way.form.name: one for one in plan.placements if one.way.place == "one-gpu"}
    assert [by_form[name].fits for name in ("bf16", "bnb-8bit", "bnb-4bit")] == [False, False, True]
    (gpu,) = by_form["bnb-4bit"].gpus
    assert gpu.policy.weights == 2 * (TRUNK_13B + 32_000 * 5120)
    assert gpu.policy.cache == 2048 * 819_200
    # 16 candidates more, a slot that is never handed out, and values of four bytes.
    assert gpu.scorer.cache == (2048 + 16 + 1) * 327_680 + (2048 + 16 + 2) * 4
    # Weights are by far the most: 24.2 and 33.4 GiB.
    assert gpu.bytes / GIB == pytest.approx(61, abs=1.5)
    assert plan.take is by_form["bnb-4bit"]
    assert plan.enough


@pytest.mark.parametrize(
    ("scorer", "way", "form", "gpus"),
    [
        (FIVE[0], "one-gpu", "bnb-4bit", 1),
        # 13B, and twice 70B in four bits.
        (FIVE[1], "own-gpu", "bnb-4bit", 2),
        # Its policy is a 70B itself, and takes two.
        (FIVE[2], "own-gpu", "bnb-8bit", 3),
        (FIVE[3], "one-gpu", "bf16", 1),
        (FIVE[4], "one-gpu", "bf16", 1),
    ],
)
def test_what_fits_80_gb_gpus(scorer, way, form, gpus):
    plan = make_plan(find(scorer).policy, scorer, find_card("80GB"), Workload())
    taken = plan.take.way
    assert (str(taken.place), taken.form.name, taken.total) == (way, form, gpus)
    assert plan.enough == (gpus == 1)


def test_with_four_gpus_the_70b_critic_stays_in_bf16():
    plan = make_plan(find(CRITIC).policy, CRITIC, find_card("H100"), Workload(), gpus=4)
    taken = plan.take.way
    assert (str(taken.place), taken.form.name, taken.shards) == ("tensor-parallel", "bf16", 2)
    assert taken.total == 3


def test_the_floor_of_a_step_is_bytes_over_bandwidth():
    """On an H100 the 13B policy reads 26 GB less its embeddings, the 70B critic its four bits."""
    plan = make_plan(find(CRITIC).policy, CRITIC, find_card("H100"), Workload(1, 2048, 16))
    policy = 2 * (TRUNK_13B - 32_000 * 5120 + 32_000 * 5120) + 2048 * 819_200
    assert plan.plain_seconds == pytest.approx(policy / 3.35e12, rel=1e-9)
    matrices = 80 * (LAYER_70B - 2 * 8192)
    four = matrices * (0.5 + 1 / 64 + 4 / 64 / 256) + 2 * (80 * 2 * 8192 + 8192 + 8193)
    critic = four + (2048 + 16) * 327_680
    assert plan.take.seconds == pytest.approx((policy + critic) / 3.35e12, rel=1e-6)
    assert plan.take.seconds == pytest.approx(19e-3, rel=0.05)
    # Where bitsandbytes unpacks: two bytes a weight written and read again.
    unpacked = (policy + critic + 2 * 2 * matrices) / 3.35e12
    assert plan.take.unpacked_seconds == pytest.approx(unpacked, rel=1e-6)
