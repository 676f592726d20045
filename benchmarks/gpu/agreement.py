"""Before anything is timed: every way of the loop against full recomputation, in float32."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cells import Setup
from benchmarks.gpu.floors import Size
from benchmarks.gpu.loop import Guide, Lane
from benchmarks.gpu.models import Models
from benchmarks.gpu.rivals import Recomputed
from guided_decode import GuidanceConfig

SMALL = Size("small", 2, 256, 512, 4, 2, 1003, itemsize=4)
ROWS, PREFIX, K, STEPS = 3, 70, 4, 6
TOLERANCE = 1e-3
WAYS = (
    "plain",
    f"k {K}",
    f"unmerged k {K}",
    f"copied k {K}",
    f"recomputed k {K}",
    f"trunk k {K}",
    "pruning",
)


class DisagreementError(RuntimeError):
    """A way does not give the logits of full recomputation."""


def agreements(
    device: str, *, capture: bool, size: Size = SMALL, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """A record a way: its largest difference from the logits of stock modules without a cache.

    reason: why it must not be timed (more than TOLERANCE, another set of tokens left, an error);
    None where it agrees.
    """
    models = Models.random(size, device, torch.float32, seed)
    setup = Setup(models, ROWS, PREFIX, WAYS, steps=STEPS, drawn=False, capture=capture)
    for way in WAYS:
        record: dict[str, Any] = {"kind": "agreement", "way": kind_of(way), "reason": None}
        try:
            record["difference"] = _follow(setup.lane(way), _truth(models, way))
        except Exception as error:
            # The others are timed all the same.
            record["reason"] = f"{type(error).__name__}: {str(error)[:300]}"
        yield record


def kind_of(way: str) -> str:
    """A way without its number of candidates: "plain", "pruning", "k", "trunk k", "gated k", ..."""
    return way.rstrip("0123456789 ")


def _truth(models: Models, way: str) -> Callable[[Lane], Tensor]:
    """The logits that a way should choose by, by stock modules on whole prefixes."""
    config = GuidanceConfig(top_k=K)
    guide = Guide()
    if way.startswith("trunk"):
        guide = Recomputed(models.policy.model, models.head, config)
    elif way not in ("plain", "pruning"):
        guide = Recomputed(models.critic, models.head, config)

    def logits(lane: Lane) -> Tensor:
        ids = torch.stack([torch.from_numpy(h.tokens.copy()) for h in lane.handles])
        output = models.policy(ids.to(models.device), use_cache=False, logits_to_keep=1)
        return guide(output.logits[:, -1].float(), lane.handles)

    return logits


def _follow(lane: Lane, truth: Callable[[Lane], Tensor]) -> float:
    largest = 0.0
    for step in range(STEPS):
        wanted = truth(lane)
        found = lane.guide(lane.policy.next_logits(lane.handles), lane.handles)
        if not torch.equal(found.isfinite(), wanted.isfinite()):
            raise DisagreementError(f"{lane.name} keeps other candidates at step {step}")
        largest = max(largest, float((found - wanted)[wanted.isfinite()].abs().max()))
        if not largest <= TOLERANCE:
            raise DisagreementError(
                f"{lane.name} differs from full recomputation by {largest:.2g} at step {step}, "
                f"where {TOLERANCE:g} is allowed"
            )
        for handle, token in zip(lane.handles, lane.guide.choose(found), strict=True):
            handle.append(token)
    return largest
