"""Adapters on quantised bases: they stay in their layers, and score as PEFT's own forward does."""

import pytest
import torch
import transformers as tf

from guided_decode import load_scorer
from guided_decode.checkpoints.adapter_layers import has_adapters
from guided_decode.checkpoints.quantised_layers import is_plain, settle_bitsandbytes
from tests import adapters
from tests.adapters import check, lora, randomise, saved, values
from tests.checkpoints.quantised_models import by_transformers, config_of, folder, needs

peft = adapters.peft


def adapted(base):
    """An adapter in the layers of a critic that transformers has quantised."""
    model = peft.get_peft_model(base, lora(task_type="TOKEN_CLS"))
    randomise(model, 1)
    return model.eval()


def check_unmerged(scorer, model):
    trunk = scorer.model.model
    assert has_adapters(trunk)
    layer = trunk.layers[0].self_attn.q_proj
    assert not layer.merged
    assert not is_plain(layer.base_layer.weight)
    head = model.base_model.model.score.modules_to_save["default"]
    assert torch.equal(scorer.head.weight, head.weight)
    check(scorer, values(model))


@pytest.mark.parametrize("name", [
    pytest.param("bnb-4bit", marks=needs("bitsandbytes")),
    pytest.param("int8", marks=needs("torchao")),
])  # fmt: skip
def test_an_adapter_on_a_quantised_base_is_not_merged(name, tmp_path):
    path = folder("llama")
    model = adapted(by_transformers(path, config_of(name)))
    check_unmerged(load_scorer(saved(model), "verl-critic", quantization=name), model)
    check_unmerged(load_scorer(model, "verl-critic"), model)
    # A base that was saved quantised, which nothing has to be said of.
    by_transformers(path, config_of(name)).save_pretrained(tmp_path)
    base = tf.AutoModelForTokenClassification.from_pretrained(tmp_path, dtype=torch.float32)
    settle_bitsandbytes(base, "the base")
    stored = adapted(base)
    check_unmerged(load_scorer(tmp_path, "verl-critic", adapter=saved(stored)), stored)
