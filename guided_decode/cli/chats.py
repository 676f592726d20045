"""Conversations as text and token ids, in the format that a checkpoint was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from guided_decode.checkpoints.registry import Record
from guided_decode.cli.errors import Refusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]
ROLES = ("system", "user", "assistant")


def read_messages(given: Any) -> list[dict[str, str]]:
    """The conversation of one JSON value.

    Accepted: {"messages": [{"role", "content"}, ...]}, such a list itself,
    {"prompt": text} and {"prompt": text, "response": text}.

    Raises Refusal: anything else; says what it is.
    """
    if isinstance(given, dict) and "messages" in given:
        given = given["messages"]
    elif isinstance(given, dict) and "prompt" in given:
        given = [
            {"role": role, "content": given[key]}
            for role, key in (("user", "prompt"), ("assistant", "response"))
            if key in given
        ]
    if not isinstance(given, list) or not given:
        raise Refusal(
            f"{_shown(given)}: expected an object with messages, or with prompt and response"
        )
    return [_message(one, i) for i, one in enumerate(given)]


def _message(given: Any, index: int) -> dict[str, str]:
    if not isinstance(given, dict) or given.get("role") not in ROLES:
        role = given.get("role") if isinstance(given, dict) else given
        raise Refusal(f"message {index} has the role {_shown(role)}: expected one of "
                      f"{', '.join(ROLES)}")  # fmt: skip
    if not isinstance(given.get("content"), str):
        raise Refusal(
            f"message {index} has the content {_shown(given.get('content'))}: expected text"
        )
    return {"role": given["role"], "content": given["content"]}


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, record: Record | None, messages: Messages
) -> list[int]:
    """Token ids after which the assistant answers.

    Raises Refusal where neither the registry nor the tokenizer knows the chat format.
    """
    if record is not None:
        from guided_decode.checkpoints.prompts import tokenise

        return tokenise(tokenizer, messages, record.prompt_format, add_generation_prompt=True)
    return _template_ids(tokenizer, messages, add_generation_prompt=True)


def raw_ids(tokenizer: PreTrainedTokenizerBase, record: Record | None, text: str) -> list[int]:
    """Token ids of text as it is: with BOS where the checkpoint's training had one, if that is
    known, else as the tokenizer does."""
    if record is None:
        ids: list[int] = tokenizer.encode(text)
        return ids
    from guided_decode.checkpoints.prompts import find_format

    bos = tokenizer.bos_token_id
    lead = [bos] if find_format(record.prompt_format).bos and bos is not None else []
    return lead + tokenizer.encode(text, add_special_tokens=False)


def response_ids(
    tokenizer: PreTrainedTokenizerBase, record: Record | None, messages: Messages
) -> tuple[list[int], list[int]]:
    """A conversation that an assistant ends, as (prompt ids, response ids up to its EOS).

    Raises Refusal as `prompt_ids`.
    """
    prompt = prompt_ids(tokenizer, record, messages[:-1])
    if record is not None:
        from guided_decode.checkpoints.prompts import tokenise

        whole = tokenise(tokenizer, messages, record.prompt_format, end="eos")
    else:
        whole = _template_ids(tokenizer, messages)
    # A tokenizer may merge the prompt's end with the response's beginning.
    pairs = zip(prompt, whole, strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    response, eos = whole[shared:], tokenizer.eos_token_id
    # Responses are read at EOS, whatever a template puts after it.
    end = len(response) - response[::-1].index(eos) if eos in response else len(response)
    return whole[:shared], response[:end]


def _template_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, add_generation_prompt: bool = False
) -> list[int]:
    if not tokenizer.chat_template:
        raise Refusal(
            "the checkpoint is not registered and its tokenizer has no chat template: give text "
            "with --raw, or a tokenizer with a template"
        )
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    # The template writes the special tokens that it wants.
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
