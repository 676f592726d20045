"""A critic reads the policy's ids: compared token by token, not by size."""

import pytest
from tokenizers import Tokenizer, models
from transformers import AddedToken, PreTrainedTokenizerFast

from guided_decode.checkpoints.tokenizer_match import check_tokenizers

WORDS = ["<unk>", "<s>", "</s>", "a", "b", "c"]


def tokenizer(words=WORDS, **special):
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def test_the_same_tokenizer_matches():
    check_tokenizers(tokenizer(), tokenizer())


def test_a_critic_may_have_more_tokens():
    critic = tokenizer()
    critic.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<x>"]})
    check_tokenizers(tokenizer(), critic)


def test_a_policys_own_pad_token_is_never_generated():
    policy = tokenizer()
    policy.add_special_tokens({"pad_token": "<pad>"})
    check_tokenizers(policy, tokenizer())


def test_a_pad_token_that_is_also_unk_is_compared():
    policy = tokenizer(["<s>", "<unk>", "</s>", "a", "b", "c"], pad_token="<unk>")
    with pytest.raises(ValueError, match="2 of the policy's 6 tokens differ"):
        check_tokenizers(policy, tokenizer())


def test_swapped_ids_are_refused_though_the_sizes_are_equal():
    critic = tokenizer(["<unk>", "<s>", "</s>", "b", "a", "c"])
    with pytest.raises(
        ValueError,
        match="different tokenizers: 2 of the policy's 6 tokens differ, first 'a' is 3 in the "
        "policy and 4 in the critic; 'b' is 4 in the policy and 3 in the critic; expected",
    ):
        check_tokenizers(tokenizer(), critic)


def test_a_token_that_the_critic_lacks_is_named():
    with pytest.raises(ValueError, match="'c' is 5 in the policy and missing in the critic"):
        check_tokenizers(tokenizer(), tokenizer(WORDS[:-1]))


@pytest.mark.parametrize(
    ("special", "message"),
    [
        ({"eos_token": "c"}, "eos_token_id is 2 in the policy and 5 in the critic"),
        ({"bos_token": "a"}, "bos_token_id is 1 in the policy and 3 in the critic"),
        ({"bos_token": None}, "bos_token_id is 1 in the policy and None in the critic"),
    ],
)
def test_other_special_tokens_are_refused(special, message):
    with pytest.raises(ValueError, match=f"different special tokens: {message}; expected the same"):
        check_tokenizers(tokenizer(), tokenizer(**special))


def reserving(*names, special=True):
    made = tokenizer()
    made.add_tokens([AddedToken(name, special=special) for name in names], special_tokens=special)
    return made


def test_ids_that_one_of_both_only_reserves_may_have_other_names():
    """Llama 3.1 names some of what Llama 3 reserves, and moves the rest of the names along."""
    older = reserving("<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>")
    newer = reserving("<|pad_id|>", "<|reserved_0|>", "<|eom|>")
    check_tokenizers(older, newer)
    check_tokenizers(newer, older)


def test_other_special_tokens_may_not():
    with pytest.raises(ValueError, match="'<|user|>' is 6 in the policy and missing in the critic"):
        check_tokenizers(reserving("<|user|>"), reserving("<|system|>"))
    with pytest.raises(ValueError, match="'reserved' is 6 in the policy and missing"):
        check_tokenizers(reserving("reserved", special=False), reserving("word", special=False))
