"""What is no model, or is one of another make: the error says what it is and what to do."""

import pytest
import torch
import transformers as tf
from torch import nn

from guided_decode import load_scorer
from guided_decode.checkpoints.checkpoint import load_causal_lm
from guided_decode.scoring.trunk_head import TrunkHead, save_trunk_head
from tests.models import VOCAB, tiny

SIZES = dict(vocab_size=VOCAB, hidden_size=48, num_hidden_layers=2, num_attention_heads=4)


def test_an_adapters_folder_without_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a PEFT adapter .* names no base model"):
        load_scorer(tmp_path)
    # peft would load it on top of the model that lies beside it.
    tiny("llama", "sequence").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a PEFT adapter"):
        load_scorer(tmp_path)


class Wrapper(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"peft_config": {}},
            "Wrapper was given .* a PEFT adapter .*: pass model.merge_and_unload",
        ),
        (
            {"pretrained_model": nn.Identity()},
            "in a wrapper: save it with save_pretrained and pass",
        ),
        ({}, "a Wrapper was given as a model: expected a name, a path or a transformers Pre"),
    ],
)
def test_models_in_wrappers(parts, message):
    for given in ({"model": Wrapper(**parts)}, {"model": tiny("llama", "sequence"),
                                                "reward": Wrapper(**parts)}):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_scorer(**given)


def test_a_head_that_peft_has_wrapped():
    model = tf.LlamaForSequenceClassification(tf.LlamaConfig(**SIZES, num_labels=1))
    wrapper = type("ModulesToSaveWrapper", (Wrapper,), {"__module__": "peft.utils.other"})
    model.score = wrapper(modules_to_save=nn.ModuleDict({"default": model.score}))
    with pytest.raises(
        ValueError, match=r"PEFT has wrapped its layers .ModulesToSaveWrapper.: pass"
    ):
        load_scorer(model, "reward-model")


def test_a_trunk_head_where_a_scorer_is_expected(tmp_path):
    save_trunk_head(tmp_path, TrunkHead(torch.ones(1, 48)))
    for given in (tmp_path, tmp_path / "trunk_head.safetensors"):
        with pytest.raises(
            ValueError, match=r"a head on the policy's own trunk .*: pass the policy"
        ):
            load_scorer(given)


def test_gguf_and_other_single_files(tmp_path):
    (tmp_path / "critic.Q4_K_M.gguf").write_bytes(b"GGUF")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no config.json but critic.*: pass gguf_file='critic"):
        load_scorer(tmp_path)
    with pytest.raises(ValueError, match="model.safetensors is a file: expected the folder of a"):
        load_scorer(tmp_path / "model.safetensors")


def test_gpt_neox_is_causal_and_scored():
    torch.manual_seed(0)
    model = tf.GPTNeoXForSequenceClassification(
        tf.GPTNeoXConfig(**SIZES, intermediate_size=72, num_labels=1)
    ).eval()
    for weight in model.parameters():
        weight.data.mul_(5)
    ids = [5, 9, 33, 7]
    hidden = model.gpt_neox(torch.tensor([ids])).last_hidden_state[0, -1]
    want = float((model.score.weight @ hidden).detach())
    got = load_scorer(model, "reward-model").score([ids[:-1]], torch.tensor([ids[-1:]]))
    assert got.values.item() == pytest.approx(want, abs=1e-3)


def test_gpt_2_is_a_causal_language_model():
    lm = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4)).eval()
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(load_causal_lm(lm)(ids).logits, lm(ids).logits)
    head = {"head.weight": torch.ones(1, 48)}
    want = float(lm.transformer(ids).last_hidden_state[0, -1].sum())
    scorer = load_scorer(lm, head=head)
    got = scorer.score([[5, 6]], torch.tensor([[7]])).values.item()
    assert got == pytest.approx(want, abs=1e-3)


# -- dtype and device -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "loaded"),
    [("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("torch.bfloat16", torch.bfloat16),
     ("auto", torch.float32), ("float32", torch.float32)],
)  # fmt: skip
def test_dtypes_by_name(given, loaded):
    scorer = load_scorer(tiny("llama", "sequence"), dtype=given)
    assert scorer.model.model.dtype == loaded


@pytest.mark.parametrize("given", ["int8", torch.int8, 16, "fp8", ["bf16"]])
def test_other_dtypes_are_refused(given):
    with pytest.raises(ValueError, match="dtype=.*: expected one of float32, fp32, bfloat16, bf16"):
        load_scorer(tiny("llama", "sequence"), dtype=given)


@pytest.mark.parametrize(
    ("given", "message"),
    [("auto", "names no device: expected a device of this machine"),
     (["cpu"], "names no device"), ("cuda:99", "cannot be used .*: expected a device of this")],
)  # fmt: skip
def test_devices_that_are_none(given, message):
    with pytest.raises(ValueError, match=message):
        load_scorer(tiny("llama", "sequence"), device=given)


def test_lists_where_a_heads_tensors_are_due():
    with pytest.raises(ValueError, match="came with a list as 'head.weight': expected a tensor"):
        load_scorer(tiny("llama", "lm"), head={"head.weight": [[1.0] * 48]})


def test_a_url_is_told_who_takes_one():
    with pytest.raises(ValueError, match=r"http://host:1 is a URL: .*search.connect_judge"):
        load_scorer("http://host:1")
