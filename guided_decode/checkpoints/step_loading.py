"""Process reward models as scorers of steps."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, cast

from guided_decode.checkpoints.critic_loading import load_critic
from guided_decode.checkpoints.families import Family
from guided_decode.checkpoints.head import read_token_head
from guided_decode.checkpoints.loading_options import LoadingOptions
from guided_decode.checkpoints.prompts import find_format
from guided_decode.checkpoints.record import CHAT_TEMPLATE
from guided_decode.checkpoints.source import Source
from guided_decode.checkpoints.steps import (
    BY_CLASS,
    STEP_FORMATS,
    StepFormat,
    find_steps,
    step_reader,
    token_ids,
)
from guided_decode.checkpoints.tokenizer_files import load_tokenizer
from guided_decode.scoring.step_scorer import Aggregate, StepScorer


def load_step_scorer(
    source: Source,
    kind: str,
    family: Family,
    options: LoadingOptions,
    steps: str | None,
    aggregate: str | None,
    **given: Any,
) -> StepScorer:
    """A process reward model; arguments as of `loading.load_scorer`, given: bos and transform.

    It reads text, so that nothing compares its tokenizer with the policy's.

    Raises ValueError: nothing says how its steps are marked, or its tokenizer lacks the mark.
    """
    chosen = steps_of(source, steps)
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise ValueError(
            f"{source.name} has no tokenizer, and {family.kind} reads text: expected the one that "
            "it was trained with; put its files beside the weights"
        )
    drops = (given.get("bos") or family.bos) == "drop"
    read = step_reader(tokenizer, chosen, source.name, bos=_begins_with_bos(source) and not drops)
    own_head = None
    if chosen.label_tokens is not None:
        rows = token_ids(tokenizer, chosen.label_tokens, source.name)
        own_head = partial(read_token_head, rows=rows, family=family)
    critic = load_critic(
        source, kind, replace(options, policy_tokenizer=None), own_head=own_head, **given
    )
    return StepScorer(critic, read, cast(Aggregate, aggregate or chosen.aggregate))


def steps_of(source: Source, given: str | None) -> StepFormat:
    """How its steps are marked: as asked for, as its record says, or as its class does.

    Raises ValueError: an unknown name, or nothing says so.
    """
    if given is not None:
        return find_steps(given)
    if source.record is not None and source.record.steps is not None:
        return find_steps(source.record.steps)
    if source.architecture in BY_CLASS:
        return find_steps(BY_CLASS[source.architecture])
    raise ValueError(
        f"{source.name} ({source.architecture or 'no class named'}) is a process reward model, and "
        f"nothing says how its steps are marked: pass steps=, one of {', '.join(STEP_FORMATS)}"
    )


def _begins_with_bos(source: Source) -> bool:
    """Whether its text begins with BOS: as trainers do where nothing else is known."""
    record = source.record
    if record is None or record.prompt_format == CHAT_TEMPLATE:
        return True
    return find_format(record.prompt_format).bos


def refuse_steps(name: str, kind: str, **given: object) -> None:
    """Raises ValueError: an option of process reward models came with another kind."""
    names = [f"{option}=" for option, value in given.items() if value is not None]
    if names:
        raise ValueError(
            f"{', '.join(names)} came with {name}, a {kind}, which is not read by steps: expected "
            "a process reward model; drop it, or pass kind='process-reward'"
        )
