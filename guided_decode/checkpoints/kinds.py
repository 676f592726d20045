"""Which family a checkpoint is of: by its kind, or by positive evidence alone."""

from dataclasses import replace
from typing import Any

from guided_decode.checkpoints.families import (
    BOS_RULES,
    FAMILIES,
    TERMINAL_RULES,
    BosRule,
    Family,
    find_family,
)
from guided_decode.checkpoints.head import what_it_could_be
from guided_decode.checkpoints.source import METADATA_FIELD, Source
from guided_decode.scorer import TerminalRule


def choose_family(
    source: Source,
    kind: str = "auto",
    *,
    bos: BosRule | None = None,
    terminal: TerminalRule | None = None,
) -> Family:
    """The checkpoint's family, with its BOS and terminal rules as far as they were given.

    "auto" believes a registered name, the metadata of our own tools, a sequence-classification
    head with one label, and a class that only one kind's trainers write, in this order. A rule that
    is not given comes from the metadata, else from the family.

    Raises ValueError: an unknown kind or rule, or no evidence under "auto" (the kinds that the
    checkpoint could be are listed).
    """
    metadata = _metadata(source)
    family = find_family(_evidence(source, metadata) if kind == "auto" else kind)
    family = family.of_class(source.architecture)
    if metadata.get("kind") == family.kind:
        bos = bos or metadata.get("bos")
        terminal = terminal or metadata.get("terminal")
    _check_rule("bos", bos, BOS_RULES)
    _check_rule("terminal", terminal, TERMINAL_RULES)
    return replace(family, bos=bos or family.bos, terminal=terminal or family.terminal)


def _check_rule(name: str, given: object, choices: tuple[str, ...]) -> None:
    if given is not None and given not in choices:
        raise ValueError(f"{name}={given!r}: expected one of {', '.join(choices)}")


def _metadata(source: Source) -> dict[str, Any]:
    metadata = getattr(source.config, METADATA_FIELD, None) or {}
    if not isinstance(metadata, dict):
        raise ValueError(
            f"{source.name} has {METADATA_FIELD!r}: {metadata!r} in its config: expected an object "
            "with kind, bos and terminal; mend it or remove it"
        )
    return metadata


def _evidence(source: Source, metadata: dict[str, Any]) -> str:
    if source.record is not None and source.record.kind is not None:
        return source.record.kind
    if metadata.get("kind") in FAMILIES:
        return str(metadata["kind"])
    if source.architecture.endswith("ForSequenceClassification") and source.config.num_labels == 1:
        return "reward-model"
    for family in FAMILIES.values():
        if family.evidence and source.architecture.endswith(family.evidence):
            return family.kind
    raise ValueError(
        f'{source.name} ({source.architecture or "no class named"}): kind="auto" has no evidence '
        f"of what trained it; it could be {what_it_could_be(source)}; pass kind="
    )
