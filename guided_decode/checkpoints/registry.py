"""Known checkpoints: what each is, what it needs, and the policy that it pairs with."""

from pathlib import Path

from guided_decode.checkpoints.known import process_rewards, reasoners, reward_models, smol, tulu
from guided_decode.checkpoints.record import CHAT_TEMPLATE, Record
from guided_decode.checkpoints.shape import Shape

__all__ = [
    "CHAT_TEMPLATE", "POLICIES", "POLICY_TEMPLATE", "REGISTRY", "Record", "Shape", "find",
    "location_of",
]  # fmt: skip

# What it is called of a policy.
POLICY_TEMPLATE = CHAT_TEMPLATE

REGISTRY: tuple[Record, ...] = (
    *tulu.RECORDS,
    *reasoners.RECORDS,
    *process_rewards.RECORDS,
    *reward_models.RECORDS,
    *tulu.TINY_RECORDS,
    *smol.RECORDS,
)

# Causal LMs that the records above speak of and that are no scorers: their policies and references.
POLICIES: dict[str, Shape] = {
    **tulu.POLICIES,
    **reasoners.POLICIES,
    **process_rewards.POLICIES,
    **reward_models.POLICIES,
}


def find(name_or_path: str | Path) -> Record | None:
    """The record of a Hub id, a bare name, or a local folder whose last component is the name.

    Another owner's repository of the same name is not the checkpoint.
    """
    given, path = str(name_or_path), Path(name_or_path)
    known_as = {given, path.name} if path.is_dir() else {given}
    return next((record for record in REGISTRY if known_as & set(record.names)), None)


def location_of(name_or_path: str | Path) -> str:
    """What `from_pretrained` takes for it: a folder is itself, whatever it is called."""
    record = None if Path(name_or_path).is_dir() else find(name_or_path)
    return str(name_or_path) if record is None else record.location
