"""A cell of the table: rows of one batch size and prefix, and the ways that decode them."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.gpu.floors import Size
from benchmarks.gpu.loop import (
    Gated,
    Guide,
    Guided,
    Lane,
    PooledPolicy,
    begin,
    draw_pool,
)
from benchmarks.gpu.models import Models
from benchmarks.gpu.rivals import GENERATED, CopiedCache, Recomputed
from benchmarks.gpu.trunk import LookaheadPolicy, SiblingPruning, ValuedPolicy, trunk_of
from guided_decode import GuidanceConfig, PrefixHandle
from guided_decode.forward.graphs import GraphedForward
from guided_decode.forward.packed_model import PackedModel
from guided_decode.scoring.critic import CriticScorer
from guided_decode.scoring.trunk_scorer import TrunkScorer

GATE, GATE_RATE = 0.9, 0.7
# Losers stay in a critic's cache until they are evicted: so many tokens of them, and of two steps
# at least.
_KEPT_LOSERS = 4096


@dataclass(frozen=True)
class Cell:
    """ways: "plain", "pruning", and "k 16", "gated k 16", "unmerged k 16", "trunk k 16",
    "copied k 16", "recomputed k 16" for any k; "generate" is stock `generate`. unmerged: the
    critic's layers are transformers' own.
    """

    size: Size
    batch: int
    prefix: int
    ways: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.size.name}, batch {self.batch}, prefix {self.prefix}"


def k_of(way: str) -> int | None:
    """The candidates of a way; None where there are none."""
    head, _, k = way.rpartition("k ")
    return int(k) if k.isdigit() and (head == "" or head.endswith(" ")) else None


def policy_slots(batch: int, prefix: int, ways: tuple[str, ...], steps: int) -> int:
    """Tokens that the plain policy's pool holds: ways share all of a prompt but its last token."""
    return batch * (prefix + len(ways) * (steps + 2))


def critic_slots(batch: int, prefix: int, ways: tuple[str, ...], steps: int) -> int:
    """The same of a critic, with losers: of all steps where that is little, else of a few."""
    widths = [k_of(way) or 0 for way in ways]
    every = batch * steps * sum(widths)
    kept = min(every, max(_KEPT_LOSERS, 2 * batch * max(widths)))
    return policy_slots(batch, prefix, ways, steps) + kept


def gigabytes(cell: Cell, steps: int) -> float:
    """Device memory of a cell: both models, and the pools or caches of its ways."""
    size, ways = cell.size, cell.ways
    weights = 2 * (size.trunk_weights + 2 * size.table_weights) * size.itemsize
    shape = (cell.batch, cell.prefix, ways, steps)
    pools = policy_slots(*shape)
    if any(_uses_critic_pool(way) for way in ways):
        pools += critic_slots(*shape)
    pools += critic_slots(*shape) * any(way.startswith("trunk") for way in ways)
    pools += critic_slots(*shape) * any(way.startswith("unmerged") for way in ways)
    pools += policy_slots(*shape) * ("pruning" in ways)
    for way in ways:
        if way.startswith("copied"):
            pools += cell.batch * (k_of(way) or 1) * cell.prefix
        elif way == "generate":
            pools += cell.batch * (cell.prefix + GENERATED)
    return (weights + pools * size.kv_bytes) / 1e9


def _uses_critic_pool(way: str) -> bool:
    return way.startswith(("k ", "gated"))


def _graphs(scorer: CriticScorer) -> list[GraphedForward]:
    return [] if scorer.graphs is None else [scorer.graphs]


class Setup:
    """What the ways of one cell share: pools, prompts, graphs."""

    def __init__(
        self,
        models: Models,
        batch: int,
        prefix: int,
        ways: tuple[str, ...],
        *,
        steps: int,
        drawn: bool = True,
        capture: bool | None = None,
    ) -> None:
        """
        Args:
            models: policy and critic.
            batch, prefix: rows, and tokens of each prompt.
            ways: all that `lane` will be asked for.
            steps: the most steps of a way.
            drawn: keys and values of the prompts are random instead of computed.
            capture: CUDA graphs; None: on a GPU. False runs the same padded batches.
        """
        self.models, self.batch, self.prefix, self.ways = models, batch, prefix, ways
        self.steps, self.drawn = steps, drawn
        self.capture = models.device.type == "cuda" if capture is None else capture
        generator = torch.Generator().manual_seed(batch * 10007 + prefix)
        self.shared = torch.randint(3, models.size.vocab, (batch, prefix - 1), generator=generator)
        # The last token is each way's own, so that no way finds another's work in a cache.
        self.last = torch.stack(
            [torch.randperm(models.size.vocab, generator=generator)[:batch] for _ in ways]
        )

    def prompts(self, way: str) -> Tensor:
        """int64 [batch, prefix] on the device."""
        last = self.last[self.ways.index(way)]
        return torch.cat([self.shared, last[:, None]], -1).to(self.models.device)

    def lane(self, way: str) -> Lane:
        """One way, its rows in the caches up to their last token."""
        k = k_of(way)
        config = None if k is None else GuidanceConfig(
            beta=1.0, top_k=k, gate=GATE if way.startswith("gated") else None
        )  # fmt: skip
        handles = [PrefixHandle(row) for row in self.shared]
        policy, guide, packed, graphs = self._parts(way, config)
        for each in packed:
            begin(each, handles, drawn=self.drawn)
        for handle, token in zip(handles, self.last[self.ways.index(way)].tolist(), strict=True):
            handle.append(token)
        merged = [each.merged_layers for each in packed]
        mean = way.startswith("gated")
        return Lane(way, policy, guide, handles, graphs, mean=mean, merged=merged)

    def _parts(self, way, config):
        """Policy, guide, the caches that want the prompts, and the graphs of its forwards."""
        if way.startswith("trunk"):
            scorer = self._trunk_scorer
            policy = LookaheadPolicy(self.models, scorer)
            return policy, Guided(scorer, config), [scorer.model], _graphs(scorer)
        if way == "pruning":
            valued = self._valued
            return valued, SiblingPruning(valued), [valued.packed], [valued.graphs]
        plain = self._policy
        packed = [plain.packed]
        guide, counted = self._guide(way, config)
        if counted is not None:
            packed.append(counted.model)

        return plain, guide, packed, [plain.graphs, *([] if counted is None else _graphs(counted))]

    def _guide(self, way: str, config: GuidanceConfig | None) -> tuple[Guide, CriticScorer | None]:
        if config is None:
            return Guide(), None
        if way.startswith("copied"):
            return CopiedCache(self.models, self.prompts(way), config, drawn=self.drawn), None
        if way.startswith("recomputed"):
            return Recomputed(self.models.critic, self.models.head, config), None
        if way.startswith("unmerged"):
            return Guided(self._unmerged, config), self._unmerged
        scorer = self._critic
        if way.startswith("gated"):
            return Gated(scorer, config, self.batch, GATE_RATE, self.models.device), scorer
        return Guided(scorer, config), scorer

    def _shape(self) -> tuple[int, int, tuple[str, ...], int]:
        return self.batch, self.prefix, self.ways, self.steps

    def _pool(self, packed: PackedModel) -> PackedModel:
        if self.drawn:
            draw_pool(packed)
        return packed

    @cached_property
    def _policy(self) -> PooledPolicy:
        trunk = self.models.policy_trunk()
        packed = PackedModel(
            trunk, "the policy", cache_tokens=policy_slots(*self._shape()), fused=True, merged=True
        )
        lm_head = self.models.policy.lm_head
        return PooledPolicy(self._pool(packed), lm_head, self.batch, capture=self.capture)

    @cached_property
    def _critic(self) -> CriticScorer:
        return self._critic_of(merged=True)

    @cached_property
    def _unmerged(self) -> CriticScorer:
        return self._critic_of(merged=False)

    def _critic_of(self, *, merged: bool) -> CriticScorer:
        packed = PackedModel(
            self.models.critic_trunk(),
            "the critic",
            cache_tokens=critic_slots(*self._shape()),
            fused=True,
            merged=merged,
        )
        return CriticScorer(self._pool(packed), self.models.head, graphs=True)

    @cached_property
    def _trunk_scorer(self) -> TrunkScorer:
        packed, head = trunk_of(self.models, critic_slots(*self._shape()), fused=True, merged=True)
        return TrunkScorer(self._pool(packed), head, graphs=True)

    @cached_property
    def _valued(self) -> ValuedPolicy:
        packed, head = trunk_of(self.models, policy_slots(*self._shape()), fused=True, merged=True)
        return ValuedPolicy(self.models, self._pool(packed), head, self.batch, capture=self.capture)
