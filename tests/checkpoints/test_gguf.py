"""GGUF files: critics whose head lies beside, policies under a trunk head, references, pairs."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import save_file

from guided_decode import load_scorer
from guided_decode.checkpoints import gguf_weights, quantization
from guided_decode.checkpoints.tokenizer_files import tokenizer_place
from guided_decode.scoring.trunk_head import TrunkHead, save_trunk_head
from tests.checkpoints.gguf_files import write_gguf
from tests.checkpoints.quantised_models import assert_scored_by, critic, folder, needs
from tests.models import VOCAB

pytestmark = needs("gguf", "accelerate")
ROWS, CANDIDATES = [[5, 6, 7], [8, 9]], torch.tensor([[3, 4], [10, 11]])


def with_weights(model, weights):
    """The stock class on the weights that are in a file."""
    own = copy.deepcopy(model)
    own.load_state_dict({**own.state_dict(), **weights})
    return own


def beside(path, arch, head="token", *files):
    """Copies files of a checkpoint to a folder."""
    for file in files:
        shutil.copy(Path(folder(arch, head)) / file, path)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
@pytest.mark.parametrize("arch", ["llama", "mistral", "mistral-sliding"])
def test_a_critic_with_its_head_in_the_checkpoint_that_it_was_converted_from(arch, kind, tmp_path):
    left = write_gguf(tmp_path / "critic.gguf", critic(arch), kind)
    if arch != "llama":
        # llama.cpp calls a Mistral a Llama: its config.json says what it is.
        beside(tmp_path, arch, "token", "config.json")
    scorer = load_scorer(tmp_path / "critic.gguf", "ppo-critic", head=folder(arch))
    assert type(scorer.model.model) is type(critic(arch).model)
    assert torch.equal(scorer.head.weight, critic(arch).score.weight)
    stock = with_weights(critic(arch), left)
    assert not torch.equal(stock.model.layers[0].mlp.up_proj.weight,
                           critic(arch).model.layers[0].mlp.up_proj.weight)  # fmt: skip
    assert_scored_by(scorer, stock)


def heads(tmp_path, where):
    """A critic's head in one of the places where it may be; the arguments that go with it."""
    head = {"score.weight": critic("llama").score.weight.clone()}
    if where == "a folder's value_head.safetensors":
        save_file(head, tmp_path / "value_head.safetensors")
    elif where == "the checkpoint in the same folder":
        beside(tmp_path, "llama", "token", "model.safetensors", "config.json")
    elif where == "a file of its own":
        save_file(head, tmp_path / "of the critic.safetensors")
        return {"head": tmp_path / "of the critic.safetensors"}
    return {}


@pytest.mark.parametrize(
    "where",
    ["a folder's value_head.safetensors", "the checkpoint in the same folder",
     "a file of its own", "the file itself", "the file itself, as llama.cpp calls it"],
)  # fmt: skip
def test_where_a_critics_head_may_be(where, tmp_path):
    name = {"the file itself": "score.weight",
            "the file itself, as llama.cpp calls it": "cls.output.weight"}.get(where)  # fmt: skip
    inside = (name, critic("llama").score.weight, "F32") if name else None
    left = write_gguf(tmp_path / "c.Q8_0.gguf", critic("llama"), head=inside)
    more = heads(tmp_path, where)
    scorer = load_scorer(tmp_path, "ppo-critic", gguf_file="c.Q8_0.gguf", **more)
    assert_scored_by(scorer, with_weights(critic("llama"), left))


def test_a_head_that_is_given_wins_over_those_in_and_beside_the_file(tmp_path):
    write_gguf(tmp_path / "c.gguf", critic("llama"), head=("score.bias", torch.ones(1), "F32"))
    weight = critic("llama").score.weight.clone()
    save_file({"v_head.summary.weight": weight * 2}, tmp_path / "value_head.safetensors")
    save_file({"score.weight": weight}, tmp_path / "own.safetensors")
    head = load_scorer(tmp_path / "c.gguf", "value-head", head=tmp_path / "own.safetensors").head
    assert torch.equal(head.weight, weight)
    assert head.bias is None
    with pytest.raises(ValueError, match="has no head that value-head expects"):
        load_scorer(tmp_path / "c.gguf", "value-head", head=folder("llama", "lm"))


def test_a_pickled_head_has_to_be_allowed(tmp_path):
    write_gguf(tmp_path / "c.gguf", critic("llama"))
    weight, pickle = critic("llama").score.weight.detach().clone(), tmp_path / "head.bin"
    torch.save({"score.weight": weight}, pickle)
    with pytest.raises(ValueError, match="is a pickle: expected a safetensors file; .* allow_pick"):
        load_scorer(tmp_path / "c.gguf", "value-head", head=pickle)
    allowed = load_scorer(tmp_path / "c.gguf", "value-head", head=pickle, allow_pickle=True)
    assert torch.equal(allowed.head.weight, weight)


def test_a_file_of_another_class_than_its_header_says_lies_on_one_device(tmp_path, monkeypatch):
    write_gguf(tmp_path / "c.gguf", critic("mistral"))
    beside(tmp_path, "mistral", "token", "config.json")

    def spread(model, report):
        model.base_model.layers[1].to("meta")
        return model.base_model, {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": []}

    monkeypatch.setattr(gguf_weights, "of_trunk", spread)
    with pytest.raises(ValueError, match="is a mistral by the config.json .* drop device_map"):
        load_scorer(tmp_path / "c.gguf", "verl-critic", head=folder("mistral"))


def test_a_reward_model_is_known_by_the_config_beside_it(tmp_path):
    model = critic("llama", "sequence")
    left = write_gguf(tmp_path / "rm.gguf", model)
    beside(tmp_path, "llama", "sequence", "config.json")
    scorer = load_scorer(tmp_path / "rm.gguf", head=folder("llama", "sequence"))
    assert scorer.terminal == "critic"
    assert_scored_by(scorer, with_weights(model, left))


def test_a_pair_of_language_models_and_a_reference(tmp_path):
    models, stock = {}, {}
    for arch in ("llama", "mistral"):
        models[arch] = tmp_path / f"{arch}.gguf"
        stock[arch] = with_weights(
            critic(arch, "lm"), write_gguf(models[arch], critic(arch, "lm"), "Q8_0")
        )
    scorer = load_scorer(models["llama"], "implicit", reference=str(models["mistral"]))
    ids = torch.tensor([[5, 6, 7]])
    tuned, base = (stock[arch](ids).logits.log_softmax(-1)[0, -1] for arch in stock)
    got = scorer.score([[5, 6, 7]], torch.tensor([[3, 4, 90]])).values[0]
    torch.testing.assert_close(got, (tuned - base)[[3, 4, 90]], rtol=0, atol=1e-4)
    beside_it = load_scorer(folder("llama"), "ppo-critic", reference=models["mistral"])
    of_kl = beside_it.reference.log_probs([[5, 6, 7]], torch.tensor([[3, 4, 90]]))[0]
    torch.testing.assert_close(of_kl, base[[3, 4, 90]], rtol=0, atol=1e-4)


def test_a_head_on_a_policys_trunk(tmp_path):
    """Its fingerprint is of the weights before they were quantised: sizes are all that can tell."""
    from guided_decode.checkpoints.trunk_head_identity import record_trunk

    policy = critic("llama", "lm")
    left = write_gguf(tmp_path / "policy.gguf", policy)
    weight = torch.randn(1, 128, generator=torch.Generator().manual_seed(3))
    head = TrunkHead(weight, trunk=record_trunk(policy.model, "the policy"))
    save_trunk_head(tmp_path / "trunk_head.safetensors", head)
    scorer = load_scorer(tmp_path / "policy.gguf", head=tmp_path / "trunk_head.safetensors")
    trunk = with_weights(policy, left).model
    wanted = trunk(torch.tensor([[5, 6, 7, 9]])).last_hidden_state[0, -1] @ weight[0]
    got = scorer.score([[5, 6, 7]], torch.tensor([[9]])).values.item()
    assert got == pytest.approx(float(wanted), abs=1e-4)


def test_output_embeddings_that_are_the_inputs(tmp_path):
    tied = critic("llama", "lm", tie_word_embeddings=True)
    write_gguf(tmp_path / "tied.gguf", _without_output(tied), "F32")
    scorer = load_scorer(tmp_path / "tied.gguf", "implicit", reference=folder("mistral", "lm"))
    lm = scorer._tuned.model.model
    assert lm.lm_head.weight.data_ptr() == lm.model.embed_tokens.weight.data_ptr()


def _without_output(model):
    class Trunk:
        config = model.config

        def state_dict(self):
            return {n: w for n, w in model.state_dict().items() if n != "lm_head.weight"}

    return Trunk()


def test_dtype_and_rope(tmp_path):
    write_gguf(tmp_path / "c.gguf", critic("llama"))
    scorer = load_scorer(
        tmp_path / "c.gguf", "ppo-critic", head=folder("llama"), dtype="bf16", rope_theta=500.0
    )
    assert scorer.model.model.dtype == torch.bfloat16
    assert scorer.model.model.config.rope_parameters["rope_theta"] == 500.0


def test_the_tokenizer_in_a_file_is_the_scorers(tmp_path):
    """It is compared with the policy's, whose ids differ by one here."""
    tokens = ["<unk>", "<s>", "</s>", *(f"▁w{i}" for i in range(VOCAB - 3))]
    path = tmp_path / "c.gguf"
    write_gguf(path, critic("llama"), vocabulary=tokens)
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path, gguf_file="c.gguf")
    assert tokenizer.convert_ids_to_tokens([2, 3]) == ["</s>", "▁w0"]
    # The policy's, as it should be: transformers 5.16 takes BOS for EOS there.
    tokenizer.eos_token = "</s>"
    assert tokenizer_place(str(path), None) == (str(tmp_path), {"gguf_file": "c.gguf"})
    options = {"kind": "ppo-critic", "head": folder("llama")}
    scorer = load_scorer(path, policy_tokenizer=tokenizer, **options)
    # The family drops a BOS, which is the tokenizer's.
    assert (scorer.skip_token, scorer.eos_token_id) == (1, 2)
    other = tmp_path / "other"
    other.mkdir()
    write_gguf(other / "c.gguf", critic("llama"), vocabulary=[*tokens[:3], *tokens[4:], tokens[3]])
    with pytest.raises(ValueError, match="token"):
        load_scorer(other / "c.gguf", policy_tokenizer=tokenizer, **options)


# -- what is refused ------------------------------------------------------------------------------


def test_a_file_without_a_head(tmp_path):
    write_gguf(tmp_path / "c.gguf", critic("llama"))
    with pytest.raises(ValueError, match=r"a GGUF file has a trunk only: pass head=, the checkpoi"):
        load_scorer(tmp_path / "c.gguf", "ppo-critic")
    with pytest.raises(ValueError, match=r"head came as Tensor for the GGUF file .*: expected the"):
        load_scorer(tmp_path / "c.gguf", "ppo-critic", head=torch.ones(1, 128))


def test_a_quantised_head_in_a_file(tmp_path):
    score = critic("llama").score.weight.repeat(2, 1)
    write_gguf(tmp_path / "c.gguf", critic("llama"), head=("score.weight", score, "Q8_0"))
    with pytest.raises(ValueError, match=r"has its head score quantised .uint8.: expected full"):
        load_scorer(tmp_path / "c.gguf", "ppo-critic", transform="softmax:1")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gguf_file": "other.gguf"}, r"has no other.gguf: expected one of its GGUF files .c.gguf"),
        ({}, r"no config.json but c.gguf: pass gguf_file='c.gguf', or the path"),
        ({"model": "c.gguf", "gguf_file": "c.gguf"}, "which is a GGUF file itself: expected a"),
        ({"model": "none.gguf"}, "none.gguf: no such file; pass the path of a GGUF file"),
        ({"model": "c.gguf", "quantization": "bnb-4bit"},
         "is a GGUF file, whose weights are quantised already, and quantization='bnb-4bit' was"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(given, message, tmp_path, monkeypatch):
    write_gguf(tmp_path / "c.gguf", critic("llama"), head=(
        "score.weight", critic("llama").score.weight, "F32"))  # fmt: skip
    monkeypatch.setattr(quantization, "find_spec", lambda name: True)
    model = tmp_path / given.pop("model") if "model" in given else tmp_path
    with pytest.raises(ValueError, match=message):
        load_scorer(model, "ppo-critic", **given)


def test_a_file_that_is_none_and_a_file_in_parts(tmp_path):
    (tmp_path / "c.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"c.gguf cannot be read as a GGUF file"):
        load_scorer(tmp_path / "c.gguf", "ppo-critic")
    write_gguf(tmp_path / "p.gguf", critic("llama"), fields={"split.count": 3})
    with pytest.raises(ValueError, match=r"is one of 3 parts.* llama-gguf-split --merge"):
        load_scorer(tmp_path / "p.gguf", "ppo-critic")


def test_a_missing_library(tmp_path, monkeypatch):
    write_gguf(tmp_path / "c.gguf", critic("llama"))
    monkeypatch.setattr(quantization, "find_spec", lambda name: None if name == "gguf" else name)
    with pytest.raises(ValueError, match=r"pip install 'guided-decode\[gguf\]'"):
        load_scorer(tmp_path / "c.gguf", "ppo-critic")


def test_scaled_ropes_need_the_config_of_the_checkpoint(tmp_path):
    """Llama 3.1's frequencies are a tensor of the file, which transformers leaves out."""
    model = critic("llama")
    factors = np.ones(16, np.float32)
    write_gguf(tmp_path / "c.gguf", model, extra={"rope_freqs.weight": torch.from_numpy(factors)})
    options = {"kind": "ppo-critic", "head": folder("llama")}
    with pytest.raises(ValueError, match=r"scaled rope frequencies .* put the config.json"):
        load_scorer(tmp_path / "c.gguf", **options)
    beside(tmp_path, "llama", "token", "config.json")
    assert load_scorer(tmp_path / "c.gguf", **options).vocab_size == VOCAB


def test_a_config_of_another_model_beside_it(tmp_path):
    write_gguf(tmp_path / "c.gguf", critic("llama"))
    beside(tmp_path, "llama", "token", "config.json")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 4}))
    with pytest.raises(ValueError, match=r"num_key_value_heads 2 in its header, and 4 in the conf"):
        load_scorer(tmp_path / "c.gguf", "ppo-critic", head=folder("llama"))


def test_an_architecture_that_transformers_does_not_read(tmp_path):
    write_gguf(tmp_path / "c.gguf", critic("llama"), fields={}, architecture="wavtokenizer-dec")
    with pytest.raises(ValueError, match=r"no GGUF file of the architecture wavtokenizer-dec"):
        load_scorer(tmp_path / "c.gguf", "ppo-critic", head=folder("llama"))
