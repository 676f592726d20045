"""`--config`: a file whose settings are a command's defaults; what is typed wins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from guided_decode.cli import config_file
from guided_decode.cli.config_file import (
    GUIDANCE,
    MODELS,
    Problems,
    Section,
    Setting,
    refuse,
    unknown,
)
from guided_decode.cli.errors import one_line
from guided_decode.cli.guidance_options import GuidanceOptions
from guided_decode.cli.model_options import ScorerOptions
from guided_decode.cli.remote_options import RemoteOptions

_HELP = "settings as YAML or JSON, by section (guided-decode calibrate writes one); options win"
# By their names as options of `generate`.
_MODEL_KEYS = ("policy", "scorer", "device", "scorer_device", "dtype",
               *(n for group in (ScorerOptions, RemoteOptions)
                 for n in group.__dataclass_fields__))  # fmt: skip
_GUIDANCE_KEYS = tuple(GuidanceOptions.__dataclass_fields__)
_OWN_NAME, _SEARCH = "config", "search"


@dataclass(frozen=True, slots=True)
class _Read:
    """What a command reads: sections, with the names that each may have."""

    context: Any

    @property
    def command(self) -> str:
        return str(self.context.info_name)

    @property
    def parameters(self) -> dict[str, Any]:
        return {each.name: each for each in self.context.command.params if each.name != _OWN_NAME}

    def settings(self, sections: dict[str, Section]) -> Iterator[tuple[str, str, Setting]]:
        """Section, name and setting of all that this command reads; unknown names with them."""
        for section in (MODELS, GUIDANCE, self.command):
            for name, setting in sections.get(section, {}).items():
                yield section, name, setting

    def known(self, section: str) -> list[str]:
        """The names that a section may have here."""
        parameters = self.parameters
        if section == GUIDANCE and self.command == _SEARCH:
            return list(_GUIDANCE_KEYS)
        every = {MODELS: _MODEL_KEYS, GUIDANCE: _GUIDANCE_KEYS}.get(section, tuple(parameters))
        return [name for name in every if name in parameters]


def _load(context: Any, given: Any) -> Any:
    """Makes the settings of files the command's defaults."""
    files = [given] if isinstance(given, Path) else list(given or ())
    if context.resilient_parsing:
        return given
    for file in files:
        if config_file.is_config(file):
            sections, problems = config_file.read_config(file)
            defaults = _defaults(_Read(context), sections, problems)
            refuse(file, problems)
            context.default_map = {**(context.default_map or {}), **defaults}
    return given


def _defaults(read: _Read, sections: dict[str, Section], problems: Problems) -> dict[str, Any]:
    """The defaults by parameter; names and values that are none are added to the problems."""
    defaults: dict[str, Any] = {}
    for section, name, setting in read.settings(sections):
        if name not in read.known(section):
            said = unknown(name, read.known(section), f"setting of {read.command} in {section}")
            problems.append((setting.line, said))
            continue
        # Of guidance a search of whole pieces knows beta alone: see `calibrated_beta`.
        if setting.value is None or (section == GUIDANCE and read.command == _SEARCH):
            continue
        value, problem = _typed(read, name, setting.value)
        if problem:
            problems.append((setting.line, f"{name}: {setting.value!r}: {problem}"))
        defaults[name] = value
    return defaults


def _typed(read: _Read, name: str, value: Any) -> tuple[Any, str]:
    """The value as the option takes it, and what is wrong with it."""
    parameter = read.parameters[name]
    if isinstance(value, dict):
        # As it is typed: --device-map '{"MODULE": "DEVICE"}'.
        return json.dumps(value), "" if name == "device_map" else "expected one value"
    if isinstance(value, list) and not parameter.multiple:
        return value, "expected one value"
    try:
        taken = parameter.process_value(read.context, value)
    except typer.BadParameter as error:
        return value, one_line(error)
    # What the conversion of typed text lets pass.
    if isinstance(value, bool) and not isinstance(taken, bool):
        return value, f"expected a {type(taken).__name__}"
    if isinstance(value, float) and isinstance(taken, int):
        return value, "expected an integer"
    return value, ""


def _option(*, several: bool) -> Any:
    return typer.Option("--config", metavar="FILE", help=_HELP, is_eager=True, callback=_callback,
                        exists=not several, dir_okay=False)  # fmt: skip


def _callback(context: typer.Context, value: Any) -> Any:
    return _load(context, value)


def calibrated_beta(file: Path | None) -> float | None:
    """The beta of a file's guidance, in nats a unit of value, as smc's is."""
    if file is None:
        return None
    found = config_file.read_config(file)[0].get(GUIDANCE, {}).get("beta")
    return None if found is None or found.value is None else float(found.value)


Config = Annotated[Path | None, _option(several=False)]
# vLLM's server has an option of that name too: its files are handed on.
Configs = Annotated[list[Path] | None, _option(several=True)]
