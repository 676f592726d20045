"""What is not vLLM's own, or comes after guidance, and may change what guidance relies on.

Schedulers and samplers of others may rewrite the histories of requests; what acts on the logits
after guidance may forbid what it left, or let through what it masked.
"""

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


def later_processors(model_config: Any) -> list[str]:
    """The processors that --logits-processors lists after guidance."""
    given = list(getattr(model_config, "logits_processors", None) or ())
    names = [one if isinstance(one, str) else one.__name__ for one in given]
    own = [i for i, name in enumerate(names) if name.endswith("ValueGuidedLogitsProcessor")]
    return names[own[0] + 1 :] if own else []


def may_overrule(vllm_config: Any) -> bool:
    """Whether a token that is forbidden may be sampled all the same."""
    # A budget of thinking tokens forces their end.
    budgets = getattr(vllm_config, "reasoning_config", None) is not None
    return budgets or bool(later_processors(vllm_config.model_config))


def _state_chooser() -> Any:
    return getattr(sys.modules.get(_RUNNER_V2), "init_model_state", None)


def _name(given: Any) -> str | None:
    if given is None or isinstance(given, str):
        return given
    return f"{given.__module__}.{getattr(given, '__qualname__', given)}"
