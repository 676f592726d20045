"""merge_splits: attention over parts of the keys, merged by natural log-sum-exp."""

import pytest
import torch

from guided_decode.kernels.merge_splits import (
    MAX_SPLITS,
    merge_splits_reference,
    merge_splits_triton,
)
from tests.kernels.kernel_cases import (
    ARCHITECTURES,
    DEVICE,
    DTYPES,
    NAN,
    assert_as_close_as_torch,
    assert_builds,
    captured,
    on_cuda,
    randn,
    recorded,
    runs_kernels,
)

# Splits, tokens, heads and dim.
SHAPES = [(2, 1, 1, 64), (3, 5, 2, 80), (16, 2, 3, 128), (17, 3, 1, 96), (MAX_SPLITS, 2, 2, 256)]


def parts(splits, tokens, heads, dim, *, device="cpu", seed=0):
    """Means and log-sum-exps of each part, some parts empty, the last token's all."""
    lse = randn(splits, tokens, heads, seed=seed, device=device).mul_(5)
    lse[1::3] = -torch.inf
    lse[:, -1:, -1:] = -torch.inf
    partial = randn(splits, tokens, heads, dim, seed=seed + 1, device=device)
    return partial.masked_fill(lse[..., None] == -torch.inf, 0.0), lse


def in_float64(partial, lse):
    weights = lse.double().exp()[..., None]
    mass = weights.sum(0)
    return (partial.double() * weights).sum(0) / mass.masked_fill(mass == 0, 1.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_weighted_mean(shape):
    given = parts(*shape)
    output = merge_splits_reference(*given).double()
    torch.testing.assert_close(output, in_float64(*given), rtol=1e-5, atol=1e-5)


def test_merging_the_parts_of_a_softmax_gives_the_softmax():
    scores, values = randn(40), randn(40, 8, seed=1)
    cuts = [(0, 7), (7, 20), (20, 40)]
    partial = torch.stack([scores[a:b].softmax(0) @ values[a:b] for a, b in cuts])
    lse = torch.stack([scores[a:b].logsumexp(0) for a, b in cuts])
    merged = merge_splits_reference(partial[:, None, None], lse[:, None, None])
    torch.testing.assert_close(merged[0, 0], scores.softmax(0) @ values)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_is_the_reference(shape, dtype):
    given = parts(*shape, device=DEVICE)
    output = torch.full(shape[1:], NAN, dtype=dtype, device=DEVICE)
    merge_splits_triton(*given, output)
    assert_as_close_as_torch(output, merge_splits_reference(*given).to(dtype), in_float64(*given))


@on_cuda
def test_kernel_replays_in_a_cuda_graph():
    partial, lse = parts(7, 5, 4, 128, device="cuda")
    output = torch.zeros(5, 4, 128, device="cuda")
    graph = captured(lambda: merge_splits_triton(partial, lse, output))
    for seed in (3, 4):
        for old, new in zip((partial, lse), parts(7, 5, 4, 128, device="cuda", seed=seed),
                            strict=True):  # fmt: skip
            old.copy_(new)
        graph.replay()
        torch.testing.assert_close(output, merge_splits_reference(partial, lse))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_variant_compiles_without_spills(monkeypatch, architecture):
    made = recorded(monkeypatch)
    for dim in (64, 80, 128, 256):
        for dtype in (torch.float32, torch.bfloat16):
            output = torch.empty(2, 3, dim, dtype=dtype, device="meta")
            partial, lse = parts(4, 2, 3, dim)
            merge_splits_triton(partial.to("meta"), lse.to("meta"), output)
    for launch in made:
        assert_builds(launch, architecture)
