"""The device's path of the scorer: fused attention, padded static batches, and graphs of them."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from guided_decode import GuidanceConfig, load_scorer
from guided_decode.forward import graphs, packed_model
from guided_decode.forward.activations import TOKEN_BUCKETS
from guided_decode.forward.packed_model import PackedModel
from guided_decode.forward.pool_size import graph_bytes, most_graph_tokens
from guided_decode.forward.self_check import check_packed
from guided_decode.guidance.step import guide_rows
from guided_decode.prefix import PrefixHandle
from guided_decode.scoring.critic import CriticScorer
from tests import models, oracle

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def scorer_like_a_gpus(arch="llama", device="cpu", **options):
    """A critic on the fused attention, whose forwards are padded to buckets."""
    plain = load_scorer(models.saved(arch, "token"), kind="verl-critic")
    trunk = type(plain.model.model)(copy.deepcopy(models.tiny(arch, "token").config))
    trunk.load_state_dict(plain.model.model.state_dict())
    packed = PackedModel(trunk.eval().to(device), "the test's", fused=True, **options)
    check_packed(packed)
    head = copy.copy(plain.head)
    head = type(head)(head.weight.to(device), None, head.transform)
    return CriticScorer(packed, head, eos_token_id=models.EOS, graphs=True)


def decode(scorer, steps=12, seed=0, rows=5):
    """Guided steps of several rows that come and go; what was guided, row by row."""
    drawn = random.Random(seed)
    noise = torch.Generator().manual_seed(seed)
    prompts = models.prompts(drawn.choices(range(1, 60), k=rows), seed=seed)
    live = [PrefixHandle(prompt) for prompt in prompts]
    config = GuidanceConfig(beta=1.5, top_k=5)
    found = []
    for _ in range(steps):
        chosen = sorted(drawn.sample(range(rows), drawn.randint(1, rows)))
        logits = torch.randn(len(chosen), models.VOCAB, generator=noise) * 3
        handles = [live[i] for i in chosen]
        found.append(guide_rows(scorer, logits, handles, config, terminals=[models.EOS]))
        for handle, token in zip(handles, found[-1].argmax(-1).tolist(), strict=True):
            handle.append(token)
    return found


@pytest.mark.parametrize("arch", ["llama", "mistral-sliding", "gemma2"])
@pytest.mark.parametrize("limit", [8192, 7], ids=["roomy", "small forwards"])
def test_padded_batches_give_what_plain_ones_give(arch, limit):
    padded = scorer_like_a_gpus(arch, max_forward_tokens=limit)
    plain = load_scorer(models.saved(arch, "token"), kind="verl-critic")
    for mine, theirs in zip(decode(padded), decode(plain), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
    assert padded._graphs.replays > 5
    assert padded.stats.tokens == plain.stats.tokens
    padded.cache.check()


def test_few_graphs_serve_many_steps():
    scorer = scorer_like_a_gpus()
    decode(scorer, steps=60)
    assert scorer._graphs.replays > 50
    assert len(scorer._graphs) <= 20


def test_prompts_that_were_not_seen_replay_at_every_step():
    """What the GPU's own test of launches counts on: another seed is other work."""
    scorer = scorer_like_a_gpus()
    decode(scorer, steps=30, rows=1)
    before = scorer._graphs.replays
    decode(scorer, steps=30, rows=1)
    assert scorer._graphs.replays == before
    decode(scorer, steps=30, rows=1, seed=1)
    assert scorer._graphs.replays - before > 15


def test_shapes_beyond_the_buckets_run_as_they_are():
    scorer = scorer_like_a_gpus()
    long, short = models.prompts([graphs.MOST_QUERIES + 1, 20], seed=4)
    none = torch.empty(1, 0, dtype=torch.int64)
    brute = oracle.Values(models.tiny("llama", "token"))
    for prompt, replays in ((long, 0), (short, 1)):
        value = scorer.score([prompt], none).baseline
        assert value.item() == pytest.approx(brute([prompt])[0], abs=1e-4)
        assert scorer._graphs.replays == replays


def test_the_graphs_memory_is_known_for_the_budget():
    config = models.tiny("llama", "token").config
    per_token = 4 * (4 * config.hidden_size + 3 * config.intermediate_size)
    activations = TOKEN_BUCKETS[-1] * per_token
    # cuBLAS's workspace and 64 graphs' nodes, which an allocator of torch's does not count.
    assert graph_bytes(models.tiny("llama", "token")) - activations == 96 << 20


def test_a_table_that_grew_is_another_graph(monkeypatch):
    monkeypatch.setattr(packed_model, "_TABLE", (8, 64))
    scorer = scorer_like_a_gpus()
    decode(scorer, steps=3, rows=3)
    before = scorer.cache.tables.table.data_ptr()
    decode(scorer, steps=6, rows=40, seed=1)
    assert scorer.cache.tables.table.data_ptr() != before
    assert {bucket.table[0] for bucket in scorer._graphs._graphs} == {
        scorer.cache.tables.table.data_ptr()
    }


def test_a_ramp_of_rows_captures_each_graph_once():
    scorer = scorer_like_a_gpus()
    table = scorer.cache.tables.table.data_ptr()
    for seed in (0, 100):
        for rows in (2, 5, 10, 20, 40):
            decode(scorer, steps=8, rows=rows, seed=seed + rows)
        # None was dropped.
        assert scorer._graphs.captures == len(scorer._graphs) > 10
    assert scorer.cache.tables.table.data_ptr() == table


def test_a_small_pool_begins_with_small_tables():
    """A table of 256 rows may not exceed the share of the pool that tables have."""
    scorer = scorer_like_a_gpus(cache_tokens=50)
    tables = scorer.cache.tables
    assert tables.table.shape == (256, 64)
    assert tables.nbytes <= 1 << 20


def test_what_is_prepared_is_not_captured_while_requests_wait():
    scorer = scorer_like_a_gpus()
    scorer.prepare(rows=6, candidates=5, prefix=100)
    # (8, 1), (16, 2), (16, 4), (24, 4), (32, 8) and (32, 8): tokens and rows.
    prepared = scorer._graphs.captures
    assert prepared == len(scorer._graphs) == 5
    assert scorer._graphs.replays == scorer.stats.forwards == 0
    handles = [PrefixHandle(prompt) for prompt in models.prompts([70] * 6)]
    drawn, captures = torch.Generator().manual_seed(0), []
    for step in range(12):
        rows = step % 6 + 1
        candidates = torch.stack([
            torch.randperm(models.VOCAB, generator=drawn)[:5] for _ in range(rows)
        ])  # fmt: skip
        values = scorer.score(handles[:rows], candidates).values
        captures.append(scorer._graphs.captures)
        plain = load_scorer(models.saved("llama", "token"), kind="verl-critic")
        expected = plain.score(handles[:rows], candidates).values
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-4)
        for handle, chosen in zip(handles, candidates.tolist(), strict=False):
            handle.append(chosen[0])
    # The first six steps have prompts to read, too.
    assert len(set(captures[5:])) == 1
    assert scorer._graphs.replays >= 6


# Weights of a layer: 15, 218, 317 and 856 millions.
@pytest.mark.parametrize(
    ("hidden", "inner", "layers", "heads", "kv_heads", "tokens"),
    [
        (896, 4864, 24, 14, 2, 2048),
        (4096, 14336, 32, 32, 8, 2048),
        (5120, 13824, 40, 40, 40, 1024),
        (8192, 28672, 80, 64, 8, 512),
    ],
    ids=["0.5B", "8B", "13B", "70B"],
)
def test_smaller_models_have_longer_graphs(hidden, inner, layers, heads, kv_heads, tokens):
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=1000,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaModel(config)
    assert most_graph_tokens(model) == tokens


def test_more_tokens_than_a_models_longest_graph_run_as_they_are():
    prompts = models.prompts([60] * 12, seed=3)  # 720 tokens
    none = torch.empty(12, 0, dtype=torch.int64)
    expected = load_scorer(models.saved("llama", "token"), kind="verl-critic").score(prompts, none)
    for most, replays in ((2048, 1), (512, 0)):
        scorer = scorer_like_a_gpus()
        assert scorer.model.most_graph_tokens == 2048
        scorer._graphs._most_tokens = most
        found = scorer.score(prompts, none)
        torch.testing.assert_close(found.baseline, expected.baseline, rtol=0, atol=1e-4)
        assert scorer._graphs.replays == replays


def test_a_forward_that_cannot_be_captured_runs_as_it_is(monkeypatch, caplog):
    scorer = scorer_like_a_gpus()

    def refuse(self, run):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs.GraphedForward, "_record", refuse)
    scorer._graphs._capture = True
    expected = decode(load_scorer(models.saved("llama", "token"), kind="verl-critic"))
    for mine, theirs in zip(decode(scorer), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
    assert scorer._graphs.replays == 0
    assert caplog.text.count("CUDA graphs are off") == 1


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["llama", "mistral-sliding", "gemma2"])
def test_on_a_gpu_the_scorer_gives_what_the_cpu_gives(arch):
    device = load_scorer(
        models.saved(arch, "token"), kind="verl-critic", device="cuda", dtype=torch.float32
    )
    plain = load_scorer(models.saved(arch, "token"), kind="verl-critic")
    for seed in range(4):
        for mine, theirs in zip(decode(device, seed=seed), decode(plain, seed=seed), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-3)
    assert device._graphs.replays > 20
    device.cache.check()


@needs_gpu
@pytest.mark.gpu
def test_on_a_gpu_the_steady_state_launches_one_graph():
    """A replay has no host work of the model's: the profiler sees one graph launch a forward."""
    scorer = load_scorer(models.saved("llama", "token"), kind="verl-critic", device="cuda")
    decode(scorer, steps=30, rows=1)
    # Calls of the CUDA runtime are seen only beside what runs on the device.
    seen = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=seen) as profile:
        # Another seed: what the cache has is not forwarded.
        decode(scorer, steps=30, rows=1, seed=1)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts.get("cudaGraphLaunch", 0) > 15
    assert counts.get("aten::linear", 0) < 200
