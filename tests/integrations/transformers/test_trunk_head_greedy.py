"""The k-wide loop is the brute-force loop, token for token, for one policy forward a token."""

import copy

import pytest
import torch

from guided_decode import GuidanceConfig, load_scorer
from guided_decode.forward.packed_model import PackedModel
from guided_decode.integrations.transformers import GuidedDecoding, TrunkLookahead
from guided_decode.scoring.trunk_scorer import TrunkScorer
from tests import models, oracle, trunk_heads

NEW = 20
ENDS = [models.EOS, 30, 60]
CONFIG = GuidanceConfig(beta=1.0, top_k=6)
PROMPTS = models.prompts([3, 30, 17, 75], seed=22)
WIDTH = max(map(len, PROMPTS))
# The longest row, its candidates, and next to nothing.
TIGHT = WIDTH + NEW + CONFIG.top_k + 2


def expected(arch, config, head=None, prompts=PROMPTS):
    brute = trunk_heads.brute_force(arch, head)
    lm = oracle.LogProbs(trunk_heads.policy(arch))
    return [brute.greedy(lm, prompt, config, ENDS, NEW) for prompt in prompts]


def decode(arch, scorer, config, prompts=PROMPTS, **options):
    options = {"eos_token_id": ENDS, "max_new_tokens": NEW} | options
    out = trunk_heads.generate(trunk_heads.policy(arch), prompts, scorer, config, **options)
    return out, trunk_heads.responses(out, max(map(len, prompts)), ENDS)


@pytest.mark.parametrize("arch", ["llama", "mistral-sliding", "qwen2", "gemma2"])
def test_every_architecture_equals_brute_force(arch):
    scorer = trunk_heads.scorer(arch)
    _, tokens = decode(arch, scorer, CONFIG)
    oracle.assert_greedy_equal(tokens, expected(arch, CONFIG))
    assert scorer.stats.evictions == 0


@pytest.mark.parametrize(
    "config",
    [
        GuidanceConfig(rule="prune", margin=0.5, top_k=6, top_p=0.9),
        GuidanceConfig(beta=1.5, top_k=6, top_p=0.8, tail="keep", baseline="mean"),
        GuidanceConfig(beta=1.5, top_k=4, gate=0.3),
        GuidanceConfig(beta=0.0, tail="keep"),
    ],
    ids=["prune", "mean-keep-top-p", "gate", "unguided"],
)
def test_every_rule_equals_brute_force(config):
    scorer = trunk_heads.scorer()
    _, tokens = decode("llama", scorer, config)
    oracle.assert_greedy_equal(tokens, expected("llama", config))
    assert (scorer.stats.rows_gated > 0) == (config.gate is not None)
    assert (scorer.stats.rows_scored > 0) == config.needs_scores


def test_a_head_of_two_layers_equals_brute_force():
    head = trunk_heads.two_layers()
    _, tokens = decode("llama", trunk_heads.scorer(head=head), CONFIG)
    oracle.assert_greedy_equal(tokens, expected("llama", CONFIG, head))
    assert tokens != decode("llama", trunk_heads.scorer(), CONFIG)[1]


@pytest.mark.parametrize(
    "options", [{"cache_tokens": TIGHT}, {"max_forward_tokens": 5}], ids=["tight", "chunks"]
)
def test_memory_and_chunks_change_what_it_costs_and_nothing_else(options):
    scorer = trunk_heads.scorer(**options)
    _, tokens = decode("llama", scorer, CONFIG)
    oracle.assert_greedy_equal(tokens, expected("llama", CONFIG))
    assert (scorer.stats.evictions > 0) == ("cache_tokens" in options)
    assert scorer.stats.forwards > NEW + 1
    scorer.cache.check()
    assert scorer.cache.pinned == 0


def test_a_row_that_cannot_fit_is_refused_with_the_size_that_it_needs():
    scorer = trunk_heads.scorer(cache_tokens=40)
    with pytest.raises(ValueError, match="cache_tokens must be at least 75"):
        decode("llama", scorer, CONFIG)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_the_two_model_path_with_the_same_head_says_the_same(arch):
    config = GuidanceConfig(beta=1.5, top_k=6)
    loop, tokens = decode(arch, trunk_heads.scorer(arch), config)
    both, wanted = decode(arch, trunk_heads.scorer(arch), config, loop=GuidedDecoding)
    assert tokens == wanted
    for step, (ours, theirs) in enumerate(zip(loop.scores, both.scores, strict=True)):
        live = [i for i, row in enumerate(tokens) if len(row) > step]
        torch.testing.assert_close(ours[live], theirs[live], rtol=0, atol=1e-4)


def test_the_output_has_the_value_of_every_prefix():
    scorer = trunk_heads.scorer()
    out, tokens = decode("llama", scorer, CONFIG)
    values = trunk_heads.brute_force().values
    for prompt, row, found in zip(PROMPTS, tokens, out.prefix_values, strict=True):
        prefixes = [[*prompt, *row[:n]] for n in range(len(row))]
        wanted = torch.tensor(values(prefixes))
        torch.testing.assert_close(found[: len(row)], wanted, rtol=0, atol=1e-4)
        assert found[len(row) :].isnan().all()


# The device's path: fused attention, and padded batches that graphs are captured of.


def scorer_like_a_gpus(arch):
    """The policy's trunk with a head, on the fused attention, in forwards padded to buckets."""
    plain = trunk_heads.scorer(arch)
    packed = PackedModel(plain.model.model, "the test's", fused=True)
    return TrunkScorer(packed, plain.trunk_head, eos_token_id=models.EOS, graphs=True)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_padded_batches_give_what_plain_ones_give(arch):
    scorer = scorer_like_a_gpus(arch)
    # What was captured before hidden states are kept does not keep them.
    scorer.score([PROMPTS[0]], torch.tensor([[7, 8]]))
    assert scorer._graphs.replays == 1
    _, tokens = decode(arch, scorer, CONFIG)
    oracle.assert_greedy_equal(tokens, expected(arch, CONFIG))
    assert scorer._graphs.replays >= max(map(len, tokens))
    scorer.cache.check()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("arch", ["llama", "mistral-sliding", "gemma2"])
def test_on_a_gpu_the_loop_is_the_brute_force_loop(arch):
    policy = copy.deepcopy(trunk_heads.policy(arch)).to("cuda")
    scorer = load_scorer(policy, kind="trunk-head", head=trunk_heads.linear())
    ids, mask = (tensor.to("cuda") for tensor in trunk_heads.padded(PROMPTS))
    out = policy.generate(
        ids,
        attention_mask=mask,
        pad_token_id=models.PAD,
        eos_token_id=ENDS,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        custom_generate=TrunkLookahead(scorer, CONFIG),
    )
    oracle.assert_greedy_equal(trunk_heads.responses(out, WIDTH, ENDS), expected(arch, CONFIG))
    assert scorer._graphs.replays > 0
    scorer.cache.check()


# What it costs.


def live_candidates(out, tokens, config, prompts=PROMPTS):
    """Candidates of every row and step that are not terminal, by brute force."""
    count = 0
    for i, row in enumerate(tokens):
        for step in range(len(row)):
            chosen = oracle.candidates(out.logits[step][i].tolist(), config.top_k, config.top_p)
            count += sum(token not in ENDS for token in chosen)
    return count


def cold_run(config, **options):
    """A run with an empty cache, after one in which the policy's lm_head was checked."""
    scorer = trunk_heads.scorer()
    loop = TrunkLookahead(scorer, config)
    decode("llama", scorer, config, loop=lambda *_: loop)
    scorer.cache.clear()
    scorer.stats.reset()
    stock = []
    hook = trunk_heads.policy().register_forward_hook(lambda *_: stock.append(1))
    out, tokens = decode("llama", scorer, config, loop=lambda *_: loop, **options)
    hook.remove()
    assert stock == [], "the policy ran beside its slot pool"
    return scorer, out, tokens


@pytest.mark.parametrize("config", [CONFIG, GuidanceConfig(beta=1.0, top_k=6, top_p=0.7)])
def test_one_forward_a_token_k_rows_wide(config):
    scorer, out, tokens = cold_run(config)
    assert scorer.stats.forwards == 1 + len(out.scores)
    assert scorer.stats.prefix_tokens == sum(map(len, PROMPTS))
    assert scorer.stats.candidate_tokens == live_candidates(out, tokens, config)
    assert scorer.stats.rows_scored == sum(map(len, tokens))
    assert scorer.stats.evictions == 0


def test_the_two_model_path_takes_as_many_forwards_of_its_own():
    config = GuidanceConfig(beta=1.5, top_k=6)
    loop, *_ = cold_run(config)
    scorer, stock = trunk_heads.scorer(), []
    hook = trunk_heads.policy().register_forward_hook(lambda *_: stock.append(1))
    out, _ = decode("llama", scorer, config, loop=GuidedDecoding)
    hook.remove()
    assert len(stock) == len(out.scores) == scorer.stats.forwards
    assert loop.stats.forwards == 1 + scorer.stats.forwards


def test_a_gated_row_forwards_its_chosen_token_alone_beside_the_others_candidates():
    config = GuidanceConfig(beta=1.5, top_k=6, gate=0.3)
    scorer, out, tokens = cold_run(config)
    gated = 0
    for i, row in enumerate(tokens):
        for step in range(len(row)):
            gated += out.logits[step][i].softmax(-1).max().item() >= 0.3
    assert scorer.stats.rows_gated == gated > 0
    assert scorer.stats.rows_scored == sum(map(len, tokens)) - gated
    assert scorer.stats.forwards == 1 + len(out.scores)


def test_the_losers_slots_are_free_at_once():
    scorer = trunk_heads.scorer()
    slots = []
    read = scorer.read

    def watching(prefixes):
        readings = read(prefixes)
        slots.append((scorer.cache.cached_tokens, sum(map(len, prefixes))))
        return readings

    scorer.read = watching
    decode("llama", scorer, CONFIG, prompts=PROMPTS[:2], eos_token_id=[])
    assert slots
    assert all(cached == prefixes for cached, prefixes in slots)
    assert scorer.cache.cached_tokens == slots[-1][0]


def test_samples_of_one_prompt_share_its_forward():
    scorer = trunk_heads.scorer()
    torch.manual_seed(0)
    decode("llama", scorer, CONFIG, prompts=PROMPTS[1:2], do_sample=True, num_return_sequences=8)
    assert scorer.stats.prefix_tokens == len(PROMPTS[1])


def test_a_prompt_that_comes_again_is_not_forwarded_again():
    scorer = trunk_heads.scorer()
    _, first = decode("llama", scorer, CONFIG)
    before = scorer.stats.prefix_tokens
    _, second = decode("llama", scorer, CONFIG)
    assert first == second
    assert scorer.stats.prefix_tokens == before
