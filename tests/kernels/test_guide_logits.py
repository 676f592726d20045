"""guide_logits: the reference against float64, the kernel against the reference."""

import math

import pytest
import torch

from guided_decode.kernels.candidate_shift import MAX_CANDIDATES, OVERFLOWED, UNUSABLE, Shift
from guided_decode.kernels.guide_logits import (
    GuidedLogits,
    guide_logits,
    guide_logits_reference,
    guide_logits_triton,
)
from tests.kernels.kernel_cases import (
    ARCHITECTURES,
    DEVICE,
    DTYPES,
    INF,
    NAN,
    VOCABULARIES,
    assert_builds,
    captured,
    on_cuda,
    poisoned,
    recorded,
    runs_kernels,
)

# Rows and k: one of each, powers of two and not, more candidates than a warp and than a block.
SHAPES = [(1, 1), (5, 3), (3, 16), (2, 64), (2, 200)]


def case(rows, k, vocab, *, device="cpu", dtype=torch.float32, seed=0, penalty=True, min_keep=1):
    """Logits, a Shift and keep_tail: ragged rows, each with its own rule; the last is empty."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    logits = normal(rows, vocab).mul(4).to(dtype)
    candidates = torch.stack([torch.randperm(vocab, generator=generator)[:k] for _ in range(rows)])
    candidates[0] = torch.tensor(with_edges(candidates[0].tolist(), vocab))
    padded = torch.arange(k) >= torch.randint(1, k + 1, (rows, 1), generator=generator)
    padded[0] = False
    if rows > 2:
        padded[-1] = True
    candidates = candidates.masked_fill(padded, -1)
    scored = (normal(rows, k) < 1.0) & ~padded
    values = normal(rows, k).masked_fill(~scored, NAN)
    row = torch.arange(rows)
    weights = torch.stack([
        normal(rows),
        torch.where(row % 3 == 1, 0.0, normal(rows)),
        torch.where(row % 3 == 0, INF, 0.3),
    ], 1)  # fmt: skip
    flags = torch.stack([row % 2 == 1, row % 4 > 1], 1)
    kl = normal(rows, k).masked_fill(~scored, NAN) if penalty else None
    moved = [x if x is None else x.to(device)
             for x in (logits, candidates, values, scored, kl, weights, flags)]  # fmt: skip
    logits, candidates, values, scored, kl, weights, flags = moved
    shift = Shift(candidates, values, weights[:, 0], weights[:, 1], weights[:, 2], flags[:, 1],
                  scored, kl, min_keep)  # fmt: skip
    return logits, shift, flags[:, 0]


def with_edges(tokens, vocab):
    """Distinct tokens, with the first and the last of the vocabulary and of a block among them."""
    edges = [token for token in (0, vocab - 1, 4095, 4096) if token < vocab]
    others = [token for token in tokens if token not in edges]
    return [*edges, *others][: len(tokens)]


def expected(logits, shift, keep_tail):
    """The docstring's formula, a candidate at a time, in float64."""
    out = logits.double().clone()
    for row in range(len(logits)):
        chosen = [c for c, token in enumerate(shift.candidates[row].tolist()) if token >= 0]
        tokens = shift.candidates[row].tolist()
        counted = [c for c in chosen if shift.scored[row, c]]
        q = {c: float(shift.values[row, c]) for c in counted}
        mean = shift.mean_baseline[row] and counted
        base = sum(q.values()) / len(q) if mean else float(shift.baseline[row])
        penalty = {c: 0.0 if shift.penalty is None else float(shift.penalty[row, c]) for c in q}
        advantage = {c: q[c] - base - penalty[c] for c in counted}
        ranked = sorted(advantage.values(), reverse=True)
        if not keep_tail[row]:
            out[row] = -INF
        for c in chosen:
            l = float(logits[row, tokens[c]])
            if c in advantage:
                l += float(shift.beta[row]) * advantage[c]
                low = advantage[c] < ranked[0] - float(shift.margin[row])
                if low and sum(other > advantage[c] for other in ranked) >= shift.min_keep:
                    l = -INF
            out[row, tokens[c]] = l
    return out


@pytest.mark.parametrize("vocab", [257, 32001])
@pytest.mark.parametrize(("rows", "k"), SHAPES)
@pytest.mark.parametrize(("penalty", "min_keep"), [(True, 1), (False, 3)])
def test_reference_is_the_formula(rows, k, vocab, penalty, min_keep):
    logits, shift, keep = case(rows, k, vocab, penalty=penalty, min_keep=min_keep)
    truth = expected(logits, shift, keep)
    before = logits.clone()
    result, failed = guide_logits_reference(logits, shift, keep)
    torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=1e-5)
    assert not failed.any()
    assert torch.equal(logits, before)


def test_a_row_without_candidates_is_all_tail():
    logits, shift, _ = case(4, 3, 257)
    kept = guide_logits_reference(logits, shift, torch.tensor([False, False, False, True])).logits
    assert torch.equal(kept[-1], logits[-1])
    masked = guide_logits_reference(logits, shift, torch.tensor([False] * 4)).logits
    assert (masked[-1] == -INF).all()


def spoiled(device="cpu", dtype=torch.float32):
    """Ten rows of which the first five are fine, and what guide_logits shall say of each."""
    huge = torch.finfo(dtype).max
    logits, shift, keep = case(10, 16, 5003, device=device, dtype=dtype)
    scored, values, baseline = shift.scored.clone(), shift.values.clone(), shift.baseline.clone()
    beta, penalty = shift.beta.clone(), shift.penalty.clone()
    scored[5:, 1], scored[4] = True, False
    shift.candidates[4:] = shift.candidates[:1]
    values[5:], penalty[5:], beta[5:] = 0.5, 0.0, 1.0
    # Not read: nothing of this row is scored.
    values[4], baseline[4] = NAN, NAN
    values[5, 1], baseline[6], penalty[7, 1], values[8, 1] = NAN, -INF, INF, -INF
    beta[9], logits[9] = -huge, huge
    values[9] = -1.0
    baseline[9] = 1.0
    shift = shift._replace(
        scored=scored, values=values, baseline=baseline, beta=beta, penalty=penalty,
        margin=torch.full_like(shift.margin, INF), mean_baseline=shift.mean_baseline & False,
    )  # fmt: skip
    return logits, shift, keep, [0] * 5 + [UNUSABLE] * 4 + [OVERFLOWED]


def test_a_row_that_fails_keeps_every_bit():
    logits, shift, keep, why = spoiled()
    guided, failed = guide_logits_reference(logits, shift, keep)
    assert failed.tolist() == why
    assert torch.equal(guided[5:], logits[5:])
    fine = Shift(*(x[:5] if isinstance(x, torch.Tensor) else x for x in shift))
    alone, _ = guide_logits_reference(logits[:5], fine, keep[:5])
    assert torch.equal(guided[:5], alone)
    assert not guided.isnan().any()


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_finds_the_rows_that_fail(dtype):
    logits, shift, keep, why = spoiled(DEVICE, dtype)
    guided = guide_logits_triton(logits, shift, keep)
    check(guided, guide_logits_reference(logits, shift, keep))
    assert guided.failed.tolist() == why
    assert torch.equal(guided.logits[5:], logits[5:])


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [100, *VOCABULARIES])
@pytest.mark.parametrize(("rows", "k", "penalty", "min_keep"),
                         [(5, 3, True, 1), (3, 16, False, 2), (2, 64, True, 5)])  # fmt: skip
def test_kernel_is_the_reference(rows, k, vocab, penalty, min_keep, dtype, monkeypatch):
    logits, shift, keep = case(
        rows, k, vocab, device=DEVICE, dtype=dtype, penalty=penalty, min_keep=min_keep
    )
    wanted = guide_logits_reference(logits, shift, keep)
    poisoned(monkeypatch)
    before = logits.clone()
    check(guide_logits_triton(logits, shift, keep), wanted)
    assert torch.equal(logits, before)


@runs_kernels
@pytest.mark.parametrize(("rows", "k"), [*SHAPES, (1, 1023), (2, MAX_CANDIDATES)])
def test_kernel_takes_any_number_of_candidates(rows, k):
    logits, shift, keep = case(rows, k, 5003, device=DEVICE, min_keep=2)
    wanted = guide_logits_reference(logits, shift, keep)
    check(guide_logits_triton(logits, shift, keep), wanted)


@runs_kernels
def test_kernel_reads_through_any_strides():
    logits, shift, keep = case(3, 16, 5003, device=DEVICE)
    wanted = guide_logits_reference(logits, shift, keep)
    check(guide_logits_triton(logits.t().contiguous().t(), shift, keep), wanted)
    wide = torch.full((3, 6000), 7.0, device=logits.device)
    wide[:, :5003] = logits
    check(guide_logits_triton(wide[:, :5003], shift, keep), wanted)


@runs_kernels
def test_kernel_keeps_the_bits_of_what_is_not_scored():
    # A denormal, a negative zero and infinities.
    logits = torch.tensor([[1e-40, -0.0, 3.1, -INF, 7e37]], device=DEVICE)
    _, shift, keep = case(1, 4, 5, device=DEVICE)
    shift = shift._replace(
        candidates=torch.tensor([[4, 0, 1, 3]], device=DEVICE),
        scored=torch.zeros(1, 4, dtype=torch.bool, device=DEVICE),
    )
    guided, _ = guide_logits_triton(logits, shift, torch.ones_like(keep))
    assert torch.equal(guided.view(torch.int32), logits.view(torch.int32))


@on_cuda
def test_public_function_replays_in_a_cuda_graph():
    logits, shift, keep = case(5, 16, 32001, device="cuda")
    static, guided = logits.clone(), logits.clone()
    failed = torch.empty(5, dtype=torch.int32, device="cuda")
    names = ("candidates", "values", "baseline")
    given = {name: value for name, value in shift._asdict().items() if name not in names}

    def run():
        first = (getattr(shift, name) for name in names)
        result = guide_logits(static, *first, keep_tail=keep, **given)
        guided.copy_(result.logits)
        failed.copy_(result.failed)

    graph = captured(run)
    for seed in (1, 2):
        fresh, other, _ = case(5, 16, 32001, device="cuda", seed=seed)
        static.copy_(fresh)
        for old, new in zip(shift, other, strict=True):
            if isinstance(old, torch.Tensor):
                old.copy_(new)
        wanted = guide_logits_reference(fresh, shift, keep)
        graph.replay()
        check(GuidedLogits(guided, failed), wanted)


def check(result, wanted):
    """Every −inf is where it should be, and every number within a rounding of its dtype."""
    assert torch.equal(result.failed, wanted.failed)
    result, wanted = result.logits, wanted.logits
    exact = torch.isinf(wanted) | (result == wanted)
    assert torch.equal(result[exact], wanted[exact])
    rtol = 4 * torch.finfo(result.dtype).eps
    torch.testing.assert_close(result, wanted, rtol=rtol, atol=rtol, equal_nan=False)


def launches(monkeypatch):
    """A launch for each block of candidates, dtype and optional argument."""
    made = recorded(monkeypatch)
    for exponent in range(int(math.log2(MAX_CANDIDATES)) + 1):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for penalty in (False, True):
                meta(1 << exponent, dtype, penalty)
    return made


def meta(k, dtype, penalty, vocab=32000):
    logits, shift, keep = case(2, k, 2048, penalty=penalty)
    logits = torch.empty(2, vocab, dtype=dtype, device="meta")
    shift = Shift(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in shift))
    guide_logits_triton(logits, shift, keep.to("meta"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_usual_variants_compile_without_spills(monkeypatch, architecture):
    made = recorded(monkeypatch)
    meta(16, torch.float32, False)
    meta(1024, torch.bfloat16, True, vocab=32001)
    for launch in made:
        assert_builds(launch, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_variant_compiles_without_spills(monkeypatch, architecture):
    for launch in launches(monkeypatch):
        assert_builds(launch, architecture)
