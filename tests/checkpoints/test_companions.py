"""Whose token ids a scorer, its reward model and its reference read: compared, or said."""

import warnings

import pytest
import torch

from guided_decode import load_scorer
from guided_decode.checkpoints.loading import UnknownPolicyWarning
from tests.checkpoints.tokenizer_files import WORDS, swapped, word_tokenizer
from tests.models import VOCAB, tiny


@pytest.fixture
def folders(tmp_path):
    """Critic, reward model and language models; their names say whose tokenizer they have."""

    def make(head, tokenizer):
        path = tmp_path / f"{head}-{'own' if tokenizer is None else tokenizer.name_or_path}"
        tiny("llama", head).save_pretrained(path)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        return path

    return make


def test_a_reward_model_with_another_tokenizer_than_the_scorers(folders):
    critic, reward = folders("token", word_tokenizer()), folders("sequence", swapped())
    with pytest.raises(
        ValueError,
        match="scorer and reward model have different tokenizers: 2 of the scorer's 101 tokens "
        "differ, first 'w7' is 7 in the scorer and 8 in the reward model; .* pass a reward model "
        "that was trained with the scorer's tokenizer",
    ):
        load_scorer(critic, "verl-critic", reward=reward)
    scorer = load_scorer(critic, "verl-critic", reward=folders("sequence", word_tokenizer()))
    assert scorer.reward.eos_token_id == 2


def test_a_reference_with_another_tokenizer_than_the_scorers(folders):
    critic, other = folders("token", word_tokenizer()), folders("lm", swapped())
    with pytest.raises(ValueError, match="scorer and reference have different tokenizers"):
        load_scorer(critic, "verl-critic", reference=other)


def test_the_reference_of_an_implicit_reward(folders, tmp_path):
    tuned, other = tmp_path / "tuned", folders("lm", swapped())
    tiny("llama", "lm", seed=1).save_pretrained(tuned)
    word_tokenizer().save_pretrained(tuned)
    with pytest.raises(ValueError, match="scorer and reference have different tokenizers"):
        load_scorer(tuned, "implicit", reference=other)


def test_with_the_policys_tokenizer_errors_name_the_policy(folders):
    critic, reward = folders("token", word_tokenizer()), folders("sequence", swapped())
    with pytest.raises(ValueError, match="policy and reward model have different tokenizers"):
        load_scorer(critic, "verl-critic", reward=reward, policy_tokenizer=word_tokenizer())
    with pytest.raises(ValueError, match="policy and critic have different tokenizers"):
        load_scorer(critic, "verl-critic", policy_tokenizer=swapped())


def test_a_model_in_memory_is_compared_by_the_folder_that_it_came_from(folders):
    path = folders("sequence", word_tokenizer())
    model = type(tiny("llama", "sequence")).from_pretrained(path)
    with pytest.raises(ValueError, match="policy and critic have different tokenizers"):
        load_scorer(model, policy_tokenizer=swapped())
    # A token that was added since the folder was written has its row.
    grown = word_tokenizer()
    grown.add_tokens(["<call>"])
    model.resize_token_embeddings(VOCAB + 1)
    assert load_scorer(model, policy_tokenizer=grown).vocab_size == VOCAB + 1


def test_without_a_tokenizer_of_its_own_the_rows_are_counted(folders):
    bigger = word_tokenizer((*WORDS, "more"))
    with pytest.raises(ValueError, match="'more' is 101 in the policy's tokenizer, but .* has a voc"
                                         "abulary of 101 tokens"):  # fmt: skip
        load_scorer(folders("token", None), "verl-critic", policy_tokenizer=bigger)
    scorer = load_scorer(tiny("llama", "sequence"))
    with pytest.raises(ValueError, match="'more' is 101 in the policy's tokenizer, but the reward"):
        load_scorer(tiny("llama", "lm", vocab_size=120), head={"head.weight": torch.ones(1, 48)},
                    reward=scorer, policy_tokenizer=bigger)  # fmt: skip


def test_an_unknown_policy_is_said(folders):
    critic = folders("token", word_tokenizer())
    with pytest.warns(UnknownPolicyWarning, match="without policy_tokenizer=, so nothing compares"):
        load_scorer(critic, "verl-critic")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_scorer(critic, "verl-critic", policy_tokenizer=word_tokenizer())
        # The policy's own trunk, whose ids are the policy's.
        load_scorer(tiny("llama", "lm"), head={"head.weight": torch.ones(1, 48)})


def test_a_policy_tokenizer_of_another_type():
    with pytest.raises(ValueError, match="policy_tokenizer came as dict: expected the policy's"):
        load_scorer(tiny("llama", "sequence"), policy_tokenizer={})
