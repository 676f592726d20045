"""The least time of a decoding step: the bytes that it has to read, over the card's bandwidth."""

from __future__ import annotations

from guided_decode.checkpoints.plan.footprint import Workload
from guided_decode.checkpoints.plan.model import PlannedModel
from guided_decode.checkpoints.plan.weight_forms import BF16, WeightForm


def policy_bytes(policy: PlannedModel, work: Workload, shards: int = 1) -> int:
    """Read on each GPU by the policy's step: its weights once, and each row's keys and values."""
    cached = work.batch * work.length * policy.kv_bytes(shards)
    return policy.read_bytes() // shards + cached


def scorer_bytes(
    models: tuple[PlannedModel, ...],
    work: Workload,
    form: WeightForm = BF16,
    shards: int = 1,
) -> int:
    """Read on each GPU by the scorer's forward of all candidates, once for all of a prefix's."""
    return sum(
        model.read_bytes(form, shards)
        + work.batch * (work.length + _candidates(model, work)) * model.kv_bytes(shards)
        for model in models
    )


def unpacked_bytes(models: tuple[PlannedModel, ...], form: WeightForm, shards: int = 1) -> int:
    """What goes to memory and back beside that where each matrix is unpacked to bfloat16 first."""
    if not form.unpacks:
        return 0
    return sum(2 * BF16.matrix_bytes(model.shape) // shards for model in models)


def _candidates(model: PlannedModel, work: Workload) -> int:
    """Tokens of one row's forward: an implicit reward reads all candidates off the prefix."""
    return 1 if model.lm_head else work.top_k
