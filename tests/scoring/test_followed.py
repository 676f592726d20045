"""A model in memory that changes under its scorer is followed, or refused in words."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from guided_decode import GuidanceConfig, PrefixHandle, load_scorer, tiny_tulu
from guided_decode.checkpoints.trunk_head_loading import read_trunk_head
from guided_decode.forward.weights import WeightWatch
from guided_decode.integrations.transformers import TrunkLookahead
from tests import models

ROWS, CANDIDATES = [[5, 6, 7], [8, 9]], torch.tensor([[3, 4], [10, 11]])


def own(head, arch="llama", dtype=torch.float32):
    """A model that a test may change."""
    return copy.deepcopy(models.tiny(arch, head)).to(dtype).requires_grad_(True)


def scored(model, kind="verl-critic", **options):
    return load_scorer(model, kind=kind, **options).score(ROWS, CANDIDATES)


def step(model):
    """A step of an optimizer, in place."""
    with torch.enable_grad():
        model(input_ids=torch.tensor([[5, 6, 7]])).logits.float().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.05).step()


def other_weights(model):
    return {name: each + 0.1 for name, each in model.state_dict().items()}


CHANGES = {
    "optimizer step": step,
    "load_state_dict": lambda model: model.load_state_dict(other_weights(model)),
    "assigned": lambda model: model.load_state_dict(other_weights(model), assign=True),
    "data swapped": lambda model: [
        setattr(each, "data", each.data * 1.5) for each in model.parameters()
    ],
    "head alone": lambda model: _scaled(model.score),
    "module replaced": lambda model: setattr(
        model.model.layers[0].self_attn, "q_proj", nn.Linear(48, 48, bias=False)
    ),
}


def _scaled(layer):
    with torch.no_grad():
        layer.weight.mul_(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
def test_a_critic_that_changed_is_scored_as_it_is_now(change, dtype):
    model = own("token", dtype=dtype)
    scorer = load_scorer(model, kind="verl-critic")
    before = scorer.score(ROWS, CANDIDATES).values
    CHANGES[change](model.to(dtype))
    model.to(dtype)
    expected = scored(model).values
    assert not torch.allclose(before, expected, atol=1e-3)
    torch.testing.assert_close(scorer.score(ROWS, CANDIDATES).values, expected)
    scorer.cache.check()


def test_a_model_that_did_not_change_keeps_its_cache():
    model = own("token")
    scorer = load_scorer(model, kind="verl-critic")
    scorer.score(ROWS, CANDIDATES)
    with torch.enable_grad():
        model(input_ids=torch.tensor([[5, 6]])).logits.sum().backward()
    model.zero_grad()
    model.train()
    forwards = scorer.stats.forwards
    scorer.score(ROWS, CANDIDATES)
    assert scorer.stats.forwards == forwards


def test_a_scorer_in_another_dtype_than_its_model_follows_as_well():
    model = own("token", dtype=torch.bfloat16)
    scorer = load_scorer(model, kind="verl-critic", dtype=torch.float32)
    scorer.score(ROWS, CANDIDATES)
    step(model)
    expected = scored(model, dtype=torch.float32).values
    torch.testing.assert_close(scorer.score(ROWS, CANDIDATES).values, expected)


def test_another_dtype_is_refused_in_words_and_answers_nothing_old():
    model = own("token")
    scorer = load_scorer(model, kind="verl-critic")
    scorer.score(ROWS, CANDIDATES)
    model.to(torch.bfloat16)
    for _ in range(2):
        with pytest.raises(ValueError, match="has become torch.bfloat16.*call load_scorer again"):
            scorer.score(ROWS, CANDIDATES)
    model.to(torch.float32)
    torch.testing.assert_close(scorer.score(ROWS, CANDIDATES).values, scored(model).values)


def test_both_models_of_an_implicit_reward_are_followed():
    tuned, base = own("lm"), copy.deepcopy(models.tiny("llama", "lm", seed=1))
    scorer = load_scorer(tuned, "implicit", reference=base)
    scorer.score(ROWS, CANDIDATES)
    for model in (tuned, base):
        model.load_state_dict(other_weights(model))
        expected = scored(tuned, "implicit", reference=base).values
        torch.testing.assert_close(scorer.score(ROWS, CANDIDATES).values, expected)


def test_a_head_on_the_policys_trunk_is_followed_without_the_trunk():
    policy, head = own("lm"), nn.Linear(48, 1)
    scorer = load_scorer(policy, head=head)
    scorer.score(ROWS, CANDIDATES)
    _scaled(head)
    torch.testing.assert_close(
        scorer.score(ROWS, CANDIDATES).values, scored(policy, "auto", head=head).values
    )


def test_the_trunks_own_loop_goes_on_with_the_policy_as_it_is_now():
    policy = own("lm").requires_grad_(False)
    head = {"head.weight": torch.zeros(1, 48)}
    lookahead = TrunkLookahead(load_scorer(policy, head=head), GuidanceConfig(top_k=4))
    ids = torch.tensor([models.prompts([6])[0]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}

    def tokens(**how):
        return policy.generate(input_ids=ids, eos_token_id=None, **options, **how)[0].tolist()

    before = tokens(custom_generate=lookahead)
    assert before == tokens()
    models.randomise(policy, seed=5)
    after = tokens(custom_generate=lookahead)
    assert after == tokens() != before


class Adapted(nn.Linear):
    """What a PEFT layer says of itself."""

    def __init__(self):
        super().__init__(4, 4)
        self.active_adapters, self.disable_adapters = ["a"], False
        self.merged_adapters, self.scaling = [], {"a": 1.0}


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "active_adapters", ["b"]),
        lambda layer: layer.active_adapters.append("b"),
        lambda layer: setattr(layer, "disable_adapters", True),
        lambda layer: layer.merged_adapters.append("a"),
        lambda layer: layer.scaling.update(a=2.0),
    ],
)
def test_adapters_that_are_switched_disabled_merged_or_scaled_are_seen(change):
    model = nn.Sequential(Adapted(), nn.Linear(4, 4))
    watch = WeightWatch([model])
    assert not watch.changed()
    change(model[0])
    assert watch.changed()


def test_adapters_of_peft_are_followed():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = own("sequence")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, each in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(each, std=0.3)
    scorer = load_scorer(model, kind="reward-model")
    values = [scorer.score(ROWS, CANDIDATES).values]
    layers = adapted.base_model
    for change in (
        layers.disable_adapter_layers,
        layers.enable_adapter_layers,
        adapted.merge_adapter,
    ):
        change()
        values.append(scorer.score(ROWS, CANDIDATES).values)
    assert not torch.allclose(values[0], values[1], atol=1e-3)
    torch.testing.assert_close(values[2], values[0])
    torch.testing.assert_close(values[3], values[0], atol=1e-4, rtol=1e-4)


# Copies.


def test_a_deep_copy_has_a_cache_of_its_own_and_gives_slot_tables_back():
    scorer = load_scorer(models.saved("llama", "token"), kind="verl-critic")
    handle = PrefixHandle([5, 6, 7])
    expected = scorer.score([handle], torch.tensor([[3, 4]])).values
    copied = copy.deepcopy(scorer)
    assert copied.cache is not scorer.cache
    assert copied.cache.cached_tokens == 0
    torch.testing.assert_close(copied.score([handle], torch.tensor([[3, 4]])).values, expected)
    assert copied.cache.tables.open_rows == 1
    del handle
    for each in (scorer, copied):
        assert each.cache.tables.open_rows == 0
        each.cache.check()


def test_a_deep_copy_follows_the_same_model():
    model = own("token")
    copied = copy.deepcopy(load_scorer(model, kind="verl-critic"))
    copied.score(ROWS, CANDIDATES)
    step(model)
    torch.testing.assert_close(copied.score(ROWS, CANDIDATES).values, scored(model).values)


@pytest.mark.parametrize("kind", ["critic", "implicit", "trunk"])
def test_a_pickled_scorer_is_refused_in_words(kind):
    lm = models.tiny("llama", "lm")
    scorer = {
        "critic": lambda: load_scorer(models.tiny("llama", "token"), "verl-critic"),
        "implicit": lambda: load_scorer(lm, "implicit", reference=lm),
        "trunk": lambda: load_scorer(lm, head=nn.Linear(48, 1)),
    }[kind]()
    copy.copy(scorer).score(ROWS, CANDIDATES)
    with pytest.raises(TypeError, match="cannot be pickled.*call load_scorer in each process"):
        pickle.dumps(scorer)


def test_a_head_that_cannot_be_read_again_answers_nothing_old():
    """The trunk was read anew by then: the next call may not go on with the head of before."""
    model = own("token")
    scorer = load_scorer(model, kind="verl-critic")
    scorer.score(ROWS, CANDIDATES)
    step(model)
    with torch.no_grad():
        model.score.weight[0, 0] = torch.nan
    for _ in range(2):
        with pytest.raises(ValueError, match="NaN"):
            scorer.score(ROWS, CANDIDATES)
    with torch.no_grad():
        model.score.weight[0, 0] = 2.0
    expected = scored(model).values
    torch.testing.assert_close(scorer.score(ROWS, CANDIDATES).values, expected)


def test_a_transform_of_the_callers_holds_when_the_model_is_read_again():
    config = copy.deepcopy(models.tiny("llama", "token").config)
    config.num_labels = 5
    torch.manual_seed(0)
    model = type(models.tiny("llama", "token"))(config).eval()
    scorer = load_scorer(model, kind="classifier", transform="softmax:2")
    scorer.score(ROWS, CANDIDATES)
    _scaled(model.score)
    expected = scored(model, "classifier", transform="softmax:2").values
    torch.testing.assert_close(scorer.score(ROWS, CANDIDATES).values, expected)


def test_a_copy_made_after_a_change_follows_it():
    model = own("token")
    scorer = load_scorer(model, kind="verl-critic", dtype=torch.bfloat16)
    scorer.score(ROWS, CANDIDATES)
    CHANGES["data swapped"](model)
    copied = copy.deepcopy(scorer)
    expected = scored(model, dtype=torch.bfloat16).values
    torch.testing.assert_close(copied.score(ROWS, CANDIDATES).values, expected)
    torch.testing.assert_close(scorer.score(ROWS, CANDIDATES).values, expected)


def test_scorers_that_share_a_model_follow_it_both():
    model = own("token")
    first = load_scorer(model, kind="verl-critic")
    second = copy.copy(first)
    for scorer in (first, second):
        scorer.score(ROWS, CANDIDATES)
    CHANGES["load_state_dict"](model)
    expected = scored(model).values
    for scorer in (first, second, first):
        torch.testing.assert_close(scorer.score(ROWS, CANDIDATES).values, expected)


def test_a_head_that_knows_its_trunk_by_its_weights_is_followed():
    policy = AutoModelForCausalLM.from_pretrained(tiny_tulu.model_path("sft"), dtype=torch.float32)
    head = read_trunk_head(str(tiny_tulu.trunk_head_path("sft")))
    scorer = load_scorer(policy, head=head)
    before = scorer.score(ROWS, CANDIDATES).values
    with torch.no_grad():
        head.weight.mul_(2)
        if head.bias is not None:
            head.bias.mul_(2)
    torch.testing.assert_close(scorer.score(ROWS, CANDIDATES).values, 2 * before)
