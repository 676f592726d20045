"""What a vLLM pooling server is asked about a text, and how its answer is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from guided_decode.search.http import Body

# A value for each token, or one for the whole text, at its last token.
Task = Literal["token_classify", "classify"]
TASKS: tuple[Task, ...] = ("token_classify", "classify")
PATH = "/pooling"
# Of each token, or of the last one alone: [tokens or 1][labels].
Outputs = list[list[float]]


@dataclass(frozen=True, slots=True)
class Served:
    """A model that a server has. name: for requests. root: what it was loaded from, where the
    server says so. max_tokens: of a text; None: the server does not say."""

    name: str
    root: str | None
    max_tokens: int | None


def body_of(model: str, ids: Sequence[int], task: Task, *, activation: bool = False) -> Body:
    """A request for the head's outputs; without activation, as the head gives them."""
    return {"model": model, "input": list(ids), "task": task, "use_activation": activation}


def read_outputs(answer: Any, body: Body) -> Outputs:
    """The head's outputs of one text.

    Raises ValueError: they are none, or not those of the whole text.
    """
    tokens = len(body["input"])
    by_token = body["task"] == TASKS[0]
    try:
        (row,) = answer["data"]
        outputs = row["data"] if by_token else [row["data"]]
        read = answer["usage"]["prompt_tokens"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"no outputs in {str(answer)[:80]!r}") from None
    wanted = tokens if by_token else 1
    if not isinstance(outputs, list) or len(outputs) != wanted:
        count = len(outputs) if isinstance(outputs, list) else "no"
        raise ValueError(f"{count} outputs for {wanted} of {tokens} tokens")
    if read != tokens:
        raise ValueError(f"it read {read} tokens of a text of {tokens}")
    labels = len(outputs[0]) if isinstance(outputs[0], list) else 0
    if not labels or not all(_are_numbers(each, labels) for each in outputs):
        raise ValueError(f"{str(outputs)[:80]} are no numbers, {labels} a token")
    return outputs


def read_models(answer: Any, body: Body) -> list[Served]:
    """The models that a server has. Raises ValueError: it names none."""
    try:
        found = [
            Served(str(each["id"]), each.get("root"), each.get("max_model_len"))
            for each in answer["data"]
        ]
    except (KeyError, TypeError, AttributeError):
        found = []
    if not found:
        raise ValueError(f"no models in {str(answer)[:80]!r}")
    return found


def _are_numbers(outputs: Any, labels: int) -> bool:
    return (
        isinstance(outputs, list)
        and len(outputs) == labels
        and all(isinstance(each, int | float) and math.isfinite(each) for each in outputs)
    )
