"""Whether a critic reads the policy's token ids as the policy writes them."""

from transformers import PreTrainedTokenizerBase

_SHOWN = 3
_SPECIAL = ("bos_token_id", "eos_token_id")


def check_tokenizers(policy: PreTrainedTokenizerBase, critic: PreTrainedTokenizerBase) -> None:
    """Every token of the policy has the same id in the critic, and BOS and EOS are the same.

    The critic may have more tokens. The policy's pad token, which is never generated, may be
    missing from the critic or have another id.

    Raises ValueError: names the first tokens that differ, with both ids, or the special token.
    """
    theirs = critic.get_vocab()
    wrong = sorted(
        (index, token)
        for token, index in policy.get_vocab().items()
        if theirs.get(token) != index and not _only_pads(policy, index)
    )
    if wrong:
        shown = "; ".join(
            f"{token!r} is {index} in the policy and {theirs.get(token, 'missing')} in the critic"
            for index, token in wrong[:_SHOWN]
        )
        raise ValueError(
            f"policy and critic have different tokenizers: {len(wrong)} of the policy's "
            f"{len(policy.get_vocab())} tokens differ, first {shown}; expected the same id for "
            "each token; pass a critic that was trained with the policy's tokenizer"
        )
    for name in _SPECIAL:
        ours, other = getattr(policy, name), getattr(critic, name)
        if ours != other:
            raise ValueError(
                f"policy and critic have different special tokens: {name} is {ours} in the policy "
                f"and {other} in the critic; expected the same; set it on the tokenizer that is "
                "wrong, or pass a critic that was trained with the policy's tokenizer"
            )


def _only_pads(policy: PreTrainedTokenizerBase, index: int) -> bool:
    others = {policy.bos_token_id, policy.eos_token_id, policy.unk_token_id}
    return index == policy.pad_token_id and index not in others
