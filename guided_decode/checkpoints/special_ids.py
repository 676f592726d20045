"""BOS and EOS of a scorer: its tokenizer's, else what its config says."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from guided_decode.checkpoints.families import Family
from guided_decode.checkpoints.record import Record


def conventions(
    family: Family,
    tokenizer: PreTrainedTokenizerBase | None,
    trunk: PreTrainedModel,
    policy_tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, Any]:
    """What a critic's family and its special tokens say about scoring.

    Raises ValueError: finished responses are read at EOS, and nothing tells which of several ids
    that is.
    """
    bos_id = special_token("bos_token_id", tokenizer, trunk, policy_tokenizer)
    eos_id = special_token("eos_token_id", tokenizer, trunk, policy_tokenizer)
    if family.terminal == "critic" and isinstance(eos_id, list):
        raise ValueError(
            f"{family.kind} is read at EOS, but its config names {eos_id} and no tokenizer came "
            "that says which of them: pass policy_tokenizer=, or a folder with the tokenizer"
        )
    return {
        "terminal": family.terminal,
        "skip_token": bos_id if family.bos == "drop" else None,
        "bos_token_id": first(bos_id),
        "eos_token_id": first(eos_id),
    }


def turn_end_of(
    record: Record | None, family: Family, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int, ...]:
    """The token ids after EOS at whose last one finished responses are read; mostly none."""
    if record is None or tokenizer is None or family.terminal != "critic":
        return ()
    return tuple(tokenizer.encode(record.turn_end, add_special_tokens=False))


def special_token(
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    policy_tokenizer: PreTrainedTokenizerBase | None = None,
) -> int | list[int] | None:
    """A special token's id or, where nothing tells them apart, ids.

    The scorer's tokenizer decides, by path and in memory alike: models with several ends were
    trained to be read at its own. Without one it is the config's, of several the policy's.
    """
    found: int | list[int] | None = getattr(tokenizer, name, None)
    if found is None:
        found = getattr(model.config.get_text_config(), name, None)
    if not isinstance(found, list):
        return found
    known = getattr(policy_tokenizer, name, None)
    if known in found:
        return known
    return found if len(found) > 1 else first(found)


def first(ids: int | list[int] | None) -> int | None:
    """One id, where it does not matter which."""
    return (ids[0] if ids else None) if isinstance(ids, list) else ids
