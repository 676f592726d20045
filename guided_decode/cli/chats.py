"""Conversations as text and token ids, in the format that a checkpoint was trained on."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

from guided_decode.checkpoints.registry import CHAT_TEMPLATE, Record
from guided_decode.cli.chat_rows import Messages
from guided_decode.cli.errors import Refusal, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The name of the format that a tokenizer's own chat template is.
TEMPLATE = "template"


def format_of(asked: str | None, record: Record | None) -> str | None:
    """The prompt format: what was asked for, else the checkpoint's; None is the chat template.

    Raises Refusal for a format that there is not.
    """
    if asked is None:
        own = None if record is None else record.prompt_format
        return None if own == CHAT_TEMPLATE else own
    from guided_decode.checkpoints.prompts import FORMATS

    if asked not in (*FORMATS, TEMPLATE):
        raise Refusal(f"--prompt-format {asked}: expected one of {', '.join(FORMATS)}, or "
                      f"{TEMPLATE}, the tokenizer's own")  # fmt: skip
    return None if asked == TEMPLATE else asked


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt_format: str | None, messages: Messages
) -> list[int]:
    """Token ids after which the assistant answers.

    prompt_format: the name of one, as `format_of` says; None is the tokenizer's chat template.

    Raises Refusal: there is no template, or it refuses the chat.
    """
    if prompt_format is not None:
        from guided_decode.checkpoints.prompts import tokenise

        return tokenise(tokenizer, messages, prompt_format, add_generation_prompt=True)
    return _template_ids(tokenizer, messages, add_generation_prompt=True)


def prompt_text(
    tokenizer: PreTrainedTokenizerBase, prompt_format: str | None, messages: Messages
) -> str:
    """The text after which the assistant answers, without BOS; as `prompt_ids`.

    Raises Refusal as `prompt_ids`, ValueError as `prompts.render`.
    """
    if prompt_format is not None:
        from guided_decode.checkpoints.prompts import render

        return render(
            messages, prompt_format, add_generation_prompt=True, eos_token=tokenizer.eos_token
        )
    text = _template_text(tokenizer, messages, add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token or "")


def raw_ids(tokenizer: PreTrainedTokenizerBase, prompt_format: str | None, text: str) -> list[int]:
    """Token ids of text as it is: with BOS where the checkpoint's training had one, if that is
    known, else as the tokenizer does."""
    if prompt_format is None:
        ids: list[int] = tokenizer.encode(text)
        return ids
    from guided_decode.checkpoints.prompts import find_format

    bos = tokenizer.bos_token_id
    lead = [bos] if find_format(prompt_format).bos and bos is not None else []
    return lead + tokenizer.encode(text, add_special_tokens=False)


def response_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: str | None,
    messages: Messages,
    *,
    whole_turn: bool = False,
) -> tuple[list[int], list[int]]:
    """A conversation that an assistant ends, as (prompt ids, response ids up to its EOS).

    whole_turn: with what the format puts after EOS, a newline for one.

    Raises Refusal as `prompt_ids`.
    """
    prompt = prompt_ids(tokenizer, prompt_format, messages[:-1])
    if prompt_format is not None:
        from guided_decode.checkpoints.prompts import tokenise

        whole = tokenise(tokenizer, messages, prompt_format, end="turn" if whole_turn else "eos")
    else:
        whole = _template_ids(tokenizer, messages)
    # A tokenizer may merge the prompt's end with the response's beginning.
    pairs = zip(prompt, whole, strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    response = whole[shared:]
    if not whole_turn:
        response = response[: end_of_response(response, tokenizer.eos_token_id)]
    return whole[:shared], response


def end_of_response(response: list[int], eos: int | None) -> int:
    """How many of its token ids there are up to EOS, whatever a template puts after it."""
    return len(response) - response[::-1].index(eos) if eos in response else len(response)


def _template_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, add_generation_prompt: bool = False
) -> list[int]:
    # The template writes the special tokens that it wants.
    ids: list[int] = tokenizer.encode(
        _template_text(tokenizer, messages, add_generation_prompt=add_generation_prompt),
        add_special_tokens=False,
    )
    return ids


def _template_text(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, add_generation_prompt: bool
) -> str:
    if not tokenizer.chat_template:
        raise Refusal(
            "the checkpoint is not registered and its tokenizer has no chat template: pass "
            "--prompt-format, or a tokenizer with a template"
        )
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:
        # A template is a program of the checkpoint's: it raises what it likes.
        raise Refusal(f"the tokenizer's chat template refuses it: {one_line(error)}") from error
    return str(text)
