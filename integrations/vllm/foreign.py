"""Schedulers and samplers that are not vLLM's own, which may rewrite the histories of requests."""

import logging
import sys
from typing import Any

logger = logging.getLogger("guided_decode")

_RUNNER_V2 = "vllm.v1.worker.gpu.model_runner"


def may_rewrite(vllm_config: Any) -> bool:
    """Whether an engine has what may change a history without changing its length (beam search).

    Its histories are then read whole at every step, and so stay right.
    """
    found = [
        f"{what} is {name}"
        for what, name in (
            ("the scheduler", _name(vllm_config.scheduler_config.scheduler_cls)),
            # A model's state, which this function chooses, may bring a sampler of its own.
            ("what chooses the sampler", _name(_state_chooser())),
        )
        if name is not None and not name.startswith("vllm.")
    ]
    if found:
        logger.info(
            "%s, not vLLM's own: the histories of guided requests are read whole at every step",
            " and ".join(found),
        )
    return bool(found)


def _state_chooser() -> Any:
    return getattr(sys.modules.get(_RUNNER_V2), "init_model_state", None)


def _name(given: Any) -> str | None:
    if given is None or isinstance(given, str):
        return given
    return f"{given.__module__}.{getattr(given, '__qualname__', given)}"
