"""top_candidates: the reference against its definition, the kernels against the reference."""

import itertools
import math

import pytest
import torch

from guided_decode.kernels.top_candidates import (
    MAX_VOCAB,
    MAX_WIDTH,
    Cut,
    _by_keys,
    _by_repair,
    top_candidates,
    top_candidates_reference,
    top_candidates_triton,
)
from tests.kernels.kernel_cases import (
    ARCHITECTURES,
    DEVICE,
    DTYPES,
    INF,
    VOCABULARIES,
    assert_builds,
    captured,
    on_cuda,
    poisoned,
    randn,
    recorded,
    runs_kernels,
)

# Vocabularies and widths: fewer tokens than the width's power of two, than a group, than a block;
# one token more than a block; more blocks than groups in K blocks.
SHAPES = [(1, 1), (5, 5), (33, 33), (100, 64), (1024, 16), (1025, 3), (5003, 1), (262145, 2),
          *zip(VOCABULARIES, [16, 3, 16, 64], strict=True)]  # fmt: skip
ROWS = 6


def rows_of(vocab, *, seed=0, dtype=torch.float32, device="cpu"):
    """Six rows: plain, many ties, ties across borders, signed zeros, few finite, all −inf."""
    logits = randn(ROWS, vocab, seed=seed) * 3
    borders = torch.tensor([0, vocab - 1, *(edge + by for edge in (32, 1024, 262144)
                                            for by in range(-2, 3))])  # fmt: skip
    borders = borders[borders < vocab]
    logits[1] = logits[1].round()
    logits[2, borders] = 9.0
    logits[3] = torch.where(logits[3] < 0, -0.0, 0.0)
    sparse = logits[4, borders[::2]]
    logits[4:] = -INF
    logits[4, borders[::2]] = sparse
    return logits.to(device, dtype)


def cut_of(logits, width, *, given=("top_k", "top_p", "gate"), min_keep=1, seed=0):
    """Each row's own bounds, where no rounding decides; every third top_p and gate is inf."""
    generator = torch.Generator().manual_seed(seed)
    top_k = torch.randint(1, width + 1, (len(logits),), generator=generator)
    top_k[seed % len(logits)] = width
    shares = torch.rand(len(logits), generator=generator).tolist()
    top_p, gate = [], []
    for row, share in enumerate(shares):
        sums = torch.tensor(sums_of_mass(logits[row], width), dtype=torch.float64)
        p = share * float(sums[-1])
        while bool(((sums - p).abs() < 1e-5).any()):
            p += 1e-5
        top_p.append(INF if row % 3 == seed % 3 else p)
        gate.append(INF if row % 3 == (seed + 1) % 3 else float(sums[1]) * (0.7 + 0.6 * share))
    bounds = {"top_k": top_k, "top_p": torch.tensor(top_p), "gate": torch.tensor(gate)}
    return Cut(width, *(bounds[name].to(logits.device) if name in given else None
                        for name in bounds), min_keep)  # fmt: skip


def sums_of_mass(row, width):
    """Masses before the first candidate, the second, … and after the last, in float64."""
    largest = row.double().topk(width).values
    if float(largest[0]) == -INF:
        return [0.0] * (width + 1)
    mass = (largest - row.double().logsumexp(-1)).exp().tolist()
    return [math.fsum(mass[:n]) for n in range(width + 1)]


def expected(logits, cut):
    """The docstring's definition, a candidate at a time, in float64."""
    candidates, gated = [], []
    for number, row in enumerate(logits.tolist()):
        order = sorted(range(len(row)), key=lambda token, row=row: (-row[token], token))
        sums = sums_of_mass(logits[number], cut.width)
        top_k = cut.width if cut.top_k is None else int(cut.top_k[number])
        top_p = INF if cut.top_p is None else float(cut.top_p[number])
        candidates.append([
            token if i < top_k and row[token] > -INF and (sums[i] < top_p or i < cut.min_keep)
            else -1
            for i, token in enumerate(order[: cut.width])
        ])  # fmt: skip
        gate = INF if cut.gate is None else float(cut.gate[number])
        gated.append(max(row) > -INF and sums[1] >= gate)
    return candidates, gated


def check(result, wanted):
    """The same candidates in the same order, and the same rows gated."""
    for mine, its in zip(result, wanted, strict=True):
        assert (mine is None) == (its is None)
        if its is not None:
            assert mine.dtype == its.dtype
            assert mine.is_contiguous()
            assert torch.equal(mine, its)


def assert_kernel_is_the_reference(logits, cut):
    check(top_candidates_triton(logits, cut), top_candidates_reference(logits, cut))


@pytest.mark.parametrize(("vocab", "width"), [*SHAPES[:7], (300, 300), (5003, 200)])
@pytest.mark.parametrize("given", [(), ("top_k", "top_p", "gate")])
@pytest.mark.parametrize("min_keep", [1, 4])
def test_reference_is_the_definition(vocab, width, given, min_keep):
    for seed in range(3):
        logits = rows_of(vocab, seed=seed)
        cut = cut_of(logits, width, given=given, min_keep=min_keep, seed=seed)
        candidates, gated = expected(logits, cut)
        result = top_candidates(logits, **cut._asdict())
        assert result.candidates.tolist() == candidates
        assert (result.gated is None and not given) or result.gated.tolist() == gated


@pytest.mark.parametrize("select", [_by_keys, _by_repair])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_larger_logits_come_first_and_ties_go_to_the_lower_id(select, dtype):
    for vocab in (1, 17, 301, 2000):
        logits = rows_of(vocab, dtype=dtype)
        for k in {1, min(8, vocab), max(1, vocab - 1), vocab}:
            for row, chosen in zip(logits.tolist(), select(logits, k).tolist(), strict=True):
                ordered = sorted(range(vocab), key=lambda token, row=row: (-row[token], token))[:k]
                # Which of the tokens at −inf are named is left open: none is a candidate.
                alive = [token for token in ordered if row[token] > -INF]
                assert chosen[: len(alive)] == alive
                assert len(set(chosen)) == k


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "width"), SHAPES)
def test_kernel_is_the_reference(vocab, width, dtype):
    logits = rows_of(vocab, dtype=dtype, device=DEVICE)
    assert_kernel_is_the_reference(logits, cut_of(logits, width, seed=width))


@runs_kernels
@pytest.mark.parametrize("width", [2, 4, 7, 8, 9, 24, 32, 63])
def test_kernel_takes_any_width(width):
    logits = rows_of(2500, device=DEVICE)
    assert_kernel_is_the_reference(logits, cut_of(logits, width, min_keep=3))


@runs_kernels
@pytest.mark.parametrize(
    "given",
    [names for n in range(3) for names in itertools.combinations(("top_k", "top_p", "gate"), n)],
)
def test_kernel_takes_any_bounds(given):
    logits = rows_of(2500, seed=1, device=DEVICE)
    assert_kernel_is_the_reference(logits, cut_of(logits, 16, given=given, seed=2))


@runs_kernels
def test_kernel_reads_through_any_strides():
    logits = rows_of(2500, device=DEVICE)
    cut = cut_of(logits, 16)
    wanted = top_candidates_reference(logits, cut)
    check(top_candidates_triton(logits.t().contiguous().t(), cut), wanted)
    wide = torch.full((ROWS, 6000), 99.0, device=DEVICE)
    wide[:, 1:5001:2] = logits
    check(top_candidates_triton(wide[:, 1:5001:2], cut), wanted)
    columns = torch.stack([cut.top_p, cut.gate], 1)
    split = cut._replace(top_p=columns[:, 0], gate=columns[:, 1])
    check(top_candidates_triton(logits, split), wanted)
    one = torch.tensor([5], device=DEVICE).expand(ROWS)
    assert_kernel_is_the_reference(logits, cut._replace(top_k=one))


@runs_kernels
def test_kernel_finds_many_candidates_in_one_group_and_one_in_each():
    together = torch.zeros(2500, device=DEVICE)
    together[1000:1064] = torch.arange(64, device=DEVICE) + 1.0
    apart = torch.zeros(2500, device=DEVICE)
    apart[7::37] = torch.arange(68, device=DEVICE) % 17 + 1.0
    logits = torch.stack([together, apart, torch.full_like(apart, -3.0e38), 3.0e38 * apart])
    assert_kernel_is_the_reference(logits, Cut(64, None, None, None, 1))


@runs_kernels
def test_kernel_orders_numbers_of_every_size():
    sizes = [0.0, 1e-45, 1e-40, 1.2e-38, 1e-5, 1.0, 3e38]
    numbers = torch.tensor([sign * size for size in sizes for sign in (-1.0, 1.0)], device=DEVICE)
    logits = torch.stack([numbers, numbers.flip(0), numbers.roll(5)])
    assert_kernel_is_the_reference(logits, Cut(14, None, None, None, 1))


@runs_kernels
def test_gate_of_one_lets_only_a_sure_token_pass():
    logits = torch.full((3, 1200), -INF, device=DEVICE)
    logits[0, 1100] = -7.0
    logits[1, 3:5] = 2.0
    cut = Cut(1, None, None, torch.ones(3, device=DEVICE), 1)
    assert top_candidates_triton(logits, cut).gated.tolist() == [True, False, False]
    assert top_candidates_reference(logits, cut).gated.tolist() == [True, False, False]


@runs_kernels
def test_kernel_writes_every_output(monkeypatch):
    logits = rows_of(1500, device=DEVICE)
    cut = cut_of(logits, 16)
    wanted = top_candidates_reference(logits, cut)
    none = logits[:0], cut._replace(top_k=cut.top_k[:0], top_p=cut.top_p[:0], gate=cut.gate[:0])
    poisoned(monkeypatch)
    check(top_candidates_triton(logits, cut), wanted)
    assert top_candidates_triton(*none).candidates.shape == (0, 16)


@on_cuda
@pytest.mark.parametrize(("vocab", "width"), [(32001, MAX_WIDTH), (32001, MAX_WIDTH + 1),
                                              (5003, 5003), (MAX_VOCAB, 8), (MAX_VOCAB + 1, 8)],
)  # fmt: skip
def test_public_function_takes_any_vocabulary_and_width(vocab, width):
    logits = rows_of(vocab)
    cut = cut_of(logits, width)
    wanted = top_candidates_reference(logits, cut)
    moved = [x.cuda() if isinstance(x, torch.Tensor) else x for x in cut]
    result = top_candidates(logits.cuda(), **Cut(*moved)._asdict())
    check(type(wanted)(*(tensor.cpu() for tensor in result)), wanted)


@on_cuda
def test_public_function_replays_in_a_cuda_graph():
    logits = rows_of(32001, device="cuda")
    cut = cut_of(logits, 16)
    out = [None]

    def run():
        out[0] = top_candidates(logits, **cut._asdict())

    graph = captured(run)
    for seed in (1, 2):
        logits.copy_(rows_of(32001, seed=seed))
        other = cut_of(logits, 16, seed=seed)
        for old, new in zip(cut, other, strict=True):
            if isinstance(old, torch.Tensor):
                old.copy_(new)
        wanted = top_candidates_reference(logits, cut)
        graph.replay()
        check(out[0], wanted)


def meta(width, dtype, given, vocab=128256):
    """Launches the kernels for tensors that have no storage."""
    logits = torch.empty(2, vocab, dtype=dtype, device="meta")
    dtypes = {"top_k": torch.int64, "top_p": torch.float32, "gate": torch.float32}
    bounds = [torch.empty(2, dtype=dtype, device="meta") if name in given else None
              for name, dtype in dtypes.items()]  # fmt: skip
    top_candidates_triton(logits, Cut(width, *bounds, 1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_usual_variants_compile_without_spills(monkeypatch, architecture):
    made = recorded(monkeypatch)
    meta(16, torch.float32, ())
    meta(16, torch.bfloat16, ("top_k", "top_p", "gate"))
    meta(64, torch.bfloat16, ("top_k", "top_p", "gate"), vocab=32001)
    for launch in made:
        assert_builds(launch, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("width", [1, 3, 8, 16, 32, MAX_WIDTH])
def test_every_variant_compiles_without_spills(monkeypatch, architecture, width):
    made = recorded(monkeypatch)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        meta(width, dtype, ())
        meta(width, dtype, ("top_k", "top_p", "gate"))
    for given in [("top_p",), ("top_k", "gate")]:
        meta(width, torch.bfloat16, given)
    for vocab in (100, 32001, 151936, MAX_VOCAB):
        meta(width, torch.bfloat16, ("top_k", "top_p", "gate"), vocab=vocab)
    for launch in made:
        assert_builds(launch, architecture)
