"""`generate` with the trunk's own loop: what it honours, in stock order, and what it refuses."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    DynamicCache,
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    SynthIDTextWatermarkingConfig,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from guided_decode import GuidanceConfig, load_scorer
from guided_decode.forward.cache_argument import cache_argument
from guided_decode.integrations.transformers import GuidedDecoding, TrunkLookahead
from tests import models, trunk_heads
from tests.integrations.transformers.repetition import RepetitionPenalty
from tests.integrations.transformers.test_generate import StopAt, assert_guided, live_steps

ENDS = [models.EOS, 30, 60]
CONFIG = GuidanceConfig(beta=1.5, top_k=6)
PROMPTS = models.prompts([7, 3, 21, 12], seed=2)
WIDTH = max(map(len, PROMPTS))
BRUTE = trunk_heads.brute_force()


@pytest.fixture
def scorer():
    return trunk_heads.scorer()


@pytest.fixture
def policy():
    return trunk_heads.policy()


def generate(policy, scorer, config=CONFIG, prompts=PROMPTS, **options):
    options = {"eos_token_id": ENDS} | options
    return trunk_heads.generate(policy, prompts, scorer, config, **options)


@pytest.mark.parametrize("samples", [1, 3])
def test_sampling_several_sequences_of_a_padded_batch(policy, scorer, samples):
    torch.manual_seed(0)
    out = generate(policy, scorer, do_sample=True, top_k=0, num_return_sequences=samples)
    assert len(out.sequences) == samples * len(PROMPTS)
    assert_guided(out, PROMPTS, brute=BRUTE)


@pytest.mark.parametrize(
    "config", [CONFIG, GuidanceConfig(beta=1.5, top_k=6, tail="keep")], ids=["mask", "keep"]
)
@pytest.mark.parametrize(
    "options", [{"top_k": 0}, {"temperature": 0.8, "top_p": 0.9}], ids=["plain", "warped"]
)
def test_a_seed_samples_the_tokens_that_the_two_model_path_samples(policy, scorer, config, options):
    drawn = []
    for loop in (TrunkLookahead, GuidedDecoding):
        torch.manual_seed(5)
        drawn.append(generate(policy, scorer, config, loop=loop, do_sample=True, **options))
    assert torch.equal(drawn[0].sequences, drawn[1].sequences)


def test_a_gate_changes_when_a_row_is_chosen_and_not_what_is_drawn(policy, scorer):
    config = GuidanceConfig(beta=1.5, top_k=6, gate=0.25)
    drawn = []
    for loop in (TrunkLookahead, GuidedDecoding):
        torch.manual_seed(6)
        drawn.append(generate(policy, scorer, config, loop=loop, do_sample=True, temperature=0.7))
    assert torch.equal(drawn[0].sequences, drawn[1].sequences)
    assert scorer.stats.rows_gated > 0


def test_samples_follow_the_guided_distribution(policy, scorer):
    torch.manual_seed(0)
    config = GuidanceConfig(beta=1.5, top_k=3)
    out = generate(policy, scorer, config, PROMPTS[:1], do_sample=True, top_k=0, max_new_tokens=1,
                   num_return_sequences=2000)  # fmt: skip
    expected = torch.tensor(BRUTE.row(PROMPTS[0], out.logits[0][0], config, ENDS).logits).softmax(0)
    counts = torch.bincount(out.sequences[:, -1], minlength=models.VOCAB)
    drawn = expected > 0
    assert counts[~drawn].sum() == 0
    chi2 = ((counts[drawn] - 2000 * expected[drawn]).square() / (2000 * expected[drawn])).sum()
    assert chi2 < 13.8  # 0.999 of chi-squared with 2 degrees of freedom


def test_warpers_act_after_guidance_and_penalties_before(policy, scorer):
    torch.manual_seed(0)
    out = generate(policy, scorer, do_sample=True, temperature=0.6, top_k=3, repetition_penalty=1.7)
    assert_guided(
        out,
        PROMPTS,
        brute=BRUTE,
        before=[RepetitionPenalty(1.7)],
        after=[TemperatureLogitsWarper(0.6), TopKLogitsWarper(3)],
    )


def eager_to_end():
    policy = copy.deepcopy(trunk_heads.policy())
    bias = torch.zeros(models.VOCAB)
    bias[ENDS] = 4.0
    policy.lm_head.bias = torch.nn.Parameter(bias)
    return policy


@pytest.mark.parametrize("terminal", ["baseline", "critic", "reward"])
def test_several_ends_under_each_terminal_rule(terminal):
    policy, reward = eager_to_end(), models.tiny("llama", "sequence", seed=7)
    scorer = load_scorer(
        policy,
        kind="trunk-head",
        head=trunk_heads.linear(),
        terminal=terminal,
        reward=models.saved("llama", "sequence", seed=7) if terminal == "reward" else None,
    )
    brute = trunk_heads.brute_force(
        terminal=terminal, reward=trunk_heads.oracle.Values(reward) if reward else None
    )
    torch.manual_seed(0)
    out = generate(policy, scorer, do_sample=True, num_return_sequences=3)
    assert_guided(out, PROMPTS, brute=brute, after=[TopKLogitsWarper(50)])


def test_min_new_tokens_keeps_the_ends_out_of_the_candidates():
    policy = eager_to_end()
    scorer = load_scorer(policy, kind="trunk-head", head=trunk_heads.linear())
    out = generate(policy, scorer, min_new_tokens=4)
    minimum = MinNewTokensLengthLogitsProcessor(WIDTH, 4, ENDS, device="cpu")
    assert_guided(out, PROMPTS, brute=BRUTE, before=[minimum])
    assert not torch.isin(out.sequences[:, WIDTH : WIDTH + 4], torch.tensor(ENDS)).any()


def test_a_kl_term_against_a_reference(policy):
    reference = models.saved("mistral", "lm", seed=5)
    scorer = trunk_heads.scorer(reference=reference)
    config = GuidanceConfig(beta=1.5, top_k=6, kl_coef=0.3, gate=0.4)
    lm = trunk_heads.oracle.LogProbs(models.tiny("mistral", "lm", seed=5))
    out = generate(policy, scorer, config)
    assert_guided(out, PROMPTS, config, trunk_heads.brute_force(reference=lm))


def test_finished_rows_are_padded_and_never_forwarded(policy, scorer):
    free = generate(policy, scorer, eos_token_id=[models.EOS])
    ends = [models.EOS, int(free.sequences[1, WIDTH + 2])]  # row 1 ends at its third token
    scorer.cache.clear()
    scorer.stats.reset()
    out = generate(policy, scorer, eos_token_id=ends)
    live = list(live_steps(out, PROMPTS, ends))
    assert len(live) < len(PROMPTS) * len(out.scores), "no row finished early"
    assert scorer.stats.rows_scored == len(live)
    assert (out.sequences[1, WIDTH + 3 :] == models.PAD).all()


def test_a_stopping_criterion_finishes_a_row(policy, scorer):
    free = generate(policy, scorer)
    stop = int(free.sequences[1, WIDTH + 2])
    scorer.stats.reset()
    out = generate(policy, scorer, stopping_criteria=[StopAt(stop)])
    assert scorer.stats.rows_scored == len(list(live_steps(out, PROMPTS, [*ENDS, stop])))


def test_without_an_end_nothing_pads(policy, scorer):
    drawn = [
        generate(policy, scorer, loop=loop, eos_token_id=None, stopping_criteria=[StopAt(47)])
        for loop in (TrunkLookahead, GuidedDecoding)
    ]
    for ours, theirs in zip(*(out.sequences[:, WIDTH:].tolist() for out in drawn), strict=True):
        stop = ours.index(47) + 1 if 47 in ours else len(ours)
        assert ours[:stop] == theirs[:stop]


class Ban(LogitsProcessor):
    """Another processor of the caller's, and the batches that it saw."""

    def __init__(self):
        self.rows = []

    def __call__(self, input_ids, scores):
        self.rows.append(len(input_ids))
        return scores.index_fill(-1, torch.tensor([40, 41, 42]), -torch.inf)


def test_other_processors_of_the_caller_see_the_whole_batch_once_a_step(policy, scorer):
    config, ban = GuidanceConfig(beta=1.5, top_k=6, gate=0.3), Ban()
    out = generate(policy, scorer, config, logits_processor=[ban])
    assert ban.rows == [len(PROMPTS)] * len(out.scores)
    assert_guided(out, PROMPTS, config, BRUTE, before=[Ban()])


def test_a_prompt_without_a_mask_and_without_the_extras(policy, scorer):
    out = policy.generate(
        torch.tensor([PROMPTS[0]]),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=ENDS,
        custom_generate=TrunkLookahead(scorer, CONFIG),
    )
    wanted = generate(policy, scorer, prompts=PROMPTS[:1], max_new_tokens=6)
    assert torch.equal(out, wanted.sequences)


def test_tokens_are_streamed_as_they_come(policy, scorer):
    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    streamer = Collect()
    out = policy.generate(
        torch.tensor(PROMPTS[:1]),
        max_new_tokens=6,
        do_sample=False,
        custom_generate=TrunkLookahead(scorer, CONFIG, streamer=streamer),
    )
    assert streamer.tokens == [*out[0].tolist(), "end"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_policy_errs_no_more_than_torch_does(dtype):
    policy = copy.deepcopy(trunk_heads.policy()).to(dtype)
    scorer = load_scorer(policy, kind="trunk-head", head=trunk_heads.linear())
    out = generate(policy, scorer)
    logits = [trunk_heads.oracle.LogProbs(trunk_heads.policy()).logits(p) for p in PROMPTS]
    values = torch.tensor(BRUTE.values(PROMPTS))
    stock = [policy(torch.tensor([p]), output_hidden_states=True) for p in PROMPTS]
    head = trunk_heads.linear()
    their_logits = torch.stack([each.logits[0, -1].float() for each in stock])
    their_values = torch.cat([head(each.hidden_states[-1][0, -1].float()) for each in stock])
    for ours, theirs, truth in (
        (out.logits[0], their_logits, torch.stack(logits)),
        (out.prefix_values[:, 0], their_values, values),
    ):
        assert (ours - truth).norm() <= 1.5 * (theirs - truth).norm() + 1e-2 * truth.norm()


def test_inference_mode_may_come_and_go(policy, scorer):
    for inside in (True, False):
        with torch.inference_mode(inside):
            assert_guided(generate(policy, scorer), PROMPTS, brute=BRUTE)


# What a scorer can do wrong.


def broken(scorer, monkeypatch):
    """A scorer that answers NaN for each step's first candidate."""
    score = scorer.score

    def failing(prefixes, candidates):
        scores = score(prefixes, candidates)
        scores.values[0, 0] = torch.nan
        return scores

    monkeypatch.setattr(scorer, "score", failing)


def test_a_nan_never_reaches_the_sampler(policy, scorer, monkeypatch):
    broken(scorer, monkeypatch)
    with pytest.raises(ValueError, match="NaN"):
        generate(policy, scorer)


def test_a_row_that_cannot_be_scored_goes_on_unguided(policy, scorer, monkeypatch):
    broken(scorer, monkeypatch)
    out = generate(
        policy, scorer, prompts=PROMPTS[:1], eos_token_id=None,
        loop=lambda *given: TrunkLookahead(*given, on_error="passthrough"),
    )  # fmt: skip
    plain = policy.generate(
        torch.tensor(PROMPTS[:1]), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert torch.equal(out.sequences, plain)
    assert scorer.stats.passthroughs == 12


# What the loop refuses.


def filled_cache():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    return cache


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "generation mode 'beam_search' .* use GuidedDecoding"),
        ({"prompt_lookup_num_tokens": 2}, "generation mode 'assisted_generation'"),
        ({"output_attentions": True}, "output_attentions=True is not honoured.*honoured are"),
        ({"output_hidden_states": True}, "output_hidden_states=True is not honoured"),
        ({"cache_implementation": "static"}, "cache_implementation='static' is not honoured"),
        ({"cache": filled_cache()}, "(cache|past_key_values) came with the prompt"),
        ({"use_cache": False}, "use_cache=False was given"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size=4 .*max_forward_tokens"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5 .*GuidedDecoding"),
        ({"position_ids": torch.arange(1, 8)[None]}, "position_ids came that do not count"),
        (
            {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[1, 2], ngram_len=2)},
            "SynthIDTextWatermarkLogitsProcessor keeps a state",
        ),
    ],
)
def test_options_that_are_not_honoured(policy, scorer, options, message):
    if "cache" in options:
        options = {cache_argument(policy): options["cache"]}
    with pytest.raises(ValueError, match=message):
        generate(policy, scorer, prompts=PROMPTS[:1], max_new_tokens=2, **options)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.17"),
    reason="needs transformers 5.17, which marks the caller's cache",
)
def test_an_empty_cache_of_the_callers_would_stay_empty(policy, scorer):
    with pytest.raises(ValueError, match="came with the prompt"):
        generate(policy, scorer, prompts=PROMPTS[:1], **{cache_argument(policy): DynamicCache()})


def test_a_prompt_given_as_embeddings(policy, scorer):
    embeddings = policy.get_input_embeddings()(torch.tensor([PROMPTS[0]]))
    mask = torch.ones(1, len(PROMPTS[0]))
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="inputs_embeds"):
        policy.generate(
            inputs_embeds=embeddings,
            attention_mask=mask,
            max_new_tokens=2,
            custom_generate=TrunkLookahead(scorer, CONFIG),
        )


def test_another_policy_than_the_scorers(policy):
    scorer = load_scorer(
        models.saved("llama", "lm", seed=1), kind="trunk-head", head=trunk_heads.linear()
    )
    with pytest.raises(ValueError, match=r"is not the policy's own: .* load_scorer\(policy"):
        generate(policy, scorer)


def test_a_scorer_of_another_kind():
    critic = load_scorer(models.tiny("llama", "token"), kind="verl-critic")
    with pytest.raises(ValueError, match="a CriticScorer was given: .* use GuidedDecoding"):
        TrunkLookahead(critic, CONFIG)


def test_a_scorer_that_does_not_see_the_policys_bos():
    with pytest.raises(ValueError, match='drops a leading BOS .bos="drop".*bos="policy"'):
        TrunkLookahead(trunk_heads.scorer(bos="drop"), CONFIG)


def test_a_policy_whose_logits_are_computed_in_another_way():
    class ScaledForCausalLM(type(trunk_heads.policy())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    policy = copy.deepcopy(trunk_heads.policy())
    policy.__class__ = ScaledForCausalLM
    scorer = load_scorer(policy, kind="trunk-head", head=trunk_heads.linear())
    with pytest.raises(
        ValueError, match=r"ScaledForCausalLM computes its logits in a way .* differ by 0\.5"
    ):
        generate(policy, scorer)
