"""guide_sample: its noise, its distribution, and the draw over the whole vocabulary."""

import pytest
import torch

from guided_decode.kernels.candidate_shift import MAX_CANDIDATES
from guided_decode.kernels.guide_logits import guide_logits_reference
from guided_decode.kernels.guide_sample import (
    guide_sample,
    guide_sample_reference,
    guide_sample_triton,
)
from guided_decode.kernels.gumbel import gumbel_noise, philox
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
from tests.kernels.test_guide_logits import case
from tests.significance import chi_squared_p, kolmogorov_p

SHAPES = [(1, 1), (5, 3), (64, 16), (7, 64), (3, 200)]


def draw_case(rows, k, vocab, *, device="cpu", dtype=torch.float32, seed=0, **fields):
    """What guide_sample takes: every fourth row is greedy."""
    logits, shift, _ = case(rows, k, vocab, device=device, dtype=dtype, seed=seed, **fields)
    row = torch.arange(rows)
    temperature = torch.where(row % 4 == 3, 0.0, 0.5 + row % 3)
    seeds = (row + 1) * 0x9E3779B97F4A7C1 + seed
    # Beyond 32 bits, so that both words are seen.
    positions = row * 3 + (row % 2 << 33)
    return (logits, shift, *(x.to(device) for x in (temperature, seeds, positions)))


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


def whole_vocabulary(logits, shift, temperature, seeds, positions):
    """Gumbel-max over the vocabulary with −inf outside the candidates, -1 where there are none."""
    everywhere = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    guided = guide_logits_reference(logits, shift, everywhere).logits.float()
    tokens = torch.arange(logits.shape[1], device=logits.device)
    noise = gumbel_noise(seeds[:, None], positions[:, None], tokens)
    greedy = (temperature == 0)[:, None]
    keys = torch.where(greedy, guided, guided / temperature[:, None] + noise)
    return keys.argmax(-1).masked_fill((shift.candidates < 0).all(-1), -1), keys


@pytest.mark.parametrize("vocab", [257, *VOCABULARIES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drawing_among_candidates_is_drawing_from_the_vocabulary(vocab, dtype):
    for seed in range(6):
        given = draw_case(9, 16, vocab, dtype=dtype, seed=seed)
        assert torch.equal(guide_sample_reference(*given), whole_vocabulary(*given)[0])


@pytest.mark.parametrize(("rows", "k"), SHAPES)
def test_any_shape_is_drawn_from_the_vocabulary(rows, k):
    given = draw_case(rows, k, 5003, min_keep=2, penalty=False)
    assert torch.equal(guide_sample_reference(*given), whole_vocabulary(*given)[0])


def test_public_function_is_the_reference_on_a_cpu():
    given = draw_case(9, 16, 5003)
    logits, shift, temperature, seeds, positions = given
    drawn = guide_sample(
        logits, **shift._asdict(), temperature=temperature, seeds=seeds, positions=positions
    )
    assert torch.equal(drawn, guide_sample_reference(*given))


def one_row_often(draws, device="cpu"):
    """One row of 16 candidates, some pruned, at `draws` positions."""
    logits, shift, *_ = case(1, 16, 1000, device=device)
    shift = shift._replace(margin=torch.tensor([1.5], device=device))
    many = [x.expand(draws, *x.shape[1:]) if isinstance(x, torch.Tensor) else x for x in shift]
    given = torch.full((draws,), 0.8), torch.full((draws,), 11), torch.arange(draws)
    return (logits.expand(draws, -1), type(shift)(*many), *(x.to(device) for x in given))


def assert_distributed(tokens, logits, shift):
    hidden = torch.zeros(1, dtype=torch.bool, device=logits.device)
    one = type(shift)(*(x[:1] if isinstance(x, torch.Tensor) else x for x in shift))
    guided = guide_logits_reference(logits[:1], one, hidden).logits
    exact = (guided.double() / 0.8).softmax(-1)[0].cpu()
    counts = torch.bincount(tokens.cpu(), minlength=1000).double()
    assert not counts[exact == 0].any()
    likely = exact * len(tokens) >= 5
    observed = torch.cat([counts[likely], counts[~likely].sum()[None]])
    wanted = torch.cat([exact[likely], exact[~likely].sum()[None]]) * len(tokens)
    seen = wanted > 0
    assert seen.sum() > 3
    assert chi_squared_p(observed[seen], wanted[seen]) > 0.01


def test_draws_follow_the_guided_softmax():
    given = one_row_often(20000)
    assert_distributed(guide_sample_reference(*given), *given[:2])


def test_ties_go_to_the_lower_token():
    logits, shift, temperature, seeds, positions = draw_case(1, 16, 257)
    unscored = torch.zeros_like(shift.scored)
    drawn = guide_sample_reference(
        torch.zeros_like(logits), shift._replace(scored=unscored), temperature * 0, seeds, positions
    )
    assert drawn == shift.candidates.min()


def assert_same_draws(drawn, given):
    """The reference's token, but where two keys are a rounding apart."""
    wanted, keys = whole_vocabulary(*given)
    assert torch.equal(drawn < 0, wanted < 0)
    best, own = (keys.gather(-1, x.clamp(min=0)[:, None])[:, 0] for x in (wanted, drawn))
    different = drawn != wanted
    eps = torch.finfo(given[0].dtype).eps
    assert (best - own <= 16 * eps * best.abs().clamp(min=1))[different].all()
    assert different.sum() <= max(1, len(drawn) // 20)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [100, *VOCABULARIES])
def test_kernel_draws_as_the_reference(vocab, dtype, monkeypatch):
    given = draw_case(9, 16, vocab, device=DEVICE, dtype=dtype)
    poisoned(monkeypatch)
    assert_same_draws(guide_sample_triton(*given), given)


@runs_kernels
@pytest.mark.parametrize(("rows", "k"), [*SHAPES, (2, MAX_CANDIDATES)])
@pytest.mark.parametrize(("penalty", "min_keep"), [(True, 1), (False, 3)])
def test_kernel_takes_any_number_of_candidates(rows, k, penalty, min_keep, monkeypatch):
    given = draw_case(rows, k, 5003, device=DEVICE, penalty=penalty, min_keep=min_keep)
    poisoned(monkeypatch)
    assert_same_draws(guide_sample_triton(*given), given)


@runs_kernels
def test_kernel_draws_alike_from_candidates_and_from_the_vocabulary():
    logits, shift, *noise = draw_case(12, 16, 700, device=DEVICE, penalty=False)
    drawn = guide_sample_triton(logits, shift, *noise)
    hidden = torch.zeros(12, dtype=torch.bool, device=DEVICE)
    guided = guide_logits_reference(logits, shift, hidden).logits
    everything = torch.arange(700, device=DEVICE).expand(12, -1)
    plain = torch.zeros(12, 700, device=DEVICE)
    whole = shift._replace(candidates=everything, values=plain, scored=plain > 0)
    live = (shift.candidates >= 0).any(-1)
    assert torch.equal(guide_sample_triton(guided, whole, *noise)[live], drawn[live])
    assert (drawn[~live] == -1).all()


@runs_kernels
def test_kernels_draws_follow_the_guided_softmax():
    given = one_row_often(500 if INTERPRETED else 20000, DEVICE)
    assert_distributed(guide_sample_triton(*given), *given[:2])


@on_cuda
def test_public_function_replays_in_a_cuda_graph():
    logits, shift, *noise = draw_case(9, 16, 32001, device="cuda")
    given = shift._asdict()
    names = ("temperature", "seeds", "positions")
    drawn = torch.zeros(9, dtype=torch.int64, device="cuda")

    def run():
        drawn.copy_(guide_sample(logits, **given, **dict(zip(names, noise, strict=True))))

    graph = captured(run)
    for seed in (1, 2):
        fresh, other, *others = draw_case(9, 16, 32001, device="cuda", seed=seed)
        for old, new in zip((logits, *shift, *noise), (fresh, *other, *others), strict=True):
            if isinstance(old, torch.Tensor):
                old.copy_(new)
        graph.replay()
        assert_same_draws(drawn, (logits, shift, *noise))


def meta(k, dtype, penalty):
    given = draw_case(2, k, 2048, penalty=penalty)
    shift = type(given[1])(*(x.to("meta") if torch.is_tensor(x) else x for x in given[1]))
    logits = torch.empty(2, 32000, dtype=dtype, device="meta")
    guide_sample_triton(logits, shift, *(x.to("meta") for x in given[2:]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_usual_variants_compile_without_spills(monkeypatch, architecture):
    made = recorded(monkeypatch)
    meta(16, torch.float32, False)
    meta(1024, torch.bfloat16, True)
    for launch in made:
        assert_builds(launch, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_variant_compiles_without_spills(monkeypatch, architecture):
    made = recorded(monkeypatch)
    for exponent in range(MAX_CANDIDATES.bit_length()):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for penalty in (False, True):
                meta(1 << exponent, dtype, penalty)
    for launch in made:
        assert_builds(launch, architecture)
