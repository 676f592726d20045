"""Reward models whose head is a value head: read at EOS, by their kind or by their class."""

import pytest
import torch
from safetensors.torch import save_file

from guided_decode import load_scorer
from guided_decode.checkpoints.checkpoint import load_checkpoint
from guided_decode.guidance.terminal import score_candidates
from tests.checkpoints.checkpoint_files import stock, write
from tests.checkpoints.tokenizer_files import word_tokenizer
from tests.models import EOS, saved, saved_value_head, tiny

PREFIX = [5, 6, 7]


def openrlhf(path, architecture):
    """OpenRLHF's reward model or critic, as a class of that name saved it."""
    head = tiny("llama", "token").score.weight.clone()
    return write(path, tiny("llama", "sequence"), drop=["score.weight"],
                 add={"value_head.weight": head}, architectures=[architecture],
                 value_head_prefix="value_head")  # fmt: skip


def wanted(*ids):
    trunk = tiny("llama", "sequence").model(torch.tensor([ids])).last_hidden_state[0, -1]
    return float(tiny("llama", "token").score.weight[0] @ trunk)


@pytest.mark.parametrize("architecture", ["LLMForSequenceRegression", "RewardModel"])
@pytest.mark.parametrize("kind", ["auto", "reward-model", "value-head"])
def test_openrlhfs_reward_models_are_read_at_eos(tmp_path, architecture, kind):
    scorer = load_scorer(openrlhf(tmp_path, architecture), kind)
    scores, exempt = score_candidates(scorer, [PREFIX], torch.tensor([[EOS]]), [[EOS]])
    assert exempt is None
    assert scores.values.item() == pytest.approx(wanted(*PREFIX, EOS), abs=1e-4)


@pytest.mark.parametrize("kind", ["auto", "value-head"])
def test_openrlhfs_critics_are_not(tmp_path, kind):
    family = load_checkpoint(openrlhf(tmp_path, "CriticModel"), kind).family
    assert (family.kind, family.terminal, family.read) == ("value-head", "baseline", "token")


def test_the_caller_still_says_that_it_is_a_critic(tmp_path):
    path = openrlhf(tmp_path, "LLMForSequenceRegression")
    assert load_checkpoint(path, "value-head", terminal="baseline").family.terminal == "baseline"


def test_a_value_head_in_a_causal_lm_is_read_at_eos_as_a_reward_model():
    checkpoint = load_checkpoint(saved_value_head("trl"), "reward-model")
    assert (checkpoint.family.read, checkpoint.family.terminal) == ("eos", "critic")
    # TRL's head has a bias, though `score` has none.
    assert checkpoint.head_bias.item() == 0.75


@pytest.mark.parametrize(
    ("kind", "terminal"), [("value-head", "baseline"), ("reward-model", "critic")]
)
def test_a_head_that_lies_beside_a_causal_lm(tmp_path, kind, terminal):
    head = {"v_head.summary.weight": torch.ones(1, 48), "v_head.summary.bias": torch.ones(1)}
    tiny("llama", "lm").save_pretrained(tmp_path)
    save_file(head, tmp_path / "value_head.safetensors")
    checkpoint = load_checkpoint(tmp_path, kind)
    assert torch.equal(checkpoint.head_weight, head["v_head.summary.weight"])
    assert checkpoint.head_bias.item() == 1.0
    assert checkpoint.family.terminal == terminal
    with pytest.raises(ValueError, match="value-head, reward-model, implicit .its head lies in "
                                         "value_head.safetensors.; pass kind="):  # fmt: skip
        load_checkpoint(tmp_path)


def test_an_older_head_beside_is_a_pickle(tmp_path):
    tiny("llama", "lm").save_pretrained(tmp_path)
    torch.save({"v_head.summary.weight": torch.ones(1, 48)}, tmp_path / "value_head.bin")
    with pytest.raises(ValueError, match="value_head.bin beside it, a pickle, may have it: pass"):
        load_checkpoint(tmp_path, "value-head")
    checkpoint = load_checkpoint(tmp_path, "value-head", allow_pickle=True)
    assert torch.equal(checkpoint.head_weight, torch.ones(1, 48))


@pytest.mark.parametrize("wrapper", ["rwtransformer", "rwtranrsformer"])
def test_deepspeed_chats_v_head(tmp_path, wrapper):
    model = tiny("llama", "lm")
    model.config.save_pretrained(tmp_path)
    weights = {f"{wrapper}.{name}": w for name, w in model.model.state_dict().items()}
    torch.save(weights | {"v_head.weight": torch.ones(1, 48)}, tmp_path / "pytorch_model.bin")
    checkpoint = load_checkpoint(tmp_path, "value-head", allow_pickle=True)
    assert torch.equal(checkpoint.head_weight, torch.ones(1, 48))
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(
        checkpoint.trunk(ids).last_hidden_state, model.model(ids).last_hidden_state
    )


@pytest.mark.parametrize("head", ["token", "sequence"])
def test_two_labels_are_read_by_the_class_that_is_named(head):
    model = tiny("llama", head, labels=2)
    scorer = load_scorer(saved("llama", head, labels=2), "classifier", transform="softmax:1")
    want = stock(model, torch.tensor([[*PREFIX, 9]]))[-1].softmax(-1)[1]
    got = scorer.score([PREFIX], torch.tensor([[9]])).values.item()
    assert got == pytest.approx(float(want), abs=1e-5)
    with pytest.raises(ValueError, match="num_labels 2: classifier expects 3 or 1; pass kind=cla"):
        load_scorer(saved("llama", head, labels=2), "classifier", transform="softmax:2")


# -- which EOS ----------------------------------------------------------------------------------

ENDS = [3, 4, 5]


@pytest.fixture
def several_ends(tmp_path):
    """A reward model of Llama 3's kind: its tokenizer's EOS is not the first of its config's."""
    path = write(tmp_path, tiny("llama", "sequence"), eos_token_id=ENDS)
    word_tokenizer(eos_token="w4").save_pretrained(path)
    return path


def in_memory(path):
    return type(tiny("llama", "sequence")).from_pretrained(path)


def test_path_and_memory_read_at_the_tokenizers_eos(several_ends):
    model = in_memory(several_ends)
    assert load_scorer(several_ends).eos_token_id == 4
    assert load_scorer(model).eos_token_id == 4
    assert load_scorer(model, policy_tokenizer=word_tokenizer(eos_token="w4")).eos_token_id == 4


def test_without_a_tokenizer_the_policys_decides_among_several(several_ends):
    (several_ends / "tokenizer.json").unlink()
    (several_ends / "tokenizer_config.json").unlink()
    for given in (several_ends, in_memory(several_ends)):
        scorer = load_scorer(given, policy_tokenizer=word_tokenizer(eos_token="w4"))
        assert scorer.eos_token_id == 4
        with pytest.raises(ValueError, match=r"names \[3, 4, 5\] and no tokenizer came that says"):
            load_scorer(given)
        # A critic that is never read at EOS needs none.
        assert load_scorer(given, terminal="baseline").eos_token_id == 3
