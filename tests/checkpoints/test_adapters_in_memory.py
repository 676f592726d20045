"""PEFT adapters of models in memory: each scorer keeps to its own, on one base that is shared."""

import copy
import gc
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION

from guided_decode import Adapted, load_scorer
from guided_decode.checkpoints.adapter_layers import has_adapters
from guided_decode.forward.cpu_linear import OneDnnLinear, _is_there
from tests import adapters, models
from tests.adapters import KINDS, adapted, check, lora, values

peft = adapters.peft
LM = models.saved("llama", "lm")
ROWS, CANDIDATES = [[5, 6, 7], [8, 9]], torch.tensor([[3, 4], [10, 11]])


def two(task="TOKEN_CLS"):
    """A PeftModel with the adapters `default`, which is active, and `second`."""
    model = adapted(task)
    model.add_adapter("second", lora(task_type=task, r=2, target_modules=["k_proj", "down_proj"]))
    adapters.randomise(model, 7, of="second")
    return model.eval()


def scored(model, **how):
    return load_scorer(model, "verl-critic", **how).score(ROWS, CANDIDATES).values


def brute(model):
    """V of the candidates by the stock forward, with what is active."""
    value = values(model)
    with torch.no_grad():
        return torch.tensor(
            [
                [value([*row, a]) for a in own]
                for row, own in zip(ROWS, CANDIDATES.tolist(), strict=True)
            ]
        )


def same(got, wanted):
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("task", ["TOKEN_CLS", "SEQ_CLS"])
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2"])
def test_a_critic_with_its_head_in_modules_to_save(arch, task):
    model = adapted(task, models.saved(arch, "lm"))
    for given in (model, model.get_base_model(), Adapted(model, "default")):
        scorer = load_scorer(given, KINDS[task])
        assert has_adapters(scorer.model.model)
        check(scorer, values(model))
    model.merge_adapter()
    for given in (model, Adapted(model, "default")):
        scorer = load_scorer(given, KINDS[task])
        assert not has_adapters(scorer.model.model)
        check(scorer, values(model))


def test_a_language_model_and_its_base():
    model, base = adapted("CAUSAL_LM"), adapters.base_of("CAUSAL_LM", LM)
    adapters.check_implicit(load_scorer(model, "implicit", reference=Adapted(model)), model, base)
    adapters.check_implicit(
        load_scorer(model, "implicit", adapter="default", reference=Adapted(model, ())), model, base
    )


def test_adapters_that_act_together():
    model = adapted("CAUSAL_LM")
    model.add_adapter("second", lora(r=2))
    adapters.randomise(model, 7, of="second")
    scorer = load_scorer(model, "implicit", adapter=["default", "second"], reference=Adapted(model))
    model.base_model.set_adapter(["default", "second"])
    adapters.check_implicit(scorer, model.eval(), adapters.base_of("CAUSAL_LM", LM))


@pytest.mark.skipif(
    Version(version("peft")) < Version(MIN_PEFT_VERSION),
    reason=f"this transformers wants peft {MIN_PEFT_VERSION}",
)
def test_adapters_of_transformers_own():
    model = copy.deepcopy(models.tiny("llama", "sequence"))
    for name, seed in (("a", 1), ("b", 2)):
        model.add_adapter(lora(task_type="SEQ_CLS", modules_to_save=["score"]), name)
        adapters.randomise(model, seed, of=f".{name}.")
    model.eval()
    scorers = {name: load_scorer(model, "reward-model", adapter=name) for name in ("a", "b")}
    following = load_scorer(model, "reward-model")
    for name in ("a", "b", "a"):
        model.set_adapter(name)
        for scorer in (scorers[name], following):
            same(scorer.score(ROWS, CANDIDATES).values, brute(model))


def test_the_model_is_not_changed():
    model = two().train()
    state = {name: each.clone() for name, each in model.state_dict().items()}
    grads = {name: each.requires_grad for name, each in model.named_parameters()}
    kinds = [type(each) for each in model.modules()]
    for adapter in (None, "default", "second", ()):
        scored(model, adapter=adapter)
    assert [type(each) for each in model.modules()] == kinds
    assert {name: each.requires_grad for name, each in model.named_parameters()} == grads
    assert all(each.training for each in model.modules() if not isinstance(each, nn.ModuleDict))
    assert model.active_adapters == ["default"]
    for name, each in model.state_dict().items():
        assert torch.equal(each, state[name]), name


# Several scorers on one model.


def storages(*modules):
    """The bytes of each distinct storage of the parameters, by its address."""
    parameters = [each for module in modules for each in module.parameters()]
    return {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in parameters
    }


def test_policy_reference_and_critic_of_one_run_have_one_trunk_in_memory():
    policy = adapted("CAUSAL_LM")
    policy.add_adapter("critic", lora())
    adapters.randomise(policy, 7, of="critic")
    before = sum(storages(policy).values())
    base = sum(storages(adapters.base_of("CAUSAL_LM", LM)).values())
    added = sum(each.nbytes for name, each in policy.named_parameters() if "lora_" in name)
    assert before == base + added
    critic = load_scorer(policy, head=nn.Linear(48, 1), adapter="critic", reference=Adapted(policy))
    tuned = load_scorer(policy, "implicit", adapter="default", reference=Adapted(policy))
    parts = (critic.model, critic.reference.model, tuned._tuned.model, tuned.reference.model)
    after = sum(storages(policy, *(part.model for part in parts)).values())
    # Four models read it, and none brought a weight of its own.
    assert after == before


def test_three_critics_on_one_base_have_one_trunk_in_memory():
    model = two()
    model.add_adapter("third", lora(task_type="TOKEN_CLS"))
    adapters.randomise(model, 9, of="third")
    before = sum(storages(model).values())
    names = ("default", "second", "third")
    scorers = {name: load_scorer(model, "verl-critic", adapter=name) for name in names}
    assert sum(storages(model, *(each.model.model for each in scorers.values())).values()) == before
    for name in names * 2:
        model.set_adapter(name)
        same(scorers[name].score(ROWS, CANDIDATES).values, brute(model))


def test_each_keeps_to_its_own_whatever_is_active():
    model = two()
    wanted = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        wanted[name] = brute(model)
    with model.disable_adapter():
        wanted[()] = brute(model)
    scorers = {name: load_scorer(model, "verl-critic", adapter=name) for name in wanted}
    following = load_scorer(model, "verl-critic")
    for _ in range(2):
        for name in ("default", "second"):
            model.set_adapter(name)
            for own, scorer in scorers.items():
                same(scorer.score(ROWS, CANDIDATES).values, wanted[own])
            same(following.score(ROWS, CANDIDATES).values, wanted[name])
        with model.disable_adapter():
            for own, scorer in scorers.items():
                same(scorer.score(ROWS, CANDIDATES).values, wanted[own])
            same(following.score(ROWS, CANDIDATES).values, wanted[()])
    # Switching cost them nothing: one forward each.
    assert [scorer.stats.forwards for scorer in scorers.values()] == [1, 1, 1]


def test_only_the_training_of_its_own_adapter_empties_a_cache():
    model = two()
    own, other = (load_scorer(model, "verl-critic", adapter=each) for each in ("second", "default"))
    for scorer in (own, other):
        scorer.score(ROWS, CANDIDATES)
    model.set_adapter("second")
    with torch.enable_grad():
        model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1).step()
    same(own.score(ROWS, CANDIDATES).values, brute(model))
    other.score(ROWS, CANDIDATES)
    assert (own.stats.forwards, other.stats.forwards) == (2, 1)


def test_an_adapter_that_is_deleted_answers_no_more():
    model = two()
    own, other = (load_scorer(model, "verl-critic", adapter=each) for each in ("second", "default"))
    before = [scorer.score(ROWS, CANDIDATES).values for scorer in (own, other)]
    model.delete_adapter("second")
    for _ in range(2):
        with pytest.raises(
            ValueError, match="has no adapter 'second' in its layers: expected one of def"
        ):
            own.score(ROWS, CANDIDATES)
    assert torch.equal(other.score(ROWS, CANDIDATES).values, before[1])


def test_merging_is_followed_or_refused():
    model = two()
    own, other, following = (
        load_scorer(model, "verl-critic", adapter=each) for each in ("default", "second", None)
    )
    wanted = [scorer.score(ROWS, CANDIDATES).values for scorer in (own, other)]
    model.merge_adapter()
    for scorer in (own, following):
        same(scorer.score(ROWS, CANDIDATES).values, wanted[0])
    with pytest.raises(
        ValueError, match="'default' is merged into the weights .* where .* was ask"
    ):
        other.score(ROWS, CANDIDATES)
    with pytest.raises(ValueError, match="call unmerge_adapter"):
        load_scorer(model, "verl-critic", adapter=())
    model.unmerge_adapter()
    same(other.score(ROWS, CANDIDATES).values, wanted[1])
    model.merge_and_unload()
    same(following.score(ROWS, CANDIDATES).values, wanted[0])
    with pytest.raises(ValueError, match="has no adapter 'second' .* expected one of none"):
        other.score(ROWS, CANDIDATES)


def test_disabled_while_merged_changes_no_weight_of_the_callers():
    """PEFT would take the adapter out of the weights in the forward."""
    model = adapted("TOKEN_CLS")
    model.merge_adapter()
    model.base_model.disable_adapter_layers()
    state = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(ValueError, match="'default' is merged into the weights"):
        load_scorer(model, "verl-critic")
    assert all(torch.equal(each, state[name]) for name, each in model.state_dict().items())


def test_conventions_of_a_base_are_not_those_of_its_adapters():
    """A base that says of itself that it is a PPO critic, as our own tools write it."""
    model = adapted("TOKEN_CLS", models.saved("llama", "token"))
    model.get_base_model().config.guided_decode = {"kind": "ppo-critic"}
    given = [model, model.get_base_model(), Adapted(model, "default")]
    for merge in (False, True):
        if merge:
            model.merge_adapter()
        for each in given:
            with pytest.raises(ValueError, match="auto. has no evidence of what trained it"):
                load_scorer(each)
    model.unmerge_adapter()
    assert load_scorer(Adapted(model)).skip_token == models.BOS


def test_no_other_copy_of_the_model_outlives_its_loading():
    """One would hold the old weights when the model has new ones."""
    model = adapted("TOKEN_CLS")
    kind = type(model.get_base_model())
    scorer = load_scorer(model, "verl-critic")
    gc.collect()
    alive = [each for each in gc.get_objects() if isinstance(each, kind)]
    assert not any(each is scorer.model.model for each in alive)
    assert [each is model.get_base_model() for each in alive if has_adapters(each)] == [True]


def test_what_is_none():
    model = two()
    with pytest.raises(
        ValueError, match="has no adapter 'x' in its layers: expected one of default, se"
    ):
        load_scorer(model, "verl-critic", adapter="x")
    with pytest.raises(ValueError, match="has no adapter 'x' .* expected one of none"):
        load_scorer(models.tiny("llama", "token"), "verl-critic", adapter="x")
    with pytest.raises(ValueError, match="adapter=3: expected the name of an adapter"):
        load_scorer(model, "verl-critic", adapter=3)
    with pytest.raises(ValueError, match="an Adapted was given as the model of another"):
        load_scorer(Adapted(model, "second"), "verl-critic", adapter="default")


@pytest.mark.skipif(not _is_there(), reason="this torch has no oneDNN")
def test_the_fast_products_of_a_cpu_are_those_of_the_plain_layers_in_it():
    scorer = load_scorer(adapted("TOKEN_CLS"), "verl-critic")
    attention = scorer.model.model.layers[0].self_attn
    assert type(attention.q_proj).__name__ == "Linear"
    assert type(attention.q_proj).__module__.startswith("peft.")
    inside = (attention.q_proj.base_layer, attention.q_proj.lora_A["default"], attention.k_proj)
    assert [type(each) for each in inside] == [OneDnnLinear] * 3


def test_in_bfloat16_it_is_as_near_as_the_stock_forward():
    model = adapted("TOKEN_CLS").to(torch.bfloat16)
    got = scored(model)
    exact = copy.deepcopy(model).float()
    error = (brute(model).float() - brute(exact)).abs().max()
    assert (got - brute(exact)).abs().max() <= 2 * error + 1e-2
