"""lookahead_attention: the reference against float64, the kernel against the reference."""

import dataclasses
import sys
from itertools import product

import pytest
import torch

from guided_decode.kernels import lookahead_tiles
from guided_decode.kernels.jit import FLOATS
from guided_decode.kernels.lookahead_attention import (
    PackedReads,
    _pool_rows,
    lookahead_attention,
    lookahead_attention_reference,
    lookahead_attention_triton,
)
from guided_decode.kernels.lookahead_tiles import HOPPER_TILES, TILES, Tile, splits_of, tile_of
from tests.kernels.kernel_cases import (
    ARCHITECTURES,
    DEVICE,
    DTYPES,
    NAN,
    assert_as_close_as_torch,
    assert_builds,
    captured,
    on_cuda,
    poisoned,
    randn,
    recorded,
    runs_kernels,
)

# The package's name for the module is the function.
module = sys.modules[lookahead_attention.__module__]

CAPACITY = 4096


@dataclasses.dataclass
class Heads:
    """Query heads, key-value heads, and their sizes."""

    query: int
    kv: int
    key_dim: int
    value_dim: int


PLAIN, GROUPED = Heads(2, 2, 64, 64), Heads(8, 2, 64, 64)
HEADS = [PLAIN, GROUPED, Heads(7, 1, 80, 80), Heads(6, 2, 96, 64), Heads(4, 4, 128, 128),
         Heads(4, 1, 192, 128), Heads(2, 1, 256, 256)]  # fmt: skip

# Rows of (cached prefix tokens, new ones, candidates, padding).
BATCHES = {
    "no prefix": [(0, 0, 1, 0), (0, 0, 16, 0)],
    "one candidate": [(31, 0, 1, 0)],
    "ragged": [(5, 0, 3, 5), (64, 0, 16, 0), (0, 7, 0, 1), (0, 0, 0, 4), (129, 2, 5, 0)],
    "many candidates": [(33, 0, 64, 0), (65, 1, 63, 0)],
    "splits": [(700, 0, 4, 0), (3, 0, 4, 0), (257, 0, 2, 2), (513, 1, 1, 0)],
    "chunk": [(40, 150, 3, 0)],
}


def case(batch, heads, *, dtype=torch.float32, window=None, softcap=None, device="cpu", seed=0):
    """Queries and what they read: scattered slots, NaN in those that no token has."""
    generator = torch.Generator().manual_seed(seed)
    free = torch.randperm(CAPACITY, generator=generator).tolist()
    lengths = [cached + new for cached, new, _, _ in batch]
    table = torch.full((len(batch) + 1, max(lengths) + 3), 1 << 30, dtype=torch.int32)
    segments, positions, slots = [], [], []
    for row, (cached, new, candidates, padding) in enumerate(batch):
        length = cached + new
        prefix = [free.pop() for _ in range(length)]
        table[row, :length] = torch.tensor(prefix, dtype=torch.int32)
        segments.append([len(slots), new + candidates + padding, row])
        positions += [*range(cached, length), *[length] * candidates, *[-1] * padding]
        slots += [*prefix[cached:], *(free.pop() for _ in range(candidates)), *[-1] * padding]
    segments.append([0, 0, -1])
    keys = randn(CAPACITY, heads.kv, heads.key_dim, seed=seed + 1)
    values = randn(CAPACITY, heads.kv, heads.value_dim, seed=seed + 2)
    keys[free], values[free] = NAN, NAN
    # As the projection of a model gives them: heads before tokens.
    query = randn(heads.query, len(slots), heads.key_dim, seed=seed + 3).transpose(0, 1)
    reads = PackedReads(
        keys.to(device, dtype),
        values.to(device, dtype),
        table.to(device),
        torch.tensor(segments, dtype=torch.int32, device=device),
        torch.tensor(positions, device=device),
        torch.tensor(slots, device=device),
        0.3 if heads.key_dim == 64 else heads.key_dim**-0.5,
        window,
        softcap,
    )
    return query.to(device, dtype), reads


def bounds(batch):
    """The least max_queries and max_prefix of a batch."""
    return max(new + c + pad for _, new, c, pad in batch), max(c + new for c, new, _, _ in batch)


def each_query(query, reads, dtype):
    """The docstring, a query at a time, in some dtype: softmax in float32 or more."""
    output = torch.zeros(*query.shape[:2], reads.values.shape[2], dtype=dtype, device=query.device)
    group = query.shape[1] // reads.keys.shape[1]
    for start, count, row in reads.segments.tolist():
        for t in range(start, start + count):
            position = int(reads.positions[t])
            if position < 0:
                continue
            low = 0 if reads.window is None else max(0, position - reads.window + 1)
            seen = [*reads.table[row, low:position].tolist(), int(reads.slots[t])]
            k, v = (x[seen].to(dtype).repeat_interleave(group, 1).transpose(0, 1)
                    for x in (reads.keys, reads.values))  # fmt: skip
            scores = (k @ query[t].to(dtype)[..., None])[..., 0] * reads.scaling
            if reads.softcap is not None:
                scores = torch.tanh(scores / reads.softcap) * reads.softcap
            exact = torch.promote_types(dtype, torch.float32)
            weights = scores.softmax(-1, dtype=exact).to(dtype)
            output[t] = (weights[:, None] @ v)[:, 0]
    return output


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, None), (1, 3.0), (130, 3.0)])
def test_reference_is_the_formula(name, window, softcap):
    for heads in HEADS:
        query, reads = case(BATCHES[name], heads, window=window, softcap=softcap)
        output = lookahead_attention_reference(query, reads)
        torch.testing.assert_close(
            output.double(), each_query(query, reads, torch.float64), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", BATCHES)
def test_reference_of_low_precision_is_no_worse_than_torch(name):
    query, reads = case(BATCHES[name], GROUPED, dtype=torch.bfloat16)
    truth, eager = (each_query(query, reads, dtype) for dtype in (torch.float64, torch.bfloat16))
    assert_as_close_as_torch(lookahead_attention_reference(query, reads), eager, truth)


def test_neighbouring_slots_are_read_in_place():
    query, reads = case([(200, 0, 4, 0)], GROUPED)
    reads.table[0, :200] = torch.arange(200)
    reads.keys[:200], reads.values[:200] = 1.0, 2.0
    kept = _pool_rows(reads.keys, reads.table[0, :200].long(), torch.float32)
    assert kept.data_ptr() == reads.keys.data_ptr()
    output = lookahead_attention_reference(query, reads).double()
    truth = each_query(query, reads, torch.float64)
    torch.testing.assert_close(output, truth, rtol=1e-5, atol=1e-5)


def test_heads_that_do_not_belong_together_are_refused():
    query, reads = case([(3, 0, 2, 0)], Heads(6, 2, 64, 64))
    with pytest.raises(ValueError, match=r"\[5, 64\].*\[2, 64\]"):
        public(query[:, :5], reads, 2, 3)


def public(query, reads, max_queries, max_prefix):
    tensors = (reads.keys, reads.values, reads.table, reads.segments, reads.positions, reads.slots)
    return lookahead_attention(
        query, *tensors, scaling=reads.scaling, max_queries=max_queries, max_prefix=max_prefix,
        window=reads.window, softcap=reads.softcap,
    )  # fmt: skip


def test_public_function_is_the_reference_on_a_cpu():
    batch = BATCHES["ragged"]
    query, reads = case(batch, GROUPED, window=9, softcap=3.0)
    output = public(query, reads, *bounds(batch))
    assert torch.equal(output, lookahead_attention_reference(query, reads))


def check(batch, heads, monkeypatch, **fields):
    query, reads = case(batch, heads, device=DEVICE, **fields)
    truth, eager = (each_query(query, reads, dtype) for dtype in (torch.float64, query.dtype))
    with monkeypatch.context() as patch:
        poisoned(patch)
        output = lookahead_attention_triton(query, reads, *bounds(batch))
    assert output.dtype == query.dtype
    assert_as_close_as_torch(output, eager, truth)
    assert not output[reads.positions < 0].any()


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("heads", [PLAIN, GROUPED], ids=str)
def test_kernel_is_the_reference(name, heads, dtype, monkeypatch):
    check(BATCHES[name], heads, monkeypatch, dtype=dtype)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_kernel_takes_any_heads(heads, dtype, monkeypatch):
    check(BATCHES["ragged"], heads, monkeypatch, dtype=dtype)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "softcap"), [(9, None), (1, 3.0), (260, None), (None, 3.0)])
def test_kernel_knows_windows_and_soft_caps(window, softcap, dtype, monkeypatch):
    for name in ("splits", "chunk"):
        check(BATCHES[name], GROUPED, monkeypatch, dtype=dtype, window=window, softcap=softcap)


@runs_kernels
@pytest.mark.parametrize(("m", "n", "plain"), sorted({(t.m, t.n, t.plain) for tiles in
                         (*TILES.values(), *HOPPER_TILES.values()) for t in tiles}))  # fmt: skip
def test_kernel_holds_for_every_tile(m, n, plain, monkeypatch):
    # In float32, which the tiles of 16 bits would never see.
    monkeypatch.setattr(module, "tile_of", lambda *_: Tile(m, n, warps=8, stages=1, plain=plain))
    for name in ("ragged", "many candidates"):
        check(BATCHES[name], Heads(3, 1, 16, 16), monkeypatch)


@runs_kernels
@pytest.mark.parametrize("splits", [1, 2, 3, 5, 64])
def test_the_number_of_splits_changes_nothing(splits, monkeypatch):
    monkeypatch.setattr(module, "splits_of", lambda *_: splits)
    check([(100, 0, 4, 0), (1, 0, 2, 0), (0, 0, 1, 1)], PLAIN, monkeypatch)


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_public_function_replays_in_a_cuda_graph(dtype):
    # One bucket: three rows of four tokens, which hold fewer candidates at each replay.
    rows = [(900, 0, 4, 0), (900, 0, 4, 0), (900, 0, 4, 0)]
    query, reads = case(rows, GROUPED, device="cuda", dtype=dtype)
    output = torch.zeros_like(query)
    graph = captured(lambda: output.copy_(public(query, reads, 4, 900)))
    for seed, batch in enumerate(([(5, 0, 1, 3), (900, 0, 4, 0), (0, 0, 0, 4)],
                                  [(64, 0, 3, 1), (0, 1, 2, 1), (300, 0, 2, 2)])):  # fmt: skip
        fresh, other = case(batch, GROUPED, device="cuda", dtype=dtype, seed=seed)
        query.copy_(fresh)
        reads.table[:, : other.table.shape[1]] = other.table
        for name in ("keys", "values", "segments", "positions", "slots"):
            getattr(reads, name).copy_(getattr(other, name))
        output.fill_(NAN)
        graph.replay()
        truth, eager = (each_query(query, reads, d) for d in (torch.float64, dtype))
        assert_as_close_as_torch(output, eager, truth)


def test_a_small_batch_is_split_and_a_large_one_is_not():
    assert splits_of(8, 4096) == 16
    assert splits_of(40, 4096) == 6
    # 384 programs would run 264 of them, and then 120.
    assert splits_of(128, 4096) == 2
    assert splits_of(40, 512) == 2
    assert splits_of(1, 1 << 20) == 64
    assert splits_of(640, 4096) == 1
    assert splits_of(1, 0) == 1


def test_a_tile_holds_all_candidates_of_a_row_where_it_can():
    def tile(heads, queries):
        query, reads = case([(3, 0, 1, 0)], heads, dtype=torch.bfloat16)
        return tile_of(query, reads.values, queries)

    assert tile(Heads(4, 4, 128, 128), 16).m == 16
    assert tile(Heads(4, 1, 128, 128), 16).m == 64
    assert tile(Heads(4, 1, 128, 128), 4000).m == 64
    assert tile(Heads(71, 1, 128, 128), 1) is None
    assert tile(Heads(1, 1, 288, 288), 1) is None


@pytest.fixture
def architecture(request, monkeypatch):
    """What a launch that is compiled for it is tiled for."""
    monkeypatch.setattr(lookahead_tiles, "_is_hopper", lambda device: request.param >= 90)
    return request.param


def meta(heads, queries, prefix, dtype, softcap=None):
    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    reads = PackedReads(
        empty(CAPACITY, heads.kv, heads.key_dim),
        empty(CAPACITY, heads.kv, heads.value_dim),
        empty(4, 8192, dtype=torch.int32),
        empty(1, 3, dtype=torch.int32),
        empty(queries, dtype=torch.int64),
        empty(queries, dtype=torch.int64),
        0.1,
        None,
        softcap,
    )
    query = empty(queries, heads.query, heads.key_dim)
    lookahead_attention_triton(query, reads, queries, prefix)


@pytest.mark.parametrize("architecture", ARCHITECTURES, indirect=True)
def test_the_usual_variants_compile_without_spills(monkeypatch, architecture):
    made = recorded(monkeypatch)
    # Llama-2 13B and Llama-3 8B at k 16, Gemma at k 8, and the float32 that parity is claimed in.
    meta(Heads(40, 40, 128, 128), 16, 4096, torch.bfloat16)
    meta(Heads(32, 8, 128, 128), 16, 200, torch.bfloat16)
    meta(Heads(8, 4, 256, 256), 8, 4096, torch.bfloat16, softcap=50.0)
    meta(Heads(4, 2, 64, 64), 8, 4096, torch.float32)
    for launch in made:
        assert_builds(launch, architecture)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 160, 192, 256])
@pytest.mark.parametrize("architecture", ARCHITECTURES, indirect=True)
def test_every_variant_compiles_without_spills(monkeypatch, architecture, dim):
    made = recorded(monkeypatch)
    tiled = product(FLOATS, (16, 64, 128), (100, 4096), (None, 30.0))
    for dtype, queries, prefix, softcap in tiled:
        meta(Heads(2, 2, dim, dim), queries, prefix, dtype, softcap)
    for launch in {variant(launch): launch for launch in made}.values():
        assert_builds(launch, architecture)


def variant(launch):
    """What tells one compiled kernel from another."""
    types = tuple(getattr(x, "dtype", type(x)) for x in launch.arguments)
    return launch.kernel, types, tuple(launch.options.items())
