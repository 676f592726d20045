"""What a vLLM pooling server serves, proved by asking it before anything depends on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from guided_decode.search.http import Endpoints
from guided_decode.search.http_failures import EndpointError, RequestRefused
from guided_decode.search.pooling_wire import (
    PATH,
    TASKS,
    Served,
    Task,
    body_of,
    read_models,
    read_outputs,
)

# Shares of the largest value that another batch or machine may change a 16-bit model's by.
_NOISE = 0.05
# The share that says that what follows changed nothing.
_NOTHING = 1e-3
_NOT_FOUND = 404
_HOW_TO_START = (
    "expected a pooling server of a critic or reward model, the same task on all: start it with "
    'vllm serve MODEL --runner pooling --pooler-config \'{"task": "token_classify"}\', or classify'
)
# The same of probabilities.
_SAME_PROBABILITY = 0.02


@dataclass(frozen=True, slots=True)
class Probed:
    """What all servers were found to do. labels: of the head."""

    task: Task
    labels: int


def find_model(endpoints: Endpoints, wanted: str | None) -> Served:
    """The model that all servers have: the one that is wanted, else the first one's.

    Raises EndpointError: a server does not have it.
    """
    lists = endpoints.get_from_each("/v1/models", read_models)
    name = lists[0][0].name if wanted is None else wanted
    found = []
    for url, models in zip(endpoints.urls, lists, strict=True):
        own = next((each for each in models if each.name == name), None)
        if own is None:
            there = ", ".join(each.name for each in models)
            raise EndpointError(
                f"{url} serves {there}, and not {name}: expected the same model on all servers, "
                "under one name (--served-model-name)"
            )
        found.append(own)
    limits = [each.max_tokens for each in found if each.max_tokens is not None]
    return Served(name, found[0].root, min(limits, default=None))


def probe(endpoints: Endpoints, model: str, ids: Sequence[int]) -> Probed:
    """Asks each server about a text and a part of it, and holds the answers to each other.

    Proves that a task is served whose values are those of a last token, that they come without
    activation, one a token that was sent, and that all servers have the same model.

    Args:
        ids: a text of some twenty token ids, with different beginnings and ends.

    Raises EndpointError: names the server, what it answers, what was expected and what to do.
    """
    task = _find_task(endpoints, model, ids)
    half = ids[: len(ids) // 2]
    # A server that has read the text before may answer from what it keeps.
    whole, again, part = (_ask(endpoints, model, text, task) for text in (ids, ids, half))
    active = _ask(endpoints, model, ids, task, activation=True)
    for i, url in enumerate(endpoints.urls):
        _check_activation(url, whole[i], active[i])
        if not _close(whole[i], again[i]):
            raise EndpointError(
                f"{url} answers {_shown(whole[i])} and then {_shown(again[i])} for the same text: "
                "expected the same; see that one model answers there"
            )
        _check_reads_on(url, task, whole[i], part[i], len(half))
        if whole[i].shape != whole[0].shape or not _close(whole[i], whole[0]):
            raise EndpointError(
                f"{url} answers {_shown(whole[i])} where {endpoints.urls[0]} answers "
                f"{_shown(whole[0])}: expected the same model on all servers"
            )
    return Probed(task, whole[0].shape[-1])


def _find_task(endpoints: Endpoints, model: str, ids: Sequence[int]) -> Task:
    said = []
    for task in TASKS:
        try:
            endpoints.post_to_each(PATH, body_of(model, ids, task), read_outputs)
        except RequestRefused as error:
            said.append(f"{task}: {error}")
        except EndpointError as error:
            if error.status != _NOT_FOUND:
                raise
            raise EndpointError(f"{error}; {_HOW_TO_START}", error.status) from error
        else:
            return task
    raise EndpointError(f"{'; '.join(said)}; {_HOW_TO_START}")


def _ask(
    endpoints: Endpoints, model: str, ids: Sequence[int], task: Task, *, activation: bool = False
) -> list[Tensor]:
    """Outputs of each server, float32 [tokens or 1, labels]."""
    body = body_of(model, ids, task, activation=activation)
    return [torch.tensor(each) for each in endpoints.post_to_each(PATH, body, read_outputs)]


def _check_activation(url: str, raw: Tensor, active: Tensor) -> None:
    """Raises EndpointError: nothing proves that the outputs come as the head gives them.

    They do where no probability could be like that, or where the activation of them is what comes
    when it is asked for.
    """
    one = raw.shape[-1] == 1
    sums_up = one or math.isclose(float(raw.sum(-1).max()), 1.0, abs_tol=_SAME_PROBABILITY)
    if bool((raw < 0).any() | (raw > 1).any()) or not sums_up:
        return
    probabilities = raw.sigmoid() if one else raw.softmax(-1)
    same = bool((raw - active).abs().max() <= _SAME_PROBABILITY)
    if not same and bool((probabilities - active).abs().max() <= _SAME_PROBABILITY):
        return
    raise EndpointError(
        f"{url} answers {_shown(raw)} with use_activation false and {_shown(active)} with true: "
        "nothing shows that the first are the head's own outputs; expected a server that heeds "
        "use_activation (vLLM 0.25 or newer)"
    )


def _check_reads_on(url: str, task: Task, whole: Tensor, part: Tensor, length: int) -> None:
    """Raises EndpointError: what is read is not the last token of a text that is read forwards."""
    if task == TASKS[0]:
        if not _close(whole[length - 1], part[-1]):
            raise EndpointError(
                f"{url} answers {_shown(part[-1:])} for {length} tokens, and "
                f"{_shown(whole[length - 1 : length])} there when more follow: expected a decoder, "
                "whose values do not look ahead"
            )
    elif bool((whole - part).abs().max() <= _NOTHING * whole.abs().max()):
        raise EndpointError(
            f"{url} answers {_shown(whole)} for a text and for half of it: expected what its last "
            'token says; start it with --pooler-config \'{"task": "classify", "pooling_type": '
            '"LAST"}\''
        )


def _close(one: Tensor, other: Tensor) -> bool:
    most = float(torch.maximum(one.abs(), other.abs()).max())
    return bool((one - other).abs().max() <= _NOISE * most + 1e-3)


def _shown(outputs: Tensor) -> str:
    return ", ".join(f"{each:.4g}" for each in outputs.flatten()[-3:].tolist())
