"""PEFT adapters from folders: merged into their base where that is exact, else applied."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from guided_decode import Adapted, load_scorer
from guided_decode.checkpoints.adapter_layers import has_adapters
from guided_decode.checkpoints.checkpoint import load_causal_lm
from tests import adapters, models
from tests.adapters import KINDS, adapted, check, lora, saved, values

peft = adapters.peft
LM = models.saved("llama", "lm")


def trunk(scorer):
    return scorer.model.model


def rewrite(path, **fields):
    """Sets fields of an adapter's config."""
    file = Path(path, "adapter_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return path


@pytest.mark.parametrize("task", ["TOKEN_CLS", "SEQ_CLS"])
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "gemma2"])
def test_a_critic_with_its_head_in_modules_to_save(arch, task):
    model = adapted(task, models.saved(arch, "lm"))
    scorer = load_scorer(saved(model), KINDS[task])
    assert not has_adapters(trunk(scorer))
    check(scorer, values(model))


# Each of them changes how an adapter's weights become the layer's.
CONFIGS = {
    "rank of a layer": lambda: lora(rank_pattern={"layers.0.self_attn.q_proj": 2}),
    "layers": lambda: lora(target_modules=r"model\.layers\.1\..*_proj", task_type="TOKEN_CLS"),
    "rslora": lambda: lora(use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "biases": lambda: lora(bias="all"),
    "embeddings": lambda: lora(target_modules=["embed_tokens", "q_proj"]),
    "modules to save": lambda: lora(modules_to_save=["norm", "score"]),
    "tokens": lambda: lora(trainable_token_indices={"embed_tokens": [5, 7, 50]}),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"],
                                  feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, r=0, target_modules=["q_proj"]),
}  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_adapters_of_other_makes(config):
    model = adapted("TOKEN_CLS", config=CONFIGS[config]())
    for given in (saved(model), model):
        check(load_scorer(given, "verl-critic"), values(model), steps=2)


def test_an_adapter_that_cannot_be_merged_is_applied():
    # Its bias has no place in Llama's layers.
    model = adapted("TOKEN_CLS", config=lora(lora_bias=True))
    scorer = load_scorer(saved(model), "verl-critic")
    assert has_adapters(trunk(scorer))
    check(scorer, values(model))


def test_a_language_model_and_its_base():
    model, base = adapted("CAUSAL_LM"), adapters.base_of("CAUSAL_LM", LM)
    path = saved(model)
    for reference in (LM, Adapted(path), Adapted(LM, None), base):
        adapters.check_implicit(load_scorer(path, "implicit", reference=reference), model, base)
    with pytest.raises(ValueError, match="no reference came with it"):
        load_scorer(path, "implicit")


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_tied_embeddings_are_not_merged_into(target):
    tied = models.saved("llama", "lm", tie_word_embeddings=True)
    model = adapted("CAUSAL_LM", tied, lora(target_modules=[target, "q_proj"]))
    base = adapters.base_of("CAUSAL_LM", tied)
    scorer = load_scorer(saved(model), "implicit", reference=tied)
    adapters.check_implicit(scorer, model, base)


def test_a_head_of_several_labels():
    model = adapted("SEQ_CLS", num_labels=3)
    scorer = load_scorer(saved(model), "classifier")
    check(scorer, lambda ids: float(adapters.outputs(model, ids).softmax(-1)[1]))


def test_a_reward_model_is_known_by_its_task():
    model = adapted("SEQ_CLS")
    assert load_scorer(saved(model)).terminal == "critic"
    with pytest.raises(ValueError, match="LlamaForTokenClassification.: kind=.auto. has no evid"):
        load_scorer(saved(adapted("TOKEN_CLS")))


def test_an_adapter_on_a_critic_keeps_the_critics_head():
    critic = models.saved("llama", "token")
    model = adapted("TOKEN_CLS", critic)
    path = saved(model)
    # As trainers save it who put the adapter on the trunk alone.
    rewrite(path, modules_to_save=None)
    weights = load_file(f"{path}/adapter_model.safetensors")
    trunk_only = {name: each for name, each in weights.items() if "lora" in name}
    save_file(trunk_only, f"{path}/adapter_model.safetensors", metadata={"format": "pt"})
    inner = model.get_base_model()
    inner.score.modules_to_save["default"] = inner.score.original_module
    check(load_scorer(path, "verl-critic"), values(model))


# Heads beside an adapter.


def with_head(task_type="CAUSAL_LM"):
    """An adapter of a language model, the head beside it, and V by the stock forward."""
    model = adapted("CAUSAL_LM", config=lora(task_type=task_type))
    generator = torch.Generator().manual_seed(5)
    head = {
        "v_head.summary.weight": torch.randn(1, 48, generator=generator),
        "v_head.summary.bias": torch.tensor([0.75]),
    }

    def value(ids):
        hidden = model.get_base_model().model(torch.tensor([list(ids)])).last_hidden_state[0, -1]
        return float(head["v_head.summary.weight"][0] @ hidden) + 0.75

    return saved(model), head, value


def test_llama_factorys_head():
    path, head, value = with_head()
    save_file(head, f"{path}/value_head.safetensors")
    check(load_scorer(path, "value-head"), value)


def test_trls_head_is_a_pickle():
    path, head, value = with_head()
    torch.save(head, f"{path}/pytorch_model.bin")
    check(load_scorer(path, "value-head", allow_pickle=True), value)
    with pytest.raises(ValueError, match="no head that value-head .*pytorch_model.bin beside it, a "
                       "pickle, may have it: pass allow_pickle=True"):  # fmt: skip
        load_scorer(path, "value-head")


def test_a_head_beside_the_policys_own_adapter():
    """A PPO run's policy and critic with one adapter: the head reads the policy's own trunk."""
    path, head, value = with_head()
    save_file(head, f"{path}/value_head.safetensors")
    check(load_scorer(path, head=path), value)
    in_memory = peft.PeftModel.from_pretrained(adapters.base_of("CAUSAL_LM", LM), path)
    check(load_scorer(in_memory.eval(), head=path), value)
    reads = "is a head on its base with an adapter in it, which the policy .* has not"
    for other in (LM, saved(adapted("CAUSAL_LM", seed=3)), adapted("CAUSAL_LM", seed=3)):
        with pytest.raises(ValueError, match=reads):
            load_scorer(other, head=path)


def test_a_language_models_adapter_without_a_head():
    path, _, _ = with_head()
    with pytest.raises(ValueError, match="has no head that value-head expects"):
        load_scorer(path, "value-head")


def test_a_trainers_own_class_with_its_config():
    """OpenRLHF's: no task, a class of its own, and conventions in the config that it writes."""
    model = adapted("TOKEN_CLS")
    inner = model.get_base_model()
    inner.score.modules_to_save["default"].bias = None
    path = saved(model)
    weights = load_file(f"{path}/adapter_model.safetensors")
    weights.pop("base_model.model.score.bias", None)
    save_file(weights, f"{path}/adapter_model.safetensors", metadata={"format": "pt"})
    rewrite(path, task_type=None, auto_mapping={"base_model_class": "RewardModel",
                                                "parent_library": "openrlhf.models"})  # fmt: skip
    config = inner.config.to_dict() | {"value_head_prefix": "score", "normalize_reward": True,
                                       "mean": 0.5, "std": 2.0}  # fmt: skip
    Path(path, "config.json").write_text(json.dumps(config, default=str))
    plain = values(model)
    check(load_scorer(path), lambda ids: (plain(ids) - 0.5) / 2.0)


# Several adapters, and bases that are elsewhere.


def two_adapters():
    model = adapted("TOKEN_CLS")
    model.add_adapter("second", lora(task_type="TOKEN_CLS", r=2))
    adapters.randomise(model, 7, of="second")
    return model.eval()


def test_several_adapters_in_one_folder():
    model = two_adapters()
    path = saved(model)
    check(load_scorer(path, "verl-critic"), values(model), steps=2)
    check(load_scorer(path, "verl-critic", adapter="default"), values(model), steps=2)
    model.set_adapter("second")
    for given in (Adapted(path, "second"), f"{path}/second"):
        check(load_scorer(given, "verl-critic"), values(model), steps=2)
    with pytest.raises(ValueError, match="has no adapter 'third': expected default or second"):
        load_scorer(path, "verl-critic", adapter="third")


def test_a_folder_of_adapters_alone():
    path = adapters.folder()
    model = adapted("TOKEN_CLS")
    model.save_pretrained(path / "checkpoint-10")
    check(load_scorer(path, "verl-critic"), values(model), steps=1)
    model.save_pretrained(path / "checkpoint-20")
    with pytest.raises(ValueError, match="has 2 adapters, checkpoint-10, checkpoint-20: pass adap"):
        load_scorer(path, "verl-critic")
    check(load_scorer(path, "verl-critic", adapter="checkpoint-20"), values(model), steps=1)


def test_a_base_that_moved(tmp_path):
    model = adapted("TOKEN_CLS")
    path = rewrite(saved(model), base_model_name_or_path="/no/such/base")
    with pytest.raises(ValueError, match="is a PEFT adapter on /no/such/base, which cannot be read "
                       ".*pass the base, where it is, as the model"):  # fmt: skip
        load_scorer(path, "verl-critic")
    check(load_scorer(LM, "verl-critic", adapter=path), values(model), steps=2)
    check(load_scorer(Adapted(LM, path), "verl-critic"), values(model), steps=2)
    with pytest.raises(ValueError, match=r"has no such adapter in it, and it is no folder or Hub"):
        load_scorer(LM, "verl-critic", adapter=str(tmp_path))
    other = saved(model)
    with pytest.raises(ValueError, match="is a PEFT adapter itself, and was given with another"):
        load_scorer(path, "verl-critic", adapter=other)
    with pytest.raises(ValueError, match="with 2 adapters, .*: expected one for a model in files"):
        load_scorer(Adapted(LM, [path, other]), "verl-critic")


def test_an_adapter_of_an_adapter():
    path = rewrite(saved(adapted("TOKEN_CLS")), base_model_name_or_path=saved(adapted("CAUSAL_LM")))
    with pytest.raises(
        ValueError, match="which cannot be read here .*is a PEFT adapter .*merge it"
    ):
        load_scorer(path, "verl-critic")


def test_tokens_that_were_added():
    base = adapters.base_of("TOKEN_CLS", LM)
    base.resize_token_embeddings(models.VOCAB + 6, mean_resizing=False)
    config = lora(task_type="TOKEN_CLS", modules_to_save=["embed_tokens"])
    model = peft.get_peft_model(base, config)
    adapters.randomise(model, 1)
    scorer = load_scorer(saved(model.eval()), "verl-critic")
    assert scorer.vocab_size == models.VOCAB + 6
    got = scorer.score([[5, models.VOCAB + 2]], torch.tensor([[models.VOCAB + 5]])).values
    assert got.item() == pytest.approx(
        values(model)([5, models.VOCAB + 2, models.VOCAB + 5]), abs=1e-4
    )


def test_what_is_loaded_leaves_the_random_numbers_alone():
    path = saved(adapted("TOKEN_CLS"))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load_causal_lm(saved(adapted("CAUSAL_LM")))
    torch.manual_seed(3)
    load_scorer(path, "verl-critic")
    assert torch.equal(torch.rand(2), expected)


# What is refused.


def test_without_peft_the_command_that_brings_it_is_named(monkeypatch):
    path = saved(adapted("TOKEN_CLS"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'guided-decode\[peft\]'"):
        load_scorer(path, "verl-critic")


def test_prompts_that_are_no_tokens():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = adapted("CAUSAL_LM", config=config)
    for given in (saved(model), model):
        with pytest.raises(
            ValueError, match="of type PROMPT_TUNING that puts virtual tokens before"
        ):
            load_scorer(given, "implicit", reference=LM)


def test_adapters_that_act_from_some_token_on():
    model = adapted("CAUSAL_LM", config=lora(alora_invocation_tokens=[5, 6]))
    for given in (saved(model), model):
        with pytest.raises(ValueError, match=r"LORA that acts from certain tokens on only .aLoRA."):
            load_scorer(given, "implicit", reference=LM)


def test_an_adapter_of_another_base():
    path = rewrite(
        saved(adapted("TOKEN_CLS")),
        base_model_name_or_path=models.saved("llama", "lm", hidden_size=32),
    )
    with pytest.raises(ValueError, match="score.weight of shape .1, 48.: expected .labels, 32."):
        load_scorer(path, "verl-critic")
    path = rewrite(
        saved(adapted("CAUSAL_LM")),
        base_model_name_or_path=models.saved("llama", "lm", intermediate_size=64),
    )
    with pytest.raises(ValueError, match="its adapter does not fit its base .*size mismatch"):
        load_scorer(path, "implicit", reference=LM)
    path = rewrite(
        saved(adapted("CAUSAL_LM")),
        base_model_name_or_path=models.saved("llama", "lm", num_hidden_layers=1),
    )
    with pytest.raises(
        ValueError, match="has weights that its base has no place for: model.layers.1"
    ):
        load_scorer(path, "implicit", reference=LM)


def test_an_adapter_that_lacks_weights():
    path = saved(adapted("TOKEN_CLS"))
    weights = load_file(f"{path}/adapter_model.safetensors")
    gone = next(name for name in weights if "layers.1.self_attn.q_proj.lora_B" in name)
    save_file({n: w for n, w in weights.items() if n != gone}, f"{path}/adapter_model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(
        ValueError, match="lacks weights of its adapter: .*layers.1.self_attn.q_proj"
    ):
        load_scorer(path, "verl-critic")


def test_an_adapter_in_pickles_and_one_without_weights():
    model = adapted("TOKEN_CLS")
    path = adapters.folder()
    model.save_pretrained(path, safe_serialization=False)
    with pytest.raises(
        ValueError, match="its adapter in adapter_model.bin, a pickle: expected ada"
    ):
        load_scorer(path, "verl-critic")
    check(load_scorer(path, "verl-critic", allow_pickle=True), values(model), steps=1)
    (path / "adapter_model.bin").unlink()
    with pytest.raises(
        ValueError, match="has an adapter_config.json and no adapter: expected adap"
    ):
        load_scorer(path, "verl-critic")


def test_an_adapter_and_a_whole_model_in_one_folder(tmp_path):
    model = adapted("SEQ_CLS")
    models.tiny("llama", "sequence").save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a PEFT adapter .* with a whole model .* beside it"):
        load_scorer(tmp_path)


def test_broken_configs(tmp_path):
    path = saved(adapted("TOKEN_CLS"))
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a PEFT adapter whose .* names no base model"):
        load_scorer(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[1")
    with pytest.raises(ValueError, match="cannot be read as an adapter's config in JSON"):
        load_scorer(tmp_path)
