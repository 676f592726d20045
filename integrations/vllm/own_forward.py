"""Forwards of candidates by vLLM's own model, over the keys and values that its requests have.

A candidate is a decode row of its own: one token at the position after its prefix. Its block table
is the request's for all full blocks; the last block, which other candidates share and which it
would write to, is replaced by a block that was set aside (`runner_seat`), into which what the
prefix has of it is copied. Attention sees an ordinary decode step: no mask, no kernel of ours, any
backend. Nothing that a request owns is written.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guided_decode.integrations.vllm.runner_seat import RunnerSeat


class LookAhead(NamedTuple):
    """One candidate. at: its row of the step. request: its request's place in the batch. length:
    tokens of its prefix."""

    at: int
    request: int
    length: int
    token: int


@dataclass(frozen=True, slots=True)
class Part:
    """Candidates that were forwarded together, and where their keys and values still are.

    hidden: [candidates, hidden]. blocks: int64 [groups, candidates], ids of the last block of each.
    """

    asked: Sequence[LookAhead]
    hidden: Tensor
    blocks: Tensor


class OwnForward:
    """What the policy's trunk says of prefixes that have one token more."""

    def __init__(self, vllm_config: Any, seat: RunnerSeat) -> None:
        self._config = vllm_config
        self._seat = seat
        scheduler = vllm_config.scheduler_config
        self._rows, self._tokens = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
        self._taken = 0
        self.forwards = 0
        # Of this step, as long as their blocks are theirs.
        self.parts: list[Part] = []

    @property
    def runner(self) -> Any:
        """vLLM's model runner; None until its cache is there."""
        return self._seat.runner

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        device: torch.device = self.runner.device
        return device

    @property
    def groups(self) -> Sequence[Any]:
        """vLLM's groups of layers that share block tables."""
        groups: Sequence[Any] = self.runner.kv_cache_config.kv_cache_groups
        return groups

    @functools.cached_property
    def unfit(self) -> str | None:
        """Why this engine's cache has no room for candidates, or None."""
        if self._seat.blocks < len(self.groups):
            return "no block of the KV cache could be set aside for looking ahead"
        for each in itertools.chain.from_iterable(self.runner.attn_groups):
            has_token_blocks: bool = getattr(each.kv_cache_spec, "uses_slot_mapping", True)
            # Other layers' pages lie between a layer's blocks.
            stride: int = getattr(each, "kernel_block_stride", 0)
            if stride or not has_token_blocks:
                return "this model has layers whose blocks are not its tokens' own"
        return None

    def begin(self) -> None:
        """A step begins: what was set aside is free again."""
        self._taken = 0
        self.parts = []

    def has_prefix(self, at: int, length: int) -> bool:
        """Whether the cache has so many tokens of a row of the step, and no more."""
        # Model Runner V2 calls for rows that are whole only.
        lengths = getattr(self.runner, "optimistic_seq_lens_cpu", None)
        return lengths is None or int(lengths[at]) == length

    def hidden(self, asked: Sequence[LookAhead]) -> Tensor:
        """Hidden states after the final norm, [candidates, hidden], in as many forwards as the
        blocks that were set aside, and the rows of a step of this engine, ask for."""
        # On a GPU backends keep tables of as many rows as the engine may have at once.
        rows = self._tokens if self.device.type == "cpu" else self._rows
        most = min(rows, self._seat.blocks // len(self.groups))
        parts = [self._part(asked[i : i + most]) for i in range(0, len(asked), most)]
        return torch.cat([part.hidden for part in parts])

    def block_table(self, group: int) -> Tensor:
        """The block tables of the step's rows, int32 [rows or more, blocks]."""
        batch = getattr(self.runner, "input_batch", None)
        if batch is None:
            table: Tensor = self.runner.block_tables.input_block_tables[group]
            return table
        table = batch.block_table[group].get_device_tensor(batch.num_reqs)
        return table

    def block_size(self, group: int) -> int:
        """Tokens of a block."""
        size: int = self.groups[group].kv_cache_spec.block_size
        return size

    def copy_blocks(self, group: int, source: Tensor, target: Tensor) -> None:
        """Whole blocks of a group's layers, keys and values. source, target: int64 [blocks]."""
        layers = self.runner.compilation_config.static_forward_context
        blocks = self.runner.kv_cache_config.num_blocks
        for name in self.groups[group].layer_names:
            cache = layers[name].kv_cache
            # A backend whose blocks are smaller has several of its own to one of the scheduler's.
            factor = cache.shape[0] // blocks
            inner = torch.arange(factor, device=source.device)
            to, of = ((ids[:, None] * factor + inner).flatten() for ids in (target, source))
            cache[to] = cache[of]

    def _part(self, asked: Sequence[LookAhead]) -> Part:
        from vllm.forward_context import set_forward_context

        given = torch.tensor(asked, dtype=torch.int64)
        requests, lengths, tokens = (
            each.contiguous() for each in given[:, 1:].to(self.device).unbind(1)
        )
        on_host = given[:, 2]
        blocks = self._take_blocks(len(asked))
        metadata: dict[str, Any] = {}
        slots: dict[str, Tensor] = {}
        for index, group in enumerate(self.groups):
            table = self._table(index, requests, lengths, on_host, blocks[index])
            size = self.block_size(index)
            slot = blocks[index] * size + lengths % size
            common = _common_metadata(table, slot, lengths, on_host)
            for attention in self.runner.attn_groups[index]:
                with _without_graphs(attention.get_metadata_builder()):
                    built = attention.build_metadata(common)
                metadata |= dict.fromkeys(attention.layer_names, built)
            slots |= dict.fromkeys(group.layer_names, slot)
        self.forwards += 1
        with set_forward_context(metadata, self._config, num_tokens=len(asked), slot_mapping=slots):
            hidden = self.runner.model(
                input_ids=tokens.to(torch.int32),
                positions=lengths,
                intermediate_tensors=None,
                inputs_embeds=None,
            )
        assert isinstance(hidden, Tensor)
        part = Part(asked, hidden[: len(asked)], blocks)
        self.parts.append(part)
        return part

    def _take_blocks(self, candidates: int) -> Tensor:
        """Ids of blocks that were set aside, int64 [groups, candidates]."""
        # A group's own range, always: another one's bytes may be of another precision.
        each = self._seat.blocks // len(self.groups)
        if self._taken + candidates > each:
            self.begin()
        first = self._seat.first + self._taken
        self._taken += candidates
        starts = first + each * torch.arange(len(self.groups), device=self.device)
        return starts[:, None] + torch.arange(candidates, device=self.device)

    def _table(
        self, group: int, requests: Tensor, lengths: Tensor, on_host: Tensor, blocks: Tensor
    ) -> Tensor:
        """Block tables of candidates, int32 [candidates, blocks], each with its own last block."""
        size = self.block_size(group)
        table = self.block_table(group).index_select(0, requests)
        last = (lengths // size)[:, None]
        begun = (on_host % size).nonzero().flatten().to(lengths.device)
        if len(begun):
            source = table.gather(1, last).flatten().long()
            self.copy_blocks(group, source[begun], blocks[begun])
        return table.scatter_(1, last, blocks[:, None].to(table.dtype))


@contextlib.contextmanager
def _without_graphs(builder: Any) -> Iterator[None]:
    """A backend that keeps a workspace for each number of rows of a graph keeps none for ours."""
    if not getattr(builder, "enable_cuda_graph", False):
        yield
        return
    builder.enable_cuda_graph = False
    try:
        yield
    finally:
        builder.enable_cuda_graph = True


def _common_metadata(table: Tensor, slots: Tensor, lengths: Tensor, on_host: Tensor) -> Any:
    """A decode step of rows that have one token each."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    rows = len(table)
    starts = torch.arange(rows + 1, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts.to(table.device),
        query_start_loc_cpu=starts,
        seq_lens=(lengths + 1).to(torch.int32),
        seq_lens_cpu_upper_bound=(on_host + 1).to(torch.int32),
        num_reqs=rows,
        num_actual_tokens=rows,
        max_query_len=1,
        max_seq_len=int(on_host.max()) + 1,
        block_table_tensor=table,
        slot_mapping=slots,
        causal=True,
        is_prefilling=torch.zeros(rows, dtype=torch.bool),
        positions=lengths,
    )
