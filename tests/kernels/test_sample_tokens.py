"""sample_tokens: its noise, its distribution, and that no row's draw depends on another's."""

import pytest
import torch

from guided_decode.kernels.gumbel import gumbel_noise, philox
from guided_decode.kernels.sample_tokens import (
    sample_tokens,
    sample_tokens_reference,
    sample_tokens_triton,
    sampling_keys,
)
from tests.kernels.kernel_cases import (
    ARCHITECTURES,
    DEVICE,
    DTYPES,
    INTERPRETED,
    VOCABULARIES,
    assert_builds,
    captured,
    on_cuda,
    poisoned,
    recorded,
    runs_kernels,
)
from tests.significance import chi_squared_p, kolmogorov_p


def draw_case(rows, vocab, *, device="cpu", dtype=torch.float32, seed=0):
    """What sample_tokens takes: every fourth row is greedy, and a tenth of the tokens is −inf."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator).to(dtype)
    logits[torch.rand(rows, vocab, generator=generator) < 0.1] = -torch.inf
    row = torch.arange(rows)
    temperature = torch.where(row % 4 == 3, 0.0, 0.5 + row % 3)
    seeds = (row + 1) * 0x9E3779B97F4A7C1 + seed
    # Beyond 32 bits, so that both words are seen.
    positions = row * 3 + (row % 2 << 33)
    return tuple(x.to(device) for x in (logits, temperature, seeds, positions))


def words(*hexadecimal):
    return tuple(torch.tensor([int(word, 16)]) for word in hexadecimal)


@pytest.mark.parametrize(
    ("counter", "key", "block"),
    [
        (("0",) * 4, ("0",) * 2, ("6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8")),
        (("ffffffff",) * 4, ("ffffffff",) * 2, ("408f276d", "41c83b0e", "a20bc7c6", "6d5451fd")),
        (
            ("243f6a88", "85a308d3", "13198a2e", "03707344"),
            ("a4093822", "299f31d0"),
            ("d16cfe09", "94fdcceb", "5001e420", "24126ea1"),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(counter, key, block):
    assert philox(words(*counter), words(*key)) == words(*block)


def test_noise_is_standard_gumbel():
    noise = gumbel_noise(torch.tensor(7), torch.arange(40)[:, None], torch.arange(5000)).flatten()
    assert kolmogorov_p(noise, lambda x: (-(-x).exp()).exp()) > 0.01
    assert torch.isfinite(noise).all()


def test_noise_is_as_fine_where_it_is_largest():
    # Of 2¹⁷ draws the largest are those that win: float32 holds u to 24 bits there too.
    noise = gumbel_noise(torch.tensor(1), torch.tensor(2), torch.arange(1 << 17))
    largest = noise.sort(descending=True).values[:1000]
    assert largest.unique().numel() > 995
    assert largest[0] > 9


def test_noise_depends_on_each_of_its_keys():
    far = 1 << 40
    seeds = torch.tensor([1, 2, 1, 1, 1 + far, 1, -1])
    positions = torch.tensor([2, 2, 3, 2, 2, 2 + far, 2])
    tokens = torch.tensor([3, 3, 3, 4, 3, 3, 3])
    assert gumbel_noise(seeds, positions, tokens).unique().numel() == 7


def in_rows(given, rows):
    return tuple(x[rows] for x in given)


@pytest.mark.parametrize("vocab", [257, *VOCABULARIES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_drawn_as_it_would_be_alone(vocab, dtype):
    given = draw_case(9, vocab, dtype=dtype)
    drawn = sample_tokens(*given)
    assert drawn.dtype == torch.int64
    assert torch.equal(drawn, sample_tokens_reference(*given))
    alone = [sample_tokens(*in_rows(given, slice(i, i + 1))) for i in range(9)]
    assert torch.equal(drawn, torch.cat(alone))
    greedy = given[1] == 0
    assert torch.equal(drawn[greedy], given[0][greedy].argmax(-1))


def test_what_is_minus_infinity_is_never_drawn():
    logits, temperature, seeds, _ = in_rows(draw_case(4, 50), slice(0, 1))
    logits[:, 7:] = -torch.inf
    many = (logits.expand(2000, -1), temperature.expand(2000), seeds.expand(2000))
    drawn = sample_tokens(*many, torch.arange(2000))
    left = logits[0, :7] > -torch.inf
    assert set(drawn.tolist()) == set(left.nonzero().flatten().tolist())


def one_row_often(draws, device="cpu"):
    """One row of 20 likely tokens among others, at `draws` positions."""
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, ::50] = torch.randn(20, generator=torch.Generator().manual_seed(3))
    given = torch.full((draws,), 0.8), torch.full((draws,), 11), torch.arange(draws)
    return tuple(x.to(device) for x in (logits.expand(draws, -1), *given))


def assert_distributed(tokens, logits):
    exact = (logits[0].double() / 0.8).softmax(-1).cpu()
    counts = torch.bincount(tokens.cpu(), minlength=1000).double()
    assert not counts[exact == 0].any()
    likely = exact * len(tokens) >= 5
    observed = torch.cat([counts[likely], counts[~likely].sum()[None]])
    wanted = torch.cat([exact[likely], exact[~likely].sum()[None]]) * len(tokens)
    seen = wanted > 0
    assert seen.sum() > 3
    assert chi_squared_p(observed[seen], wanted[seen]) > 0.01


def test_draws_follow_the_softmax():
    given = one_row_often(20000)
    assert_distributed(sample_tokens_reference(*given), given[0])


def tied(device="cpu"):
    """Rows of one logit: without noise, and one that is −inf everywhere."""
    logits = torch.zeros(3, 5003)
    logits[1, :1500] = -torch.inf
    logits[2] = -torch.inf
    nothing = torch.zeros(3, dtype=torch.int64)
    return tuple(x.to(device) for x in (logits, torch.zeros(3), nothing, nothing))


def test_ties_go_to_the_lower_token():
    assert sample_tokens_reference(*tied()).tolist() == [0, 1500, 0]


def with_nan(device="cpu"):
    """Rows with a NaN, of NaN alone, and −inf at an infinite temperature, of several blocks."""
    logits = torch.randn(4, 5003, generator=torch.Generator().manual_seed(1))
    logits[0, 4000] = torch.nan
    logits[1] = torch.nan
    logits[2, :2000] = -torch.inf
    temperature = torch.tensor([0.0, 0.8, torch.inf, 0.7])
    noise = torch.arange(4)
    return tuple(x.to(device) for x in (logits, temperature, noise, noise))


def test_what_is_nan_is_not_drawn():
    given = with_nan()
    drawn = sample_tokens_reference(*given).tolist()
    assert drawn[0] == given[0][0].nan_to_num(-torch.inf).argmax()
    assert drawn[1] == 0
    assert drawn[2] >= 2000


def assert_same_draws(drawn, given):
    """The reference's token, but where two keys are a rounding apart."""
    keys = sampling_keys(*given)
    wanted = keys.argmax(-1)
    best, own = (keys.gather(-1, x[:, None])[:, 0] for x in (wanted, drawn))
    different = drawn != wanted
    eps = torch.finfo(torch.float32).eps
    assert (best - own <= 16 * eps * best.abs().clamp(min=1))[different].all()
    assert different.sum() <= max(1, len(drawn) // 20)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [100, *VOCABULARIES])
def test_kernel_draws_as_the_reference(vocab, dtype, monkeypatch):
    given = draw_case(9, vocab, device=DEVICE, dtype=dtype)
    poisoned(monkeypatch)
    assert_same_draws(sample_tokens_triton(*given), given)


@runs_kernels
def test_kernel_takes_logits_and_settings_with_any_strides(monkeypatch):
    logits, temperature, *noise = draw_case(6, 3000, device=DEVICE)
    wide = torch.empty(3000, 6, device=DEVICE).T.copy_(logits)
    heat = temperature.repeat_interleave(2)[::2]
    assert heat.stride(0) == 2
    poisoned(monkeypatch)
    assert_same_draws(sample_tokens_triton(wide, heat, *noise), (logits, temperature, *noise))


@runs_kernels
def test_kernels_ties_go_to_the_lower_token(monkeypatch):
    given = tied(DEVICE)
    poisoned(monkeypatch)
    assert sample_tokens_triton(*given).tolist() == [0, 1500, 0]


@runs_kernels
def test_kernel_draws_nothing_that_is_nan(monkeypatch):
    poisoned(monkeypatch)
    given = with_nan(DEVICE)
    assert torch.equal(sample_tokens_triton(*given), sample_tokens_reference(*given))


@runs_kernels
def test_kernels_draws_follow_the_softmax():
    given = one_row_often(500 if INTERPRETED else 20000, DEVICE)
    assert_distributed(sample_tokens_triton(*given), given[0])


@on_cuda
def test_public_function_replays_in_a_cuda_graph():
    given = draw_case(9, 32001, device="cuda")
    drawn = torch.zeros(9, dtype=torch.int64, device="cuda")
    graph = captured(lambda: drawn.copy_(sample_tokens(*given)))
    for seed in (1, 2):
        for old, new in zip(given, draw_case(9, 32001, device="cuda", seed=seed), strict=True):
            old.copy_(new)
        graph.replay()
        assert_same_draws(drawn, given)


def meta(vocab, dtype):
    given = draw_case(2, 8, dtype=dtype)
    logits = torch.empty(2, vocab, dtype=dtype, device="meta")
    sample_tokens_triton(logits, *(x.to("meta") for x in given[1:]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_usual_variants_compile_without_spills(monkeypatch, architecture):
    made = recorded(monkeypatch)
    meta(32000, torch.float32)
    meta(128256, torch.bfloat16)
    for launch in made:
        assert_builds(launch, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_variant_compiles_without_spills(monkeypatch, architecture):
    made = recorded(monkeypatch)
    for exponent in range(10, 21):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            meta(1 << exponent, dtype)
    for launch in made:
        assert_builds(launch, architecture)
