"""Heads of critics whose trunk is a GGUF file, which has none."""

from dataclasses import replace
from pathlib import Path

from guided_decode.checkpoints.registry import find
from guided_decode.checkpoints.source import Source
from guided_decode.checkpoints.trunk_head_loading import HeadLike
from guided_decode.checkpoints.weight_files import with_head
from guided_decode.scoring.trunk_head import KIND as TRUNK_HEAD


def with_head_beside(
    source: Source, kind: str, head: HeadLike | None, *, allow_pickle: bool
) -> tuple[Source, str, HeadLike | None]:
    """Source, kind and head as they are, but for a critic in a GGUF file: it has its head inside.

    Under kind "auto" a head is one on a policy's trunk, but where a config.json beside the file
    names the class of a critic.

    Raises ValueError: the head is no checkpoint and no file.
    """
    policy = kind == TRUNK_HEAD or (kind == "auto" and _is_policy(source))
    if head is None or not source.is_gguf or policy:
        return source, kind, head
    if not isinstance(head, str | Path):
        raise ValueError(
            f"head came as {type(head).__name__} for the GGUF file {source.name}: expected the "
            "checkpoint that it was converted from, or a safetensors file with its head; or "
            f'kind="{TRUNK_HEAD}" for a head on a policy'
        )
    record = find(head)
    where = str(head) if record is None or Path(head).exists() else record.location
    assert source.weights is not None
    weights = with_head(source.weights, where, allow_pickle)
    return replace(source, weights=weights), kind, None


def _is_policy(source: Source) -> bool:
    return not source.architecture.endswith("Classification")
