"""A causal LM's logits by padded static batches and graphs of them: those of a plain forward."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from guided_decode.forward.activations import LOGIT_BYTES
from guided_decode.forward.packed_model import PackedModel
from guided_decode.forward.pool_size import graph_bytes
from guided_decode.forward.self_check import check_packed
from guided_decode.prefix import PrefixHandle
from guided_decode.scoring.implicit import ImplicitScorer, LanguageModel
from tests import models

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def packed(arch="llama", device="cpu", fused=True, **options):
    """A causal LM on a GPU's attention; fused=False: on a CPU's."""
    stock = models.tiny(arch, "lm")
    own = type(stock)(copy.deepcopy(stock.config))
    own.load_state_dict(stock.state_dict())
    made = PackedModel(own.eval().to(device), "the test's", fused=fused, **options)
    check_packed(made)
    return made


def as_on_a_gpu(arch="llama", device="cpu", **options):
    return LanguageModel(packed(arch, device, **options), graphs=True)


def decode(model, steps=12, seed=0, rows=5):
    """Next logits of several rows that come and go, and what they were when they were read."""
    drawn = random.Random(seed)
    live = [PrefixHandle(p) for p in models.prompts(drawn.choices(range(1, 60), k=rows), seed=seed)]
    found = []
    for _ in range(steps):
        handles = [live[i] for i in sorted(drawn.sample(range(rows), drawn.randint(1, rows)))]
        found.append(model.next_logits(handles))
        for handle, token in zip(handles, found[-1].argmax(-1).tolist(), strict=True):
            handle.append(token)
    return found


def assert_alike(mine, theirs, atol=1e-4):
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=atol)


@pytest.mark.parametrize("arch", ["llama", "mistral-sliding", "gemma2"])
@pytest.mark.parametrize("limit", [8192, 7], ids=["roomy", "small forwards"])
def test_padded_batches_give_what_plain_ones_give(arch, limit):
    padded = as_on_a_gpu(arch, max_forward_tokens=limit)
    plain = LanguageModel(packed(arch, fused=False))
    assert plain.graphs is None
    assert_alike(decode(padded), decode(plain))
    assert padded.graphs.replays > 5
    assert padded.stats.tokens == plain.stats.tokens
    padded.cache.check()


def test_what_was_read_stays_as_it_was():
    padded = as_on_a_gpu()
    first = padded.next_logits(models.prompts([2, 3]))
    before = first.clone()
    padded.next_logits(models.prompts([2, 3], seed=1))
    assert padded.graphs.replays == 2
    assert torch.equal(first, before)


def test_more_rows_than_the_buffer_holds_run_as_they_are(monkeypatch):
    plain = LanguageModel(packed(fused=False))
    for rows, replays in ((4, 1), (5, 0)):
        padded, prompts = as_on_a_gpu(), models.prompts([2] * rows)
        assert padded._graphs.most_rows == 512
        padded._graphs.most_rows = 4
        assert_alike(padded.next_logits(prompts), plain.next_logits(prompts))
        assert padded.graphs.replays == replays


def test_rows_that_forward_in_parts_are_read_once_they_are_whole():
    """A forward whose every row is cut has no logits to read, and is no graph's."""
    padded, plain = as_on_a_gpu(max_forward_tokens=10), LanguageModel(packed(fused=False))
    prompts = models.prompts([25, 3, 31])
    assert_alike(padded.next_logits(prompts), plain.next_logits(prompts))


def test_other_weights_are_other_graphs():
    padded, prompts = as_on_a_gpu(), models.prompts([3, 2])
    padded.next_logits(prompts)
    with torch.no_grad():
        padded.model.model.lm_head.weight.mul_(2.0)
    plain = LanguageModel(PackedModel(padded.model.model, "the same", fused=False))
    captures = padded.graphs.captures
    # Its attention was switched by the other, which reads it first.
    expected = plain.next_logits(prompts)
    padded.model._prepare()
    assert_alike(padded.next_logits(prompts), expected)
    assert padded.graphs.captures == captures + 1


def test_what_is_prepared_is_not_captured_while_requests_wait():
    scorer = ImplicitScorer(packed(), packed("llama"), graphs=True)
    scorer.prepare(rows=5, prefix=100)
    models_of = (scorer._tuned, scorer._reference)
    captured = [each.graphs.captures for each in models_of]
    assert captured[0] == captured[1] > 0
    handles = [PrefixHandle(prompt) for prompt in models.prompts([70] * 5)]
    candidates = torch.arange(3, 19).expand(5, -1)
    scorer.score(handles, candidates)
    after = [each.graphs.captures for each in models_of]
    for rows in (1, 2, 3, 4, 5):
        for handle in handles[:rows]:
            handle.append(7)
        scorer.score(handles[:rows], candidates[:rows])
    assert [each.graphs.captures for each in models_of] == after
    assert all(each.graphs.replays >= 5 for each in models_of)


def test_prompts_run_as_they_are_and_take_no_graphs_place():
    padded = as_on_a_gpu()
    padded.next_logits(models.prompts([20, 9]))
    assert len(padded.graphs) == 0


def test_a_copy_has_a_buffer_of_its_own():
    padded, prompts = as_on_a_gpu(), models.prompts([3, 2])
    first = padded.next_logits(prompts)
    copied = copy.deepcopy(padded)
    with torch.no_grad():
        copied.model.model.lm_head.weight.mul_(2.0)
    assert not torch.allclose(copied.next_logits(prompts), first)
    assert copied.graphs.replays == 2
    assert torch.equal(padded.next_logits(prompts), first)
    assert padded._graphs._logits.data_ptr() != copied._graphs._logits.data_ptr()


def test_the_logits_are_in_the_budget():
    lm, critic = (graph_bytes(models.tiny("llama", head)) for head in ("lm", "token"))
    # In float32 one buffer, and three as they come.
    assert lm - critic == 4 * LOGIT_BYTES


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["llama", "mistral-sliding", "gemma2"])
def test_on_a_gpu_the_logits_are_those_of_the_cpu(arch):
    device, plain = LanguageModel(packed(arch, "cuda")), LanguageModel(packed(arch, fused=False))
    for seed in range(4):
        assert_alike(decode(device, seed=seed), decode(plain, seed=seed), atol=1e-3)
    assert device.graphs.replays > 20
    assert device.graphs.works
