"""How a known checkpoint is read: its family's conventions, and its own format."""

from dataclasses import dataclass

from guided_decode.checkpoints.families import BosRule, ReadPosition, find_family
from guided_decode.checkpoints.prompts import find_format
from guided_decode.checkpoints.record import CHAT_TEMPLATE, Record
from guided_decode.checkpoints.steps import find_steps
from guided_decode.scorer import TerminalRule


@dataclass(frozen=True, slots=True)
class Conventions:
    """How one record of the registry is read; None for a policy that is only decoded.

    bos: whether a leading BOS is kept. read: where the score is taken. terminal: the rule for
    candidates that end a response. transform: from the head's output to a value. format_bos:
    whether texts of its prompt format begin with BOS; None: its chat template says so. aggregate:
    from the rewards of a response's steps to its value.
    """

    bos: BosRule | None
    read: ReadPosition | None
    terminal: TerminalRule | None
    transform: str | None
    format_bos: bool | None
    aggregate: str | None = None


def conventions_of(record: Record) -> Conventions:
    """The conventions of a record, as `load_scorer` follows them."""
    template = record.prompt_format == CHAT_TEMPLATE
    format_bos = None if template else find_format(record.prompt_format).bos
    if record.kind is None:
        return Conventions(None, None, None, None, format_bos)
    family = find_family(record.kind).of_class(record.architecture)
    transform = str(family.transform_of(record.head_labels)) if family.heads else None
    aggregate = None if record.steps is None else find_steps(record.steps).aggregate
    return Conventions(family.bos, family.read, family.terminal, transform, format_bos, aggregate)
