"""The packed attention against plain attention over an explicit list of visible tokens."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from guided_decode.cache.pool import SlotPool
from guided_decode.forward.attention import packed_attention
from guided_decode.forward.packed import PackedBatch, Segment
from guided_decode.forward.reads import stretches

CAPACITY, KV_HEADS, GROUPS, DIM = 700, 2, 3, 8


def slots_of(layout, length, row):
    """Slots of a row's prefix: one run, three runs with single slots between, or none."""
    base = row * 300
    slots = base + np.arange(length)
    if layout == "runs":
        slots = slots + (np.arange(length) > 80) + (np.arange(length) > 84) * 3
    elif layout == "scattered":
        slots = base + np.random.default_rng(row).permutation(length)
    return slots


def batch_of(layout, shapes, dtype=torch.float32):
    """Rows of (cached, forwarded prefix tokens, candidates), with random keys and values."""
    torch.manual_seed(0)
    pool = SlotPool(CAPACITY, [(KV_HEADS, DIM, DIM)], dtype, torch.device("cpu"))
    pool.keys[0].normal_()
    pool.layer_values[0].normal_()
    table = torch.zeros(len(shapes), 400, dtype=torch.int32)
    segments, slots, positions, start = [], [], [], 0
    for row, (first, prefix, candidates) in enumerate(shapes):
        length = first + prefix
        own = slots_of(layout, length, row)
        table[row, :length] = torch.from_numpy(own)
        segments.append(Segment(start, prefix, candidates, first, length, row))
        slots += [*own[first:], *(row * 300 + 290 - 2 * np.arange(candidates))]
        positions += [*range(first, length), *[length] * candidates]
        start += prefix + candidates
    ids = torch.tensor([int(slot) for slot in slots])
    stacked = torch.stack([ids, torch.tensor(positions), ids])
    return PackedBatch(stacked, *stacked.unbind(), segments, table, pool)


def attend(batch, window=None, softcap=None):
    pool, n = batch.pool, len(batch.slots)
    query = torch.randn(1, KV_HEADS * GROUPS, n, DIM, generator=torch.Generator().manual_seed(1))
    query = query.to(batch.dtype)
    own = [
        memory[0][batch.slots].transpose(0, 1)[None] for memory in (pool.keys, pool.layer_values)
    ]
    module = SimpleNamespace(layer_idx=0)
    output, _ = packed_attention(
        module, query, *own, None, scaling=0.4, sliding_window=window, softcap=softcap, packed=batch
    )
    return query[0].transpose(0, 1).float(), output[0].float()


def visible(batch, window):
    """For each query, the slots of what it sees."""
    for segment in batch.segments:
        prefix = batch.table[segment.table_row, : segment.length].tolist()
        low = 0 if window is None else window - 1
        for position in range(segment.first, segment.length):
            yield prefix[max(0, position - low) if window else 0 : position + 1]
        for own in range(segment.candidates):
            slot = int(batch.slots[segment.start + segment.prefix + own])
            yield [*prefix[max(0, segment.length - low) if window else 0 :], slot]


def expected(batch, queries, window=None, softcap=None):
    keys, values = batch.pool.keys[0].float(), batch.pool.layer_values[0].float()
    outputs = []
    for query, slots in zip(queries, visible(batch, window), strict=True):
        k, v = (memory[slots].repeat_interleave(GROUPS, 1) for memory in (keys, values))
        scores = torch.einsum("hd,nhd->hn", query, k) * 0.4
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        outputs.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), v))
    return torch.stack(outputs)


# Cached, forwarded prefix tokens, candidates.
SHAPES = list(itertools.product([0, 3, 90], [0, 1, 7, 100], [0, 1, 4]))
SHAPES = [shape for shape in SHAPES if shape[0] + shape[1] and shape[1] + shape[2]]


@pytest.mark.parametrize("layout", ["one run", "runs", "scattered"])
@pytest.mark.parametrize("window", [None, 1, 9, 120])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_every_query_sees_its_prefix_and_itself(layout, window, softcap):
    for shape in SHAPES:
        batch = batch_of(layout, [shape, (70, 2, 3)])
        queries, output = attend(batch, window, softcap)
        torch.testing.assert_close(
            output, expected(batch, queries, window, softcap), rtol=0, atol=1e-5, msg=str(shape)
        )


@pytest.mark.parametrize("window", [None, 9])
def test_half_precision_is_close(window):
    batch = batch_of("runs", [(90, 5, 4), (0, 100, 4)], torch.bfloat16)
    queries, output = attend(batch, window)
    torch.testing.assert_close(output, expected(batch, queries, window), rtol=0, atol=0.05)


def test_runs_are_read_in_place_and_only_the_rest_is_gathered():
    batch = batch_of("runs", [(200, 0, 4)])
    (stretch,) = stretches(batch, None)
    assert stretch.runs == ((0, 81), (89, 204))
    assert stretch.gathered.tolist() == [82, 83, 84, 85, 290, 288, 286, 284]


def test_a_scattered_prefix_is_gathered_whole():
    batch = batch_of("scattered", [(200, 0, 1)])
    (stretch,) = stretches(batch, None)
    assert stretch.runs == ()
    assert len(stretch.gathered) == 201


def test_what_lies_before_the_window_is_not_read():
    batch = batch_of("one run", [(200, 0, 2)])
    (stretch,) = stretches(batch, 80)
    assert stretch.runs == ((121, 200),)
    assert len(stretch.gathered) == 2
