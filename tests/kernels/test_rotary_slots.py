"""rotary_slots: the reference against transformers' own operations, the kernel against it."""

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from guided_decode.kernels.norm import Norm
from guided_decode.kernels.rotary_slots import (
    Heads,
    Slots,
    Turn,
    rotary_slots,
    rotary_slots_reference,
    rotary_slots_triton,
)
from guided_decode.kernels.rounded_norm import RoundedNorm
from tests.kernels.kernel_cases import (
    ARCHITECTURES,
    DEVICE,
    DTYPES,
    assert_as_close_as_torch,
    assert_builds,
    poisoned,
    randn,
    recorded,
    runs_kernels,
)

# heads, kv_heads, dim, value_dim, what turns of dim.
SIZES = [(4, 2, 64, 64, 64), (6, 1, 80, 80, 80), (3, 3, 24, 24, 24), (4, 2, 64, 64, 32),
         (2, 2, 96, 64, 96)]  # fmt: skip
CAPACITY = 23


def case(tokens, size, *, form=None, merged=True, **where):
    """Heads as slices of one product's output, or on their own."""
    n, kv_heads, dim, value_dim, turned = size
    widths = [n * dim, kv_heads * dim, kv_heads * value_dim]
    parts = randn(tokens, sum(widths), **where).split(widths, -1)
    if not merged:
        parts = [part.contiguous() for part in parts]
    counts, dims = (n, kv_heads, kv_heads), (dim, dim, value_dim)
    heads = Heads(*(part.unflatten(-1, (count, own))
                    for part, count, own in zip(parts, counts, dims, strict=True)))  # fmt: skip
    angles = randn(tokens, turned // 2, seed=1).mul_(5).repeat(1, 2)
    norms = (None, None)
    if form is not None:
        offset, rounds_first = form
        norms = (RoundedNorm(Norm(randn(dim, seed=seed, **where), 1e-2, offset), rounds_first)
                 for seed in (2, 3))  # fmt: skip
    # cos and sin of a dtype are of its own numbers; their order in memory is nobody's business.
    turn = Turn(*(f().to(**where) for f in (angles.cos, angles.sin)), *norms)
    generator = torch.Generator().manual_seed(4)
    at = torch.randperm(CAPACITY, generator=generator)[:tokens].to(where.get("device", "cpu"))
    return heads, turn, at


def empty_slots(size, at, **where):
    _, kv_heads, dim, value_dim, _ = size
    pools = (torch.full((CAPACITY, kv_heads, own), -7.0, **where) for own in (dim, value_dim))
    return Slots(*pools, at)


def run(operation, given, size, **where):
    heads, turn, at = given
    slots = empty_slots(size, at, **where)
    return operation(heads, turn, slots), slots.keys, slots.values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("module_class", [None, Qwen3RMSNorm, Gemma3RMSNorm])
@torch.no_grad()
def test_reference_is_what_an_attention_module_does(module_class, dtype):
    size = SIZES[0]
    form = {None: None, Qwen3RMSNorm: (0.0, True), Gemma3RMSNorm: (1.0, False)}[module_class]
    given = heads, turn, at = case(5, size, form=form, dtype=dtype)

    def normed(x, by):
        if by is None:
            return x
        module = module_class(x.shape[-1], eps=by.norm.eps).to(dtype)
        module.weight.copy_(by.norm.weight)
        return module(x)

    # [1, heads, tokens, dim], as theirs.
    query, key = (normed(x, by).transpose(0, 1)[None]
                  for x, by in zip(heads[:2], turn[2:], strict=True))  # fmt: skip
    query, key = apply_rotary_pos_emb(query, key, turn.cos[None], turn.sin[None])
    output, keys, values = run(rotary_slots, given, size, dtype=dtype)
    assert torch.equal(output, query[0].transpose(0, 1))
    assert torch.equal(keys[at], key[0].transpose(0, 1))
    assert torch.equal(values[at], heads.value)
    others = [i for i in range(CAPACITY) if i not in at.tolist()]
    assert bool((keys[others] == -7).all() and (values[others] == -7).all())


def test_what_does_not_turn_stays():
    size = SIZES[3]
    given = heads, _, at = case(5, size)
    output, keys, _ = run(rotary_slots, given, size)
    assert torch.equal(output[..., 32:], heads.query[..., 32:])
    assert torch.equal(keys[at][..., 32:], heads.key[..., 32:])
    assert not torch.equal(output[..., :32], heads.query[..., :32])


def check(given, size, dtype, monkeypatch):
    with monkeypatch.context() as patch:
        poisoned(patch)
        outputs = run(rotary_slots_triton, given, size, device=DEVICE, dtype=dtype)
    torchs = run(rotary_slots_reference, given, size, device=DEVICE, dtype=dtype)
    heads, turn, at = given
    exact = (Heads(*(x.double() for x in heads)), turn._replace(cos=turn.cos.double(),
             sin=turn.sin.double()), at)  # fmt: skip
    truths = run(rotary_slots_reference, exact, size, device=DEVICE, dtype=torch.float64)
    for ours, theirs, truth in zip(outputs, torchs, truths, strict=True):
        assert ours.dtype == theirs.dtype
        assert_as_close_as_torch(ours, theirs, truth)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", [None, (0.0, True), (1.0, False)])
@pytest.mark.parametrize("merged", [False, True])
def test_kernel_is_the_reference(merged, form, size, dtype, monkeypatch):
    where = {"device": DEVICE, "dtype": dtype}
    check(case(5, size, form=form, merged=merged, **where), size, dtype, monkeypatch)


@runs_kernels
def test_kernel_takes_one_token_and_none(monkeypatch):
    size = SIZES[0]
    where = {"device": DEVICE, "dtype": torch.float32}
    check(case(1, size, **where), size, torch.float32, monkeypatch)
    output, keys, _ = run(rotary_slots_triton, case(0, size, **where), size, **where)
    assert output.shape == (0, 4, 64)
    assert bool((keys == -7).all())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_usual_variants_compile_without_spills(monkeypatch, architecture):
    made = recorded(monkeypatch)
    for size in ((40, 40, 128, 128, 128), (32, 8, 128, 128, 128), (8, 4, 256, 256, 256)):
        for form in (None, (0.0, True)):
            given = case(16, size, form=form, dtype=torch.bfloat16)
            run(rotary_slots_triton, given, size, dtype=torch.bfloat16)
    for launch in made:
        assert_builds(launch, architecture)
