"""What is not vLLM's own, or comes after guidance, and may change what guidance relies on.

Schedulers and samplers of others may rewrite the histories of requests; what acts on the logits
after guidance may forbid what it left, or let through what it masked.
"""

import logging
import sys
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger("guided_decode")

_RUNNER_V2 = "vllm.v1.worker.gpu.model_runner"
_STATE = "vllm.v1.worker.gpu.model_states.default"


def may_rewrite(vllm_config: Any) -> bool:
    """Whether an engine has what may change a history without changing its length (beam search).

    Its histories are then read whole at every step, and so stay right.
    """
    given = [("the scheduler", vllm_config.scheduler_config.scheduler_cls)]
    given += [("what chooses the sampler", each) for each in _sampler_choosers(vllm_config)]
    found = [
        f"{what} is {name}"
        for what, name in ((what, _name(each)) for what, each in given)
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


def _sampler_choosers(vllm_config: Any) -> Iterator[Any]:
    """What has a word in which sampler Model Runner V2 takes, if that runs."""
    runner = sys.modules.get(_RUNNER_V2)
    if runner is None:
        return
    # A model's state, which this function chooses, may bring a sampler of its own.
    yield getattr(runner, "init_model_state", None)
    state = getattr(sys.modules.get(_STATE), "DefaultModelState", None)
    yield getattr(state, "custom_sampler", None)
    from vllm.model_executor.model_loader.utils import get_model_architecture

    model = get_model_architecture(vllm_config.model_config)[0]
    yield getattr(model, "get_model_state_cls", None)


def _name(given: Any) -> str | None:
    if given is None or isinstance(given, str):
        return given
    return f"{given.__module__}.{getattr(given, '__qualname__', given)}"
