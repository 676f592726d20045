"""One decoding loop for every way: plain, guided by us, and guided as others do it.

The policy runs on a slot pool in CUDA graphs, one token a row, as the critic does. A step chooses
the largest logit of each row, and its seconds are the host's until the token ids are there.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from guided_decode import GuidanceConfig, PrefixHandle
from guided_decode.forward.graphs import TOKEN_BUCKETS, GraphedForward
from guided_decode.forward.packed import PackedBatch
from guided_decode.forward.packed_model import PackedModel
from guided_decode.guidance.step import guide_rows
from guided_decode.scorer import Scorer

Handles = Sequence[PrefixHandle]


class Policy(Protocol):
    def next_logits(self, handles: Handles) -> Tensor:
        """float32 [rows, vocab] after each row, valid until the next call."""
        ...


def begin(packed: PackedModel, handles: Handles, *, drawn: bool) -> None:
    """Puts prefixes into a cache.

    drawn: their keys and values are what lies in the pool, instead of forwarded.
    """
    cache = packed.cache
    cache.begin_batch()
    placements = [packed.place(packed.row(handle, i, None, 0)) for i, handle in enumerate(handles)]
    assert all(placement is not None for placement in placements), "the pool is too small"
    if drawn:
        cache.write_tables()
    else:
        for batch in packed.batches(placements):
            packed.forward(batch)
    cache.end_batch()


def draw_pool(packed: PackedModel) -> None:
    """Fills a pool with normal keys and values: decoding costs the same, and no prefill."""
    pool = packed.cache.pool
    for tensor in (*pool.keys, *pool.layer_values):
        tensor.normal_()


class PooledPolicy:
    """The policy's trunk on its slot pool, and lm_head, in one graph."""

    def __init__(self, packed: PackedModel, lm_head: nn.Module, rows: int, *, capture: bool):
        self.packed = packed
        self.lm_head = lm_head
        most = next((n for n in TOKEN_BUCKETS if n >= rows), rows)
        self.logits = torch.empty(
            most, packed.vocab_size, dtype=torch.float32, device=packed.device
        )
        self.graphs = GraphedForward(packed, self._write, capture=capture)

    def next_logits(self, handles: Handles) -> Tensor:
        cache = self.packed.cache
        cache.begin_batch()
        placements = [
            self.packed.place(self.packed.row(handle, i, None, 0), reread_last=True)
            for i, handle in enumerate(handles)
        ]
        (batch,) = self.packed.batches(placements)
        assert len(batch.token_ids) == len(handles)
        if not self.graphs.run(batch):
            self._write(batch)
        cache.end_batch()
        return self.logits[: len(handles)]

    def _write(self, batch: PackedBatch) -> None:
        hidden = self.packed.forward(batch)
        self.logits[: len(hidden)].copy_(self.lm_head(hidden))


class Guide:
    """What a way does between the policy's logits and the choice: here nothing."""

    def __call__(self, logits: Tensor, handles: Handles) -> Tensor:
        """Logits that the next token is chosen by, [rows, vocab]."""
        return logits

    def choose(self, logits: Tensor) -> list[int]:
        """The next token of each row: the step's last copy to the host."""
        return logits.argmax(-1).tolist()


# No token has this id: telling terminals apart costs what it costs, and none is met.
_TERMINALS = (1 << 30,)


class Guided(Guide):
    """The package: a scorer and its guidance rule."""

    def __init__(self, scorer: Scorer, config: GuidanceConfig) -> None:
        self.scorer = scorer
        self.config = config

    def __call__(self, logits: Tensor, handles: Handles) -> Tensor:
        return guide_rows(self.scorer, logits, handles, self.config, terminals=_TERMINALS)


class Gated(Guided):
    """The same with a gate at 0.9 that lets a scripted share of the rows pass.

    Random weights are never so sure: on its turns a row's largest logit is raised above the gate,
    and the gate finds that out by itself.
    """

    def __init__(
        self, scorer: Scorer, config: GuidanceConfig, rows: int, rate: float, device: torch.device
    ) -> None:
        super().__init__(scorer, config)
        self.raised = gate_script(rows, rate).to(device)
        self.turn = 0

    def __call__(self, logits: Tensor, handles: Handles) -> Tensor:
        raised = self.raised[self.turn % len(self.raised)]
        self.turn += 1
        top = logits.argmax(-1, keepdim=True)
        return super().__call__(logits.scatter_add(1, top, raised[:, None]), handles)


# Steps in which each row has its exact share of gated ones.
GATE_PERIOD = 10
_RAISE = 1000.0


def gate_script(rows: int, rate: float, periods: int = 8, seed: int = 0) -> Tensor:
    """What is added to the largest logit, float32 [steps, rows]: 0 where the row is scored."""
    generator = torch.Generator().manual_seed(seed)
    gated = round(rate * GATE_PERIOD)
    order = torch.rand(periods, GATE_PERIOD, rows, generator=generator).argsort(1)
    return torch.where(order < gated, _RAISE, 0.0).flatten(0, 1)


class Lane:
    """One way at work on rows of its own."""

    def __init__(
        self,
        name: str,
        policy: Policy,
        guide: Guide,
        handles: list[PrefixHandle],
        graphs: Sequence[GraphedForward] = (),
        *,
        mean: bool = False,
        merged: Sequence[int] = (),
    ) -> None:
        """
        Args:
            graphs: of its forwards; a step that captured one is not counted.
            merged: how many layers of each of its models are merged, the policy's first.
            mean: steps differ by design, so their mean is what one costs, not their median.
        """
        self.name = name
        self.policy = policy
        self.guide = guide
        self.handles = handles
        self.graphs = graphs
        self.merged = merged
        self._timed_steps = self._replays = 0
        self.typical = statistics.fmean if mean else statistics.median
        self.rounds: list[list[float]] = []

    def step(self) -> list[int]:
        """Decodes one token a row."""
        logits = self.guide(self.policy.next_logits(self.handles), self.handles)
        tokens = self.guide.choose(logits)
        for handle, token in zip(self.handles, tokens, strict=True):
            handle.append(token)
        return tokens

    def turn(self, steps: int) -> None:
        """Times a round of steps."""
        seconds = []
        for _ in range(steps):
            captures, replays = self._counts()
            begun = time.perf_counter()
            self.step()
            taken = time.perf_counter() - begun
            after = self._counts()
            if after[0] == captures:
                seconds.append(taken)
                self._timed_steps += 1
                self._replays += after[1] - replays
        if seconds:
            self.rounds.append(seconds)

    def _counts(self) -> tuple[int, int]:
        return sum(g.captures for g in self.graphs), sum(g.replays for g in self.graphs)

    def graph_replays(self) -> float | None:
        """Graphs that a timed step replayed, on average; None where no forward has any."""
        if not self.graphs or not self._timed_steps:
            return None
        return self._replays / self._timed_steps

    def by_round(self) -> list[float]:
        """Seconds of a step, a figure a round."""
        return [self.typical(seconds) for seconds in self.rounds]


def take_turns(lanes: Sequence[Lane], rounds: int, steps: int, warm: int) -> None:
    """Warms every lane, then times them in turn; who begins changes from round to round."""
    for lane in lanes:
        for _ in range(warm):
            lane.step()
    for turn in range(rounds):
        first = turn % len(lanes)
        for lane in [*lanes[first:], *lanes[:first]]:
            lane.turn(steps)


def part_seconds(lane: Lane, steps: int = 5) -> dict[str, float]:
    """Where a step's time goes, each part waited for: medians."""
    parts: dict[str, list[float]] = {"policy": [], "guidance": [], "choice": []}
    for _ in range(steps):
        marks = [_now()]
        logits = lane.policy.next_logits(lane.handles)
        marks.append(_now())
        logits = lane.guide(logits, lane.handles)
        marks.append(_now())
        tokens = lane.guide.choose(logits)
        for handle, token in zip(lane.handles, tokens, strict=True):
            handle.append(token)
        marks.append(_now())
        for part, start, end in zip(parts, marks, marks[1:], strict=False):
            parts[part].append(end - start)
    return {part: statistics.median(seconds) for part, seconds in parts.items()}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
