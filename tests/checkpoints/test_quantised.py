"""Quantised critics: packed scores are those of the same quantised module, whose head is not."""

import copy
import json
import logging

import pytest
import torch
import transformers as tf

from guided_decode import load_scorer
from guided_decode.checkpoints import quantization
from guided_decode.checkpoints.quantised_layers import is_plain
from tests.checkpoints.quantised_models import (
    assert_close,
    assert_scored_by,
    brute_force,
    by_transformers,
    config_of,
    critic,
    folder,
    growing_and_forking,
    needs,
)

bnb = needs("bitsandbytes")
ao = needs("torchao")
ON_A_CPU = [
    pytest.param("bnb-4bit", "Linear4bit", marks=bnb),
    pytest.param("bnb-8bit", "Linear8bitLt", marks=bnb),
    pytest.param("int8", "Linear", marks=ao),
]
ROWS, CANDIDATES = [[5, 6, 7], [8, 9]], torch.tensor([[3, 4], [10, 11]])


def first_layer(scorer):
    return scorer.model.model.layers[0].mlp.up_proj


@pytest.mark.parametrize("arch", ["llama", "mistral"])
@pytest.mark.parametrize(("name", "layer"), ON_A_CPU)
def test_a_critic_that_is_quantised_while_it_loads(name, layer, arch):
    scorer = load_scorer(folder(arch), "ppo-critic", quantization=name)
    own = first_layer(scorer)
    assert type(own).__name__ == layer
    assert not is_plain(own.weight)
    # The head that the checkpoint has, bit for bit.
    assert torch.equal(scorer.head.weight, critic(arch).score.weight)
    model = by_transformers(folder(arch), config_of(name))
    assert_scored_by(scorer, model, rounded=name == "bnb-8bit")


@pytest.mark.parametrize(("name", "layer"), ON_A_CPU)
def test_a_critic_that_was_saved_quantised(name, layer, tmp_path):
    by_transformers(folder("llama"), config_of(name)).save_pretrained(tmp_path)
    scorer = load_scorer(tmp_path, "ppo-critic")
    assert type(first_layer(scorer)).__name__ == layer
    # Reading it back is what transformers makes of it.
    stock = tf.AutoModelForTokenClassification.from_pretrained(tmp_path, dtype=torch.float32)
    for module in stock.modules():
        module.support_avx512bf16_for_cpu = False
    assert_scored_by(scorer, stock, rounded=name == "bnb-8bit")


@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize(("name", "layer"), ON_A_CPU)
def test_a_quantised_critic_in_memory_shares_its_weights(name, layer, ran_before):
    mine = by_transformers(folder("llama"), config_of(name))
    reference = copy.deepcopy(mine)
    rows, candidates = next(growing_and_forking())
    expected, _ = brute_force(reference, rows, candidates)
    if ran_before:
        brute_force(mine, rows, candidates)
    scorer = load_scorer(mine, "ppo-critic")
    assert_close(scorer.score(rows, candidates).values, expected, rounded=name == "bnb-8bit")
    packed = getattr(first_layer(scorer).weight, "qdata", first_layer(scorer).weight)
    theirs = mine.model.layers[0].mlp.up_proj.weight
    assert packed.data_ptr() == getattr(theirs, "qdata", theirs).data_ptr()
    # The caller's model answers as before, and the scorer after that as well.
    again, _ = brute_force(mine, rows, candidates)
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-6)
    assert_scored_by(scorer, reference, rounded=name == "bnb-8bit")
    assert scorer.model.changes == 0


@pytest.mark.parametrize(("name", "layer"), ON_A_CPU)
def test_other_quantised_weights_are_followed(name, layer):
    mine = by_transformers(folder("llama"), config_of(name))
    scorer = load_scorer(mine, "ppo-critic")
    scorer.score(ROWS, CANDIDATES)
    other = by_transformers(folder("mistral"), config_of(name))
    mine.model.layers[1].mlp.down_proj = other.model.layers[1].mlp.down_proj
    assert_scored_by(scorer, mine, rounded=name == "bnb-8bit")
    assert scorer.model.changes == 1


@bnb
def test_what_is_scored_together_does_not_change_a_score_in_8_bits(caplog, tmp_path):
    """LLM.int8's outliers are found over all tokens of a forward: it is run without them."""
    outliers = tf.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["score"])
    mine = by_transformers(folder("llama"), outliers)
    rows, candidates = list(growing_and_forking())[-1]
    with caplog.at_level(logging.WARNING, logger="guided_decode"):
        scorer = load_scorer(mine, "ppo-critic")
    assert "llm_int8_threshold is taken as 0" in caplog.text
    together = scorer.score(rows, candidates).values
    scorer.cache.clear()
    alone = [scorer.score([row], own[None]).values[0]
             for row, own in zip(rows, candidates, strict=True)]  # fmt: skip
    assert_close(together, torch.stack(alone), rounded=True)
    assert mine.model.layers[0].mlp.up_proj.state.threshold == 6.0
    assert_scored_by(scorer, by_transformers(folder("llama"), config_of("bnb-8bit")), rounded=True)


@bnb
def test_a_quantization_config_of_transformers():
    config = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    scorer = load_scorer(folder("llama"), "ppo-critic", quantization=config)
    assert first_layer(scorer).weight.quant_type == "fp4"
    assert config.llm_int8_skip_modules is None
    stock = tf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", llm_int8_skip_modules=["score"]
    )
    assert_scored_by(scorer, by_transformers(folder("llama"), stock))


@bnb
def test_modules_that_a_config_leaves_alone_are_named_as_in_the_whole_class(tmp_path):
    kept = ["model.layers.0", "score"]
    config = tf.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    quantised = by_transformers(folder("llama"), config)
    quantised.save_pretrained(tmp_path)
    for given in (
        {"model": folder("llama"), "quantization": config},
        {"model": tmp_path},
        {"model": quantised},
    ):
        trunk = load_scorer(kind="ppo-critic", **given).model.model
        layers = [type(layer.mlp.up_proj).__name__ for layer in trunk.layers]
        assert layers[1] == "Linear8bitLt"
        assert layers[0] in ("Linear", "OneDnnLinear")


@ao
def test_a_pair_of_language_models_keeps_its_output_embeddings():
    scorer = load_scorer(
        folder("llama", "lm"), "implicit", reference=folder("mistral", "lm"), quantization="int8"
    )
    tuned, base = (by_transformers(folder(arch, "lm"), quantization.QUANTIZATIONS["int8"].config(
        torch.float32), auto=tf.AutoModelForCausalLM) for arch in ("llama", "mistral"))  # fmt: skip
    assert is_plain(tuned.lm_head.weight)
    ids = torch.tensor([[5, 6, 7]])
    wanted = (tuned(ids).logits.log_softmax(-1) - base(ids).logits.log_softmax(-1))[0, -1]
    got = scorer.score([[5, 6, 7]], torch.tensor([[3, 4, 90]])).values[0]
    torch.testing.assert_close(got, wanted[[3, 4, 90]], rtol=0, atol=1e-4)


@ao
def test_companions_are_quantised_but_those_in_memory():
    reward = critic("llama", "sequence")
    options = {"quantization": "int8", "kind": "ppo-critic"}
    by_name = load_scorer(folder("llama"), reward=folder("llama", "sequence"), **options)
    assert not is_plain(by_name.reward.model.model.layers[0].mlp.up_proj.weight)
    in_memory = load_scorer(folder("llama"), reward=reward, **options)
    assert is_plain(in_memory.reward.model.model.layers[0].mlp.up_proj.weight)


@needs("compressed_tensors")
def test_a_checkpoint_of_compressed_tensors(tmp_path):
    """FP8 a channel, as llm-compressor writes it; all linear layers but the head."""
    from safetensors.torch import load_file, save_file

    model = critic("llama")
    model.save_pretrained(tmp_path)
    left = copy.deepcopy(model)
    weights = load_file(tmp_path / "model.safetensors")
    for name, weight in list(weights.items()):
        if "_proj" in name:
            scale = weight.abs().amax(-1, keepdim=True) / 448
            weights[name] = (weight / scale).to(torch.float8_e4m3fn)
            weights[f"{name}_scale"] = scale
            left.get_parameter(name).copy_(weights[name].float() * scale)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    numbers = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel",
               "dynamic": False}  # fmt: skip
    settings = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": numbers}},
        "ignore": ["score"],
    }
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    assert_scored_by(load_scorer(tmp_path, "ppo-critic"), left)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["nf4", "4bit", 4, {"load_in_4bit": True}])
def test_unknown_names_list_the_known(given):
    known = "expected one of bnb-4bit, bnb-8bit, int8, int4, fp8, or a quantization config"
    with pytest.raises(ValueError, match=f"quantization=.*: {known}"):
        load_scorer(folder("llama"), "ppo-critic", quantization=given)


@pytest.mark.parametrize(
    ("name", "module", "line"),
    [
        ("bnb-4bit", "bitsandbytes", "pip install 'guided-decode[bitsandbytes]'"),
        ("bnb-8bit", "accelerate", "pip install 'guided-decode[bitsandbytes]'"),
        ("int8", "torchao", "pip install 'guided-decode[torchao]'"),
        ("fp8", "torchao", "pip install 'guided-decode[torchao]'"),
    ],
)
def test_a_missing_library_is_named_with_the_line_that_brings_it(name, module, line, monkeypatch):
    there = quantization.find_spec
    monkeypatch.setattr(
        quantization, "find_spec", lambda one: None if one == module else there("json")
    )
    with pytest.raises(ValueError, match="is not installed") as refused:
        load_scorer(folder("llama"), "ppo-critic", quantization=name)
    assert isinstance(refused.value, ImportError)
    assert f"quantization={name!r} needs {module}, which is not installed: {line}" in str(
        refused.value
    )


def test_a_stored_quantisation_whose_library_is_missing(tmp_path, monkeypatch):
    model = copy.deepcopy(critic("llama", "sequence"))
    model.save_pretrained(tmp_path)
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    monkeypatch.setattr(quantization, "find_spec", lambda one: None)
    with pytest.raises(ValueError, match=r"is quantised .bitsandbytes, 4 bits., which needs bitsa"):
        load_scorer(tmp_path)
    settings["quant_method"] = "bitnet-9000"
    del settings["load_in_4bit"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(ValueError, match=r"by bitnet-9000, which this transformers does not read"):
        load_scorer(tmp_path)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        pytest.param("bnb-8bit", {"load_in_8bit": True}, marks=bnb),
        pytest.param("bnb-4bit", {"load_in_4bit": True}, marks=bnb),
        pytest.param("int8", None, marks=ao),
    ],
)
def test_a_quantised_head_is_refused(name, config, tmp_path):
    settings = tf.BitsAndBytesConfig(**config) if config else quantization.QUANTIZATIONS[
        name].config(torch.float32)  # fmt: skip
    model = by_transformers(folder("llama"), settings)
    with pytest.raises(ValueError, match=r"has its head score quantised .*\['score'\] as llm_int8"):
        load_scorer(model, "ppo-critic")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has its head score quantised .*a checkpoint that was"):
        load_scorer(tmp_path, "ppo-critic")


@ao
def test_nothing_is_quantised_twice_or_in_memory(tmp_path):
    with pytest.raises(ValueError, match=r"a model in memory: weights are quantised while they"):
        load_scorer(critic("llama"), "ppo-critic", quantization="int8")
    by_transformers(folder("llama"), config_of("int8")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is quantised already .torchao., and quantization='int8"):
        load_scorer(tmp_path, "ppo-critic", quantization="int8")


@needs("accelerate")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has kernels for it")
def test_what_a_library_says_of_a_config_is_not_taken_for_a_misfit():
    config = tf.FineGrainedFP8Config()
    with pytest.raises(
        ValueError, match=r"cannot be loaded quantised as it was asked .* GPU .*; p"
    ):
        load_scorer(folder("llama"), "verl-critic", quantization=config)


@ao
def test_quantised_weights_in_memory_stay_in_their_dtype():
    model = by_transformers(folder("llama"), config_of("int8"))
    with pytest.raises(ValueError, match=r"computes in float32: it was asked for in bfloat16 on"):
        load_scorer(model, "ppo-critic", dtype="bfloat16")


@ao
@pytest.mark.parametrize("name", ["int4", "fp8"])
def test_what_needs_a_gpu_says_so(name):
    with pytest.raises(ValueError, match=r"has kernels for GPUs only.* bnb-4bit, bnb-8bit, int8"):
        load_scorer(folder("llama"), "ppo-critic", quantization=name, device="cpu")


# -- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("int4", marks=ao),
        pytest.param("fp8", marks=ao),
        pytest.param("int8", marks=ao),
        pytest.param("bnb-4bit", marks=bnb),
        pytest.param("bnb-8bit", marks=bnb),
    ],
)
def test_on_a_gpu(name):
    if name == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU of compute capability 8.9 or newer")
    scorer = load_scorer(
        folder("llama"), "ppo-critic", quantization=name, device="cuda", dtype="bfloat16"
    )
    assert not is_plain(first_layer(scorer).weight)
    assert scorer.model.model.dtype == torch.bfloat16
    stock = tf.AutoModelForTokenClassification.from_pretrained(
        folder("llama"), quantization_config=config_of(name, torch.bfloat16),
        dtype=torch.bfloat16, device_map={"": "cuda"},
    ).eval()  # fmt: skip
    rows, candidates = next(growing_and_forking())
    got = scorer.score(rows, candidates).values.cpu()
    weight = stock.score.weight[0].float()
    for row, own, values in zip(rows, candidates, got, strict=True):
        ids = torch.tensor([[*row, token] for token in own.tolist()], device="cuda")
        hidden = stock.base_model(ids).last_hidden_state[:, -1].float()
        wanted = (hidden @ weight).cpu()
        assert (values - wanted).norm() <= 0.05 * wanted.norm()
