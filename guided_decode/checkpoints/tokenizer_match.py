"""Whether a critic reads the policy's token ids as the policy writes them."""

import re
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

_SHOWN = 3
_SPECIAL = ("bos_token_id", "eos_token_id")
# Names of ids that are kept for later: Llama 3 renamed some of them in 3.1.
_RESERVED = re.compile(r"reserved|unused|placeholder|dummy|extra_id", re.IGNORECASE)


class TokenizersDiffer(ValueError):
    """Token ids of one model mean something else to the other."""


class Sides(NamedTuple):
    """What errors call the two that are compared: who writes the ids, and who reads them."""

    writer: str = "the policy"
    reader: str = "the critic"

    @property
    def both(self) -> str:
        return " and ".join(side.removeprefix("the ") for side in self)


def check_tokenizers(
    policy: PreTrainedTokenizerBase,
    critic: PreTrainedTokenizerBase,
    sides: Sides = Sides(),  # noqa: B008 - a frozen record
    rows: int | None = None,
) -> None:
    """Every token of the policy has the same id in the critic, and BOS and EOS are the same.

    The critic may have more tokens. The policy's pad token, which is never generated, may be
    missing from the critic or have another id. So may ids that are special in both and that one of
    the two only reserves: Llama 3 calls them otherwise than 3.1.

    Args:
        policy: the tokenizer that writes ids.
        critic: the tokenizer of who reads them.
        sides: what errors call the two.
        rows: embeddings of a critic in memory, whose tokenizer on disk may be older than itself:
            tokens that this one lacks are taken to be its own as far as it has rows for them.

    Raises TokenizersDiffer, a ValueError: names the first tokens that differ, with both ids, or the
        special token.
    """
    theirs, ours = critic.get_vocab(), policy.get_vocab()
    names = {index: token for token, index in theirs.items()}
    wrong = sorted(
        (index, token)
        for token, index in ours.items()
        if theirs.get(token) != index
        and not _only_pads(policy, index)
        and not _only_reserved(policy, critic, index, token, names.get(index))
        and not (rows is not None and index not in names and index < rows)
    )
    if wrong:
        shown = "; ".join(
            f"{token!r} is {index} in {sides.writer} and {theirs.get(token, 'missing')} in "
            f"{sides.reader}"
            for index, token in wrong[:_SHOWN]
        )
        raise TokenizersDiffer(
            f"{sides.both} have different tokenizers: {len(wrong)} of {sides.writer}'s "
            f"{len(ours)} tokens differ, first {shown}; expected the same id for each token; pass "
            f"{_another(sides)}"
        )
    for name in _SPECIAL:
        own, other = getattr(policy, name), getattr(critic, name)
        if own != other:
            raise TokenizersDiffer(
                f"{sides.both} have different special tokens: {name} is {own} in {sides.writer} "
                f"and {other} in {sides.reader}; expected the same; set it on the tokenizer that "
                f"is wrong, or pass {_another(sides)}"
            )


def check_rows(
    policy: PreTrainedTokenizerBase, rows: int, name: str, writer: str = "the policy"
) -> None:
    """What can be compared with a model that has no tokenizer: whether it has a row for each id.

    Raises TokenizersDiffer, a ValueError: names the token, its id and the model's vocabulary.
    """
    beyond = sorted(
        (index, token)
        for token, index in policy.get_vocab().items()
        if index >= rows and not _only_pads(policy, index)
    )
    if beyond:
        index, token = beyond[0]
        raise TokenizersDiffer(
            f"{token!r} is {index} in {writer}'s tokenizer, but {name} has a vocabulary of {rows} "
            f"tokens: expected the same token ids; pass one that was trained with {writer}'s "
            "tokenizer"
        )


def _another(sides: Sides) -> str:
    reader = sides.reader.removeprefix("the ")
    return f"a {reader} that was trained with {sides.writer}'s tokenizer"


def _only_pads(policy: PreTrainedTokenizerBase, index: int) -> bool:
    others = {policy.bos_token_id, policy.eos_token_id, policy.unk_token_id}
    return index == policy.pad_token_id and index not in others


def _only_reserved(
    policy: PreTrainedTokenizerBase,
    critic: PreTrainedTokenizerBase,
    index: int,
    ours: str,
    theirs: str | None,
) -> bool:
    if theirs is None or not (_RESERVED.search(ours) or _RESERVED.search(theirs)):
        return False
    return all(
        index in each.added_tokens_decoder and each.added_tokens_decoder[index].special
        for each in (policy, critic)
    )
