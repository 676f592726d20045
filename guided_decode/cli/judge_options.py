"""The options of `search` about a scorer on pooling servers, or with another tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any

import typer

from guided_decode.checkpoints.registry import find
from guided_decode.cli.errors import Refusal
from guided_decode.cli.model_options import ScorerOptions
from guided_decode.scoring.remote.address import is_address

_PANEL = "Scorers elsewhere, or of another tokenizer"
_URLS = ("http://", "https://")


def _option(text: str, *names: str, metavar: str | None = None, min: int | None = None) -> Any:
    return typer.Option(*names, help=text, metavar=metavar, min=min, rich_help_panel=_PANEL)


Checkpoint = Annotated[
    str | None,
    _option("of a scorer on servers: its name or folder, whose config and tokenizer are read "
            "\\[what they loaded]", metavar="NAME"),
]  # fmt: skip
Served = Annotated[str | None, _option("its name at pooling servers \\[their first]")]
KeyVariable = Annotated[
    str | None,
    _option("environment variable with the pooling servers' API key", metavar="VARIABLE"),
]
Concurrency = Annotated[
    int | None, _option("requests that a pooling server has at a time \\[32]", min=1)
]
ThroughText = Annotated[
    bool,
    _option("the scorer reads responses as text, in its own tokens and chat format",
            "--judge-through-text"),
]  # fmt: skip
Format = Annotated[
    str | None,
    _option(
        "the scorer's chat format, through text or of a process reward model \\[its own]",
        metavar="FORMAT",
    ),
]


@dataclass(frozen=True, slots=True)
class JudgeOptions:
    """How a scorer is met that is not of this machine, or reads other tokens."""

    scorer_checkpoint: Checkpoint = None
    scorer_served_name: Served = None
    scorer_api_key_env: KeyVariable = None
    scorer_concurrency: Concurrency = None
    judge_through_text: ThroughText = False
    judge_format: Format = None

    def given(self) -> list[str]:
        """Flags of what was given, in the order of the fields."""
        return [
            f"--{field.name.replace('_', '-')}"
            for field in fields(self)
            if getattr(self, field.name) not in (None, False)
        ]


def pooling_urls(scorer: str | None) -> list[str]:
    """The servers of a scorer that is named by URLs, with commas between; none of any other."""
    if scorer is None or not scorer.startswith(_URLS):
        return []
    return [each.strip() for each in scorer.split(",")]


def _may_read_steps(scorer: str, reading: ScorerOptions) -> bool:
    """Whether it may be a process reward model, which reads text in any case, as far as its name
    and kind say."""
    if pooling_urls(scorer) or is_address(scorer):
        return False
    record = find(scorer)
    kind = reading.given().get("kind") or (None if record is None else record.kind)
    return kind in (None, "process-reward")


def refuse_format(judge_format: str | None) -> None:
    """Raises Refusal: a format was given, and the scorer reads token ids."""
    if judge_format is not None:
        raise Refusal("--judge-format is the scorer's chat format through text: pass "
                      "--judge-through-text, or drop it")  # fmt: skip


# Of how a scorer is read, what its servers do not decide.
_OF_VALUES = ("kind", "bos", "terminal", "transform", "reward", "rope_theta", "revision",
              "trust_remote_code")  # fmt: skip
_OF_URLS = ("--scorer-served-name", "--scorer-api-key-env", "--scorer-concurrency")


def check_judging(scorer: str | None, reading: ScorerOptions, judging: JudgeOptions) -> None:
    """Raises Refusal: an option has nothing to say of this scorer."""
    given = judging.given()
    if scorer is None:
        if given:
            raise Refusal(f"{given[0]} came with a method that asks no scorer: drop it")
        return
    if pooling_urls(scorer):
        odd = [f"--{name.replace('_', '-')}" for name in reading.given()
               if name not in (*_OF_VALUES, "reference")]  # fmt: skip
        if odd:
            raise Refusal(f"{odd[0]} came with {scorer}, whose servers have loaded the scorer "
                          "themselves: drop it")  # fmt: skip
    else:
        odd = [flag for flag in given if flag in _OF_URLS]
        if odd:
            raise Refusal(f"{odd[0]} came with --scorer {scorer}, which is no pooling server: "
                          "expected http://HOST:PORT, several with commas; drop it")  # fmt: skip
        if judging.scorer_checkpoint is not None and not judging.judge_through_text:
            raise Refusal(
                f"--scorer-checkpoint {judging.scorer_checkpoint} says how a scorer on pooling "
                "servers is read, or whose tokenizer reads text: drop it"
            )
    if not (judging.judge_through_text or _may_read_steps(scorer, reading)):
        refuse_format(judging.judge_format)
    if judging.judge_through_text and reading.head is not None:
        raise Refusal("--head reads the policy's own hidden states, and --judge-through-text is "
                      "for scorers with other tokens: drop one of them")  # fmt: skip
