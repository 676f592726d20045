"""Whether a scorer reads the text that it was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guided_decode.checkpoints.families import FAMILIES
from guided_decode.checkpoints.registry import CHAT_TEMPLATE, find
from guided_decode.cli.chats import prompt_ids
from guided_decode.cli.errors import Refusal, warn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = ({"role": "user", "content": "Why?"},)


def warn_of_another_format(
    tokenizer: PreTrainedTokenizerBase, decoded_in: str | None, scorer: str, bos: str | None
) -> None:
    """Says so where the scorer's checkpoint is known to be trained on another prompt format.

    Args:
        tokenizer: the policy's.
        decoded_in: the format of the prompts; None is the policy's own chat template.
        scorer: its name.
        bos: the BOS rule that was asked for; None is the family's.
    """
    record = find(scorer)
    # A process reward model is handed the messages in its own format, whatever the policy reads.
    if record is None or record.prompt_format == decoded_in or record.steps is not None:
        return
    # Another tokenizer's template cannot be seen from here.
    if record.prompt_format == CHAT_TEMPLATE:
        return
    rule = bos or (None if record.kind is None else FAMILIES[record.kind].bos)
    try:
        given, trained = (
            _without_bos(tokenizer, prompt_ids(tokenizer, name, _PROBE), rule == "drop")
            for name in (decoded_in, record.prompt_format)
        )
    except (ValueError, Refusal):
        # What cannot be rendered is refused where a prompt is.
        return
    if given != trained:
        what = "the policy's own chat template" if decoded_in is None else f"{decoded_in} format"
        warn(
            f"{scorer} was trained on the {record.prompt_format} format and reads prompts in "
            f"{what}: its values mean little there; pass --prompt-format {record.prompt_format} to "
            "decode in its format"
        )


def _without_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int], drop: bool) -> list[int]:
    return ids[1:] if drop and ids[:1] == [tokenizer.bos_token_id] else ids
