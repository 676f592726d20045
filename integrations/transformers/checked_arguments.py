"""What a guided decoding is made of (scorer, configs, on_error, streamer), checked when made."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from guided_decode.guidance.config import GuidanceConfig
from guided_decode.guidance.rule import Configs
from guided_decode.guidance.step import check_on_error
from guided_decode.scorer import Scorer


def checked_configs(scorer: object, config: object, on_error: object) -> Configs:
    """The config, or the configs as a tuple that the caller's later changes do not reach.

    Raises ValueError: what is no scorer, no GuidanceConfig nor several, or no value of on_error.
    """
    _check_scorer(scorer)
    check_on_error(on_error)
    if isinstance(config, GuidanceConfig):
        return config
    if isinstance(config, Sequence) and not isinstance(config, str):
        for number, each in enumerate(config):
            if not isinstance(each, GuidanceConfig):
                raise ValueError(f"config[{number}] {_no_config(each)}")
        if config:
            return tuple(config)
        raise ValueError("config is an empty list: expected a GuidanceConfig, or one a prompt")
    raise ValueError(f"config {_no_config(config)}, or a list of one a prompt")


def _no_config(given: object) -> str:
    if given is None:
        return "is None: expected a GuidanceConfig"
    if isinstance(given, dict):
        return f"is a dict: expected GuidanceConfig(**{given!r})"
    return f"is {given!r:.80}, a {type(given).__name__}: expected a GuidanceConfig"


def _check_scorer(given: object) -> None:
    if isinstance(given, str | Path):
        raise ValueError(
            f"scorer={str(given)!r} is a name or a path: expected a scorer; load it: "
            f"load_scorer({str(given)!r})"
        )
    if isinstance(given, nn.Module):
        raise ValueError(
            f"scorer is a model, a {type(given).__name__}: expected a scorer; load it: "
            "load_scorer(model, kind=...)"
        )
    if isinstance(given, list | tuple):
        raise ValueError(
            f"scorer is a {type(given).__name__} of {len(given)}: expected one scorer, as of "
            "load_scorer(...); a batch is guided by one"
        )
    if isinstance(given, type) or not isinstance(given, Scorer):
        raise ValueError(
            f"scorer is {given!r:.80}, a {type(given).__name__}: expected a scorer; load it: "
            "load_scorer(...), or write a class with all that guided_decode.Scorer names"
        )


def check_beams(num_beams: object) -> None:
    """Raises ValueError: what is no number of beams."""
    if isinstance(num_beams, bool) or not isinstance(num_beams, int) or num_beams < 1:
        raise ValueError(f"num_beams={num_beams!r}: expected an integer of at least 1")


def check_streamer(streamer: Any, needs: Sequence[str] = ("put",)) -> None:
    """Raises ValueError: what tokens cannot be put to, or has not all that is needed."""
    if streamer is not None and not all(hasattr(streamer, name) for name in needs):
        raise ValueError(
            f"streamer is {streamer!r:.80}, a {type(streamer).__name__}: expected a streamer with "
            "put(value) and end(), such as TextStreamer(tokenizer)"
        )
