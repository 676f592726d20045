"""A trunk head in each of its forms, and what is refused because it does not fit."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from guided_decode import load_scorer, tiny_tulu
from guided_decode.checkpoints.checkpoint import load_checkpoint
from guided_decode.checkpoints.families import find_family
from guided_decode.checkpoints.trunk_head_identity import fingerprint, record_trunk
from guided_decode.checkpoints.trunk_head_loading import load_trunk_head, read_trunk_head
from guided_decode.forward import pool_size
from guided_decode.forward.final_norm import take_final_norm
from guided_decode.kernels.norm import rms_norm
from guided_decode.scoring.critic import CriticScorer
from guided_decode.scoring.trunk_head import (
    FILE_NAME,
    METADATA,
    InnerLayer,
    TrunkHead,
    head_of_module,
    save_trunk_head,
)
from guided_decode.scoring.trunk_scorer import TrunkScorer
from tests import models, trunk_heads
from tests.checkpoints.checkpoint_files import write

PROMPTS = models.prompts([5, 12])
CANDIDATES = torch.tensor([[7, 8, -1], [9, 10, 11]])


def assert_scores(scorer, head, policy=None):
    """Values and baselines equal brute force on the policy's trunk."""
    policy = trunk_heads.policy() if policy is None else policy
    brute = trunk_heads.TrunkValues(policy, head=head)
    values, baseline = scorer.score(PROMPTS, CANDIDATES)
    for prompt, tokens, found in zip(PROMPTS, CANDIDATES.tolist(), values, strict=True):
        real = [token for token in tokens if token >= 0]
        wanted = torch.tensor(brute.after(prompt, real))
        torch.testing.assert_close(found[: len(real)], wanted, rtol=0, atol=1e-4)
        assert found[len(real) :].isnan().all()
    torch.testing.assert_close(baseline, torch.tensor(brute(PROMPTS)), rtol=0, atol=1e-4)


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def recorded(head):
    return TrunkHead(head.weight, head.bias, head.inner, head.transform,
                     record_trunk(trunk_heads.policy().base_model, "the policy"))  # fmt: skip


# The forms of a head.


@pytest.mark.parametrize("arch", ["llama", "mistral-sliding", "qwen2", "gemma2", "gemma3"])
def test_a_module(arch):
    scorer = trunk_heads.scorer(arch)
    assert isinstance(scorer, TrunkScorer)
    assert isinstance(scorer, CriticScorer)
    assert (scorer.terminal, scorer.skip_token) == ("baseline", None)
    assert_scores(scorer, trunk_heads.linear(), trunk_heads.policy(arch))


@pytest.mark.parametrize("in_a_folder", [True, False])
@pytest.mark.parametrize("make", [trunk_heads.linear, trunk_heads.two_layers])
def test_our_file(folder, make, in_a_folder):
    path = folder if in_a_folder else folder / "head.safetensors"
    save_trunk_head(path, recorded(head_of_module(make())))
    assert_scores(load_scorer(trunk_heads.policy(), head=path), make())
    assert_scores(load_scorer(models.saved("llama", "lm", seed=1), head=str(path)), make())


def test_the_file_says_what_its_head_was_trained_on(folder):
    save_trunk_head(folder, recorded(head_of_module(trunk_heads.two_layers())))
    with safe_open(folder / FILE_NAME, framework="pt") as opened:
        metadata = json.loads(opened.metadata()[METADATA])
    assert metadata["kind"] == "trunk-head"
    assert (metadata["activation"], metadata["transform"]) == ("gelu", "identity")
    assert metadata["trunk"] == {
        "name": "the policy",
        "model_type": "llama",
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "vocab_size": models.VOCAB,
        "fingerprint": fingerprint(trunk_heads.policy().base_model),
    }


@pytest.mark.parametrize("from_memory", [False, True])
def test_a_token_classifier_of_the_same_trunk(folder, from_memory):
    critic = token_classifier()
    head = nn.Linear(48, 1)
    head.weight.data, head.bias.data = critic.score.weight, critic.score.bias
    given = critic
    if not from_memory:
        critic.save_pretrained(folder)
        given = folder
    scorer = load_scorer(trunk_heads.policy(), kind="trunk-head", head=given)
    assert_scores(scorer, head)


def token_classifier():
    """A critic whose trunk is the policy's."""
    critic = copy.deepcopy(models.tiny("llama", "token", seed=5))
    critic.model.load_state_dict(trunk_heads.policy().model.state_dict())
    return critic


def trl_checkpoint(folder, trunk=True, **tensors):
    """The policy with TRL's value head beside it."""
    policy = trunk_heads.policy()
    head = trunk_heads.linear()
    own = {"v_head.summary.weight": head.weight, "v_head.summary.bias": head.bias} | tensors
    write(folder, policy, add={name: each.contiguous() for name, each in own.items()})
    if not trunk:
        save_file(dict(own), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("trunk", [True, False], ids=["with-trunk", "head-only"])
def test_trls_value_head(folder, trunk):
    scorer = load_scorer(
        trunk_heads.policy(), kind="trunk-head", head=trl_checkpoint(folder, trunk)
    )
    assert_scores(scorer, trunk_heads.linear())


@pytest.mark.parametrize("names", ["head", "v_head.summary", "summary", "score"])
def test_tensors_by_their_names(names):
    head = trunk_heads.linear()
    tensors = {f"{names}.weight": head.weight, f"{names}.bias": head.bias}
    scorer = load_scorer(trunk_heads.policy(), kind="trunk-head", head=tensors)
    assert_scores(scorer, head)


def test_a_value_head_module_of_trls_shape():
    class ValueHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout, self.summary = nn.Dropout(0.1), trunk_heads.linear()

    assert_scores(trunk_heads.scorer(head=ValueHead()), trunk_heads.linear())


def test_a_transform():
    head = trunk_heads.linear()
    scorer = trunk_heads.scorer(transform="sigmoid")
    assert_scores(scorer, nn.Sequential(head, nn.Sigmoid()))


def test_an_untied_bias_may_be_missing(folder):
    head = trunk_heads.linear()
    save_file({"head.weight": head.weight}, folder / "bare.safetensors")
    found = read_trunk_head(folder / "bare.safetensors")
    assert (found.bias, found.trunk, found.inner) == (None, None, None)


def test_a_head_serves_the_two_model_rules():
    reference = models.saved("mistral", "lm", seed=5)
    scorer = trunk_heads.scorer(reward=models.saved("llama", "sequence", seed=7),
                                reference=reference)  # fmt: skip
    assert scorer.terminal == "reward"
    assert scorer.reward is not None
    assert scorer.reference is not None


def test_a_bf16_policy_has_the_fingerprint_of_its_float32_self():
    trunk = trunk_heads.policy().base_model
    rounded = copy.deepcopy(trunk).bfloat16()
    assert fingerprint(rounded) == fingerprint(rounded.float())
    assert fingerprint(copy.deepcopy(trunk).half()) is None
    assert fingerprint(trunk) != fingerprint(models.tiny("llama", "lm", seed=2).base_model)


@pytest.mark.parametrize("arch", list(models.ARCHITECTURES))
def test_the_final_norm_is_taken_off_and_applied_by_the_kernels(arch):
    trunk = copy.deepcopy(models.tiny(arch, "lm", seed=1).base_model)
    x = torch.randn(3, 48)
    expected = trunk.norm(x)
    norm = take_final_norm(trunk)
    torch.testing.assert_close(rms_norm(x, norm), expected)
    assert torch.equal(trunk.norm(x), x)


def test_another_kind_of_norm_stays_where_it_is():
    trunk = copy.deepcopy(trunk_heads.policy().base_model)
    trunk.norm = nn.LayerNorm(48)
    assert take_final_norm(trunk) is None
    assert isinstance(trunk.norm, nn.LayerNorm)


def test_the_family():
    family = find_family("trunk-head")
    assert (family.bos, family.terminal, family.labels) == ("policy", "baseline", (1,))
    assert family.head_apart
    assert family.takes("LlamaForCausalLM")


# What does not fit.


def refused(message, head, policy=None, **options):
    policy = trunk_heads.policy() if policy is None else policy
    with pytest.raises(ValueError, match=message):
        load_scorer(policy, **{"kind": "trunk-head", "head": head} | options)


def test_no_head():
    refused("LlamaForCausalLM was given as trunk-head without a head: pass head=", None)
    with pytest.raises(ValueError, match="whose head comes apart from the policy"):
        load_checkpoint(trunk_heads.policy(), "trunk-head")


def test_a_head_with_a_critic():
    refused('head= was given with kind=.value-head.* expected kind="trunk-head"',
            trunk_heads.linear(), kind="value-head")  # fmt: skip
    refused("is a LlamaForTokenClassification: trunk-head expects the policy itself",
            trunk_heads.linear(), models.tiny("llama", "token"))  # fmt: skip


def test_another_hidden_size():
    refused(r"hidden states of size 40, but those of the policy .* have 48", trunk_heads.linear(40))


def test_several_labels():
    refused("has 3 labels, which identity cannot read: expected one", nn.Linear(48, 3))
    assert trunk_heads.scorer(head=nn.Linear(48, 3), transform="softmax:1").stats.forwards == 0


def test_missing_and_odd_tensors(folder):
    refused("has no head: expected one of head.weight, v_head.summary.weight.* found other",
            {"other": torch.ones(1)})  # fmt: skip
    refused("has no head: expected one of head.weight", models.saved("llama", "lm", seed=1))
    inner = InnerLayer(torch.ones(20, 48), None, "gelu")
    refused(r"head.weight of shape \[1, 9\]: expected \[n, 20\], behind the inner layer",
            TrunkHead(torch.ones(1, 9), None, inner))  # fmt: skip
    refused(r"head.bias of shape \[2\]: expected \[1\]",
            {"head.weight": torch.ones(1, 48), "head.bias": torch.ones(2)})  # fmt: skip
    refused("NaN or infinity in head.weight", {"head.weight": torch.full((1, 48), torch.nan)})


def test_odd_modules():
    refused(r"head came as Sequential\(Linear, Softplus, Linear\): expected nn.Linear, or",
            nn.Sequential(nn.Linear(48, 4), nn.Softplus(), nn.Linear(4, 1)))  # fmt: skip
    refused("head came as int: expected a path", 3)


def test_two_layers_without_an_activation():
    refused("has two layers and activation None: expected one of gelu, relu, silu, tanh",
            {"inner.weight": torch.ones(4, 48), "head.weight": torch.ones(1, 4)})  # fmt: skip


def test_files_that_are_not_there_or_not_ours(folder):
    refused("no such file; pass the path of a trunk head", folder / "head.safetensors")
    refused("expected a folder with a config.json", folder / "nowhere")
    (folder / "head.bin").write_bytes(b"pickle")
    refused("is a .bin file: expected trunk_head.safetensors", folder / "head.bin")
    save_file({"head.weight": torch.ones(1, 48)}, folder / "odd.safetensors",
              metadata={METADATA: json.dumps({"kind": "trunk-head", "version": 9})})  # fmt: skip
    refused("kind 'trunk-head' and version 9 in its metadata: expected 'trunk-head' and 1",
            folder / "odd.safetensors")  # fmt: skip


def test_a_head_of_another_policy(folder):
    save_trunk_head(folder, recorded(head_of_module(trunk_heads.linear())))
    refused("was trained on the policy, whose weights are not those of the policy .*fingerprint",
            folder, models.tiny("llama", "lm", seed=2))  # fmt: skip
    refused("whose model_type is llama, but the policy .* has mistral", folder,
            models.tiny("mistral", "lm", seed=1))  # fmt: skip
    # Whoever knows better passes the tensors themselves.
    tensors = load_file(folder / FILE_NAME)
    assert load_scorer(models.tiny("llama", "lm", seed=2), kind="trunk-head", head=tensors)


@pytest.mark.parametrize("from_memory", [False, True])
def test_a_critic_with_a_trunk_of_its_own(from_memory):
    critic = models.tiny("llama", "token") if from_memory else models.saved("llama", "token")
    refused("has another .*layers.1.* than the policy .*: its head reads its own trunk; load it as "
            "a critic", critic)  # fmt: skip


def test_trls_head_on_a_trunk_of_its_own(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    changed = trunk_heads.policy().get_parameter(name) + 0.1
    refused(f"has another {name}", trl_checkpoint(folder, **{name: changed}))


def test_a_checkpoint_of_fewer_weights(folder):
    write(folder, token_classifier(), drop=("model.norm.weight",))
    refused("lacks norm.weight, which the policy .* has: its head was trained on another", folder)


@pytest.mark.parametrize(("name", "other"), [("sft", "ppo"), ("ppo", "sft")])
def test_the_released_head_of_a_policy_is_refused_by_another(name, other):
    path = tiny_tulu.trunk_head_path(name)
    scorer = load_scorer(tiny_tulu.model_path(name), head=path)
    assert isinstance(scorer, TrunkScorer)
    assert sum(file.stat().st_size for file in path.iterdir()) < 200_000
    with pytest.raises(ValueError, match=f"tiny-tulu/{name}, whose weights are not those"):
        load_scorer(tiny_tulu.model_path(other), head=path)
    with pytest.raises(ValueError, match="no trunk head of 'value'; it has sft, ppo"):
        tiny_tulu.trunk_head_path("value")


def test_a_loaded_head_is_on_the_trunks_device_in_float32():
    head = load_trunk_head(
        {"score.weight": torch.ones(1, 48, dtype=torch.bfloat16)},
        trunk_heads.policy().base_model,
        "the policy",
    )
    assert (head.weight.dtype, head.weight.device.type) == (torch.float32, "cpu")


def test_hidden_states_count_in_the_caches_default_budget(monkeypatch):
    budget = 1 << 18
    monkeypatch.setitem(pool_size._MOST_BYTES, "cpu", budget)
    scorer = load_scorer(trunk_heads.policy(), kind="trunk-head", head=trunk_heads.linear())
    scorer.keep_hidden()
    token = scorer.cache.pool.nbytes // (scorer.cache.capacity + 1) + scorer._hidden[0].nbytes
    held = scorer.cache.pool.nbytes + scorer._hidden.nbytes
    assert budget - 2 * token < held <= budget + 2 * token


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"cut"])
def test_a_file_that_did_not_arrive_whole(tmp_path, content):
    path = tmp_path / FILE_NAME
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} (is empty|is a git-lfs pointer|cannot be read)"):
        read_trunk_head(path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{", "as 'guided_decode' in its metadata: expected a JSON object; write it again"),
        ("[]", "has '\\[\\]' as 'guided_decode' in its metadata: expected a JSON object"),
        ('{"kind": "trunk-head", "version": 1, "trunk": {"x": 1}}', "of its trunk: expected name,"),
        ('{"kind": "trunk-head", "version": 1, "trunk": 3}', "says 3 of its trunk: expected name"),
    ],
)
def test_metadata_that_is_none_of_ours(tmp_path, entry, message):
    path = tmp_path / FILE_NAME
    save_file({"head.weight": torch.ones(1, 48)}, path, metadata={"guided_decode": entry})
    with pytest.raises(ValueError, match=message):
        read_trunk_head(path)


def test_a_bias_that_is_no_number():
    with pytest.raises(ValueError, match="NaN or infinity in head.bias: expected numbers"):
        read_trunk_head({"head.weight": torch.ones(1, 48), "head.bias": torch.tensor([torch.nan])})
