"""Bytes of quantised weights against what the libraries make of a real module."""

from pathlib import Path

import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaForTokenClassification

from guided_decode.checkpoints.plan.model import PlannedModel
from guided_decode.checkpoints.plan.shape_of_config import read_config
from guided_decode.checkpoints.plan.weight_forms import BF16, FORMS, find_form
from guided_decode.checkpoints.quantization import QUANTIZATIONS
from tests import models

# Sizes that blocks of 64 and groups of 128 divide, large enough for a row's scales to be few.
SIZES = dict(
    hidden_size=256, intermediate_size=768, num_attention_heads=8, num_key_value_heads=4
)  # fmt: skip


@pytest.fixture(scope="module")
def critic():
    return Path(models.saved("llama", "token", **SIZES))


def held(value):
    """The plain tensors that a weight holds, its scales among them."""
    if hasattr(value, "__tensor_flatten__") and type(value) is not torch.Tensor:
        names, _ = value.__tensor_flatten__()
        return [tensor for name in names for tensor in held(getattr(value, name))]
    return [value]


def measured(module):
    """Bytes of all weights of a module, quantised ones with their scales."""
    found = {}
    for weight in module.parameters():
        state, scales = getattr(weight, "quant_state", None), getattr(weight, "SCB", None)
        tensors = held(weight.data)
        if state is not None:
            tensors += [state.absmax] + ([state.state2.absmax] if state.nested else [])
        if scales is not None:
            tensors.append(scales)
        found.update({tensor.data_ptr(): tensor.nbytes for tensor in tensors})
    return sum(found.values())


def loaded(folder, config):
    return LlamaForTokenClassification.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )


def counted(folder, form):
    shape = read_config(folder / "config.json").shape
    return PlannedModel("critic", "", shape, False, labels=1, head_bias=True).weight_bytes(form)


def test_bf16_is_two_bytes_a_weight(critic):
    module = LlamaForTokenClassification.from_pretrained(critic, dtype=torch.bfloat16)
    assert counted(critic, BF16) == measured(module)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("bnb-8bit", dict(load_in_8bit=True)),
        ("bnb-4bit", dict(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                          bnb_4bit_use_double_quant=True)),
    ],
)  # fmt: skip
def test_bitsandbytes_holds_what_is_counted(name, config, critic):
    pytest.importorskip("bitsandbytes")
    module = loaded(critic, BitsAndBytesConfig(**config))
    assert counted(critic, FORMS[name]) == pytest.approx(measured(module), rel=0.01)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_torchao_holds_what_is_counted(name, critic):
    torchao = pytest.importorskip("torchao.quantization")
    # The dynamic form of fp8, which only GPUs multiply, holds the same weights.
    configs = {"int8": torchao.Int8WeightOnlyConfig, "fp8": torchao.Float8WeightOnlyConfig}
    module = LlamaForTokenClassification.from_pretrained(critic, dtype=torch.bfloat16)
    torchao.quantize_(module.model, configs[name]())
    assert counted(critic, FORMS[name]) == pytest.approx(measured(module), rel=0.01)


def test_a_form_that_is_unknown_is_refused():
    with pytest.raises(ValueError, match="quantization='gptq': expected one of bnb-8bit, int8"):
        find_form("gptq")


def test_the_forms_are_those_that_load_scorer_makes():
    assert set(FORMS) == set(QUANTIZATIONS)
