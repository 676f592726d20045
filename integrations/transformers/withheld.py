"""What `generate` knows and does not hand on: a streamer, an assistant, synced GPUs, its options.

`generate` drops its own arguments where `custom_generate` is a callable, whatever its signature
says: they can be seen in its frame alone. A streamer that is dropped has got the prompt, and never
its end, so who reads it would wait for ever. A stopping criterion is told nothing of beams either.
"""

import inspect
import sys
from types import CodeType, FrameType
from typing import Any, NamedTuple

from transformers import GenerationConfig, GenerationMixin
from transformers.generation.streamers import BaseStreamer

from guided_decode.integrations.transformers.checked_arguments import check_streamer

_GENERATE: CodeType = inspect.unwrap(GenerationMixin.generate).__code__


class Withheld(NamedTuple):
    """The arguments of the `generate` call that is running; what was not given is None."""

    streamer: BaseStreamer | None = None
    assistant_model: Any = None
    synced_gpus: bool | None = None


def withheld_arguments() -> Withheld:
    """Of the innermost `generate` call above us; empty outside of one."""
    frame = _generate_frame()
    if frame is None:
        return Withheld()
    given = frame.f_locals
    return Withheld(*(given.get(name) for name in Withheld._fields))


def running_options() -> GenerationConfig | None:
    """The settings of the innermost `generate` call above us; None outside of one."""
    frame = _generate_frame()
    options = None if frame is None else frame.f_locals.get("generation_config")
    return options if isinstance(options, GenerationConfig) else None


def _generate_frame() -> FrameType | None:
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _GENERATE:
        frame = frame.f_back  # type: ignore[assignment]
    return frame


def refuse_assistant(assistant: Any) -> None:
    """Raises ValueError: an assistant model."""
    if assistant is not None:
        raise ValueError(
            f"assistant_model={type(assistant).__name__} was given to generate beside "
            "custom_generate: a draft's tokens cannot be guided; drop assistant_model"
        )


def chosen_streamer(
    own: BaseStreamer | None, of_generate: BaseStreamer | None
) -> BaseStreamer | None:
    """The streamer of a call; raises ValueError where there are two, or what is none."""
    if own is not None and of_generate is not None:
        raise ValueError(
            "streamer was given to generate and to the custom loop: tokens would come twice; "
            "drop one of them"
        )
    streamer = of_generate if own is None else own
    check_streamer(streamer, needs=("put", "end"))
    return streamer
