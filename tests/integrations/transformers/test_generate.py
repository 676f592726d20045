"""`generate` with guidance: each step's scores equal brute force, in every decoding mode."""

import copy

import pytest
import torch
from transformers import (
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from guided_decode import GuidanceConfig, PrefixHandle, load_scorer
from guided_decode.integrations.transformers import GuidedDecoding, ValueGuidedLogitsProcessor
from tests import models, oracle
from tests.integrations.transformers.repetition import RepetitionPenalty

ENDS = [models.EOS, 30, 60]
CONFIG = GuidanceConfig(beta=1.5, top_k=6)
BRUTE = oracle.Oracle(oracle.Values(models.tiny("llama", "token")))
PROMPTS = models.prompts([7, 3, 21, 12], seed=2)
ROUTES = ["custom_generate", "logits_processor"]


@pytest.fixture
def scorer():
    return load_scorer(models.tiny("llama", "token"), kind="verl-critic")


@pytest.fixture
def policy():
    return models.tiny("llama", "lm", seed=1)


def left_padded(prompts, pad=models.PAD):
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def generate(
    policy, prompts, scorer, config=CONFIG, route="custom_generate", pad=models.PAD, **options
):
    """Guided `generate` by one of its two routes, with everything it can report."""
    ids, mask = left_padded(prompts, pad)
    options = {"eos_token_id": ENDS, "max_new_tokens": 12, "do_sample": False} | options
    if route == "custom_generate":
        options["custom_generate"] = GuidedDecoding(scorer, config)
    else:
        processor = ValueGuidedLogitsProcessor(
            scorer,
            config,
            pad_token_id=pad,
            eos_token_id=options["eos_token_id"],
            attention_mask=mask,
            num_beams=options.get("num_beams", 1),
        )
        options["logits_processor"] = [processor, *options.get("logits_processor", [])]
    return policy.generate(
        ids,
        attention_mask=mask,
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **options,
    )


def live_steps(out, prompts, ends):
    """(step, row, prefix) of each row that is not finished, in a run without beams."""
    samples = len(out.sequences) // len(prompts)
    width = max(map(len, prompts))
    for row, sequence in enumerate(out.sequences[:, width:].tolist()):
        prompt = prompts[row // samples]
        for step in range(len(out.scores)):
            if step and sequence[step - 1] in ends:
                break
            yield step, row, [*prompt, *sequence[:step]]


def assert_guided(
    out, prompts, config=CONFIG, brute=BRUTE, ends=ENDS, before=(), after=(), atol=1e-4
):
    """Each live row's scores are brute force on what the processors before it handed over."""
    width = max(map(len, prompts))
    checked = 0
    for step, row, prefix in live_steps(out, prompts, ends):
        padded = out.sequences[row : row + 1, : width + step]
        logits = out.logits[step][row : row + 1].float()
        for processor in before:
            logits = processor(padded, logits.clone())
        expected = brute.row(prefix, logits[0], config, ends)
        if after:
            guided = torch.tensor([expected.logits])
            for warper in after:
                guided = warper(padded, guided)
            expected.logits = guided[0].tolist()
        oracle.assert_row_equal(out.scores[step][row], expected, atol)
        checked += 1
    assert checked >= len(out.sequences)


def record_prefixes(scorer, monkeypatch):
    """The prefixes that the scorer is asked for, as they come."""
    asked, score = [], scorer.score

    def recording(prefixes, candidates):
        asked.extend(
            [int(t) for t in (p.tokens if isinstance(p, PrefixHandle) else p)] for p in prefixes
        )
        return score(prefixes, candidates)

    monkeypatch.setattr(scorer, "score", recording)
    return asked


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        GuidanceConfig(beta=2.0, top_k=6, top_p=0.8, tail="keep", baseline="mean"),
        GuidanceConfig(rule="prune", margin=0.7, top_k=6),
        GuidanceConfig(rule="prune", margin=0.7, top_k=6, tail="keep", gate=0.3),
        GuidanceConfig(beta=-1.0, top_k=4, gate=0.25),
    ],
    ids=["reweight", "mean-keep-top-p", "prune", "prune-keep-gate", "negative-gate"],
)
def test_greedy_with_prompts_of_different_lengths(policy, scorer, route, config):
    out = generate(policy, PROMPTS, scorer, config, route)
    assert_guided(out, PROMPTS, config)
    width = max(map(len, PROMPTS))
    for step, row, _ in live_steps(out, PROMPTS, ENDS):
        assert out.sequences[row, width + step] == out.scores[step][row].argmax()


@pytest.mark.parametrize("arch", ["mistral-sliding", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"])
def test_policies_of_every_architecture(arch, scorer):
    out = generate(models.tiny(arch, "lm", seed=1), PROMPTS, scorer)
    assert_guided(out, PROMPTS)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("samples", [1, 3])
def test_sampling(policy, scorer, route, samples):
    torch.manual_seed(0)
    out = generate(
        policy, PROMPTS, scorer, route=route, do_sample=True, top_k=0, num_return_sequences=samples
    )
    assert len(out.sequences) == samples * len(PROMPTS)
    assert_guided(out, PROMPTS)


@pytest.mark.parametrize("route", ROUTES)
def test_temperature_and_truncation_act_after_guidance(policy, scorer, route):
    torch.manual_seed(0)
    out = generate(policy, PROMPTS, scorer, route=route, do_sample=True, temperature=0.6, top_k=3)
    assert_guided(out, PROMPTS, after=[TemperatureLogitsWarper(0.6), TopKLogitsWarper(3)])


@pytest.mark.parametrize("route", ROUTES)
def test_both_routes_sample_the_same_tokens(policy, scorer, route):
    expected = []
    for each in ("custom_generate", route):
        torch.manual_seed(5)
        expected.append(
            generate(
                policy, PROMPTS, scorer, route=each, do_sample=True, temperature=0.9, top_p=0.9
            )
        )
    assert torch.equal(expected[0].sequences, expected[1].sequences)


@pytest.mark.parametrize("route", ROUTES)
def test_a_repetition_penalty_acts_before_guidance(policy, scorer, route):
    out = generate(policy, PROMPTS, scorer, route=route, repetition_penalty=1.7)
    assert_guided(out, PROMPTS, before=[RepetitionPenalty(1.7)])


@pytest.mark.parametrize("route", ROUTES)
def test_min_new_tokens_keeps_the_ends_out_of_the_candidates(scorer, route):
    policy = eager_to_end()
    out = generate(policy, PROMPTS, scorer, route=route, min_new_tokens=4)
    width = max(map(len, PROMPTS))
    minimum = MinNewTokensLengthLogitsProcessor(width, 4, ENDS, device="cpu")
    assert_guided(out, PROMPTS, before=[minimum])
    assert not torch.isin(out.sequences[:, width : width + 4], torch.tensor(ENDS)).any()


class Ban(LogitsProcessor):
    """Another processor of the caller's."""

    def __call__(self, input_ids, scores):
        return scores.index_fill(-1, torch.tensor([40, 41, 42]), -torch.inf)


def test_other_processors_of_the_caller(policy, scorer):
    out = generate(policy, PROMPTS, scorer, logits_processor=[Ban()])
    assert_guided(out, PROMPTS, before=[Ban()])


def eager_to_end():
    """A policy for which each of the ends is always among the best tokens."""
    policy = copy.deepcopy(models.tiny("llama", "lm", seed=1))
    bias = torch.zeros(models.VOCAB)
    bias[ENDS] = 4.0
    policy.lm_head.bias = torch.nn.Parameter(bias)
    return policy


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("terminal", ["baseline", "critic", "reward"])
def test_several_ends_under_each_terminal_rule(route, terminal):
    reward = models.tiny("llama", "sequence", seed=7)
    scorer = load_scorer(
        models.saved("llama", "token"),
        kind="verl-critic",
        terminal=terminal,
        reward=models.saved("llama", "sequence", seed=7) if terminal == "reward" else None,
    )
    brute = oracle.Oracle(BRUTE.values, terminal=terminal, reward=oracle.Values(reward))
    torch.manual_seed(0)
    out = generate(
        eager_to_end(), PROMPTS, scorer, route=route, do_sample=True, num_return_sequences=3
    )
    assert_guided(out, PROMPTS, brute=brute, after=[TopKLogitsWarper(50)])


@pytest.mark.parametrize("route", ROUTES)
def test_a_kl_term_and_an_implicit_reward(policy, route):
    reference = models.saved("mistral", "lm", seed=5)
    scorer = load_scorer(models.saved("llama", "token"), kind="verl-critic", reference=reference)
    config = GuidanceConfig(beta=1.5, top_k=6, kl_coef=0.3)
    brute = oracle.Oracle(
        BRUTE.values, reference=oracle.LogProbs(models.tiny("mistral", "lm", seed=5))
    )
    assert_guided(generate(policy, PROMPTS, scorer, config, route), PROMPTS, config, brute)

    scorer = load_scorer(
        models.saved("mistral", "lm", seed=6), kind="implicit", reference=reference
    )
    config = GuidanceConfig(beta=1.0, top_k=None)
    pair = (models.tiny("mistral", "lm", seed=6), models.tiny("mistral", "lm", seed=5))
    brute = oracle.Oracle(implicit=tuple(map(oracle.LogProbs, pair)))
    assert_guided(generate(policy, PROMPTS, scorer, config, route), PROMPTS, config, brute)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("route", ROUTES)
def test_a_half_precision_policy(scorer, dtype, route):
    policy = copy.deepcopy(models.tiny("llama", "lm", seed=1)).to(dtype)
    out = generate(policy, PROMPTS, scorer, route=route)
    assert_guided(out, PROMPTS)


def test_without_a_cache_of_the_policys_own(policy, scorer):
    assert_guided(generate(policy, PROMPTS, scorer, use_cache=False), PROMPTS)


# Which tokens are a row's prefix, and when it is finished.


@pytest.mark.parametrize("route", ROUTES)
def test_the_scorer_sees_prefixes_without_padding(policy, scorer, route, monkeypatch):
    asked = record_prefixes(scorer, monkeypatch)
    out = generate(policy, PROMPTS, scorer, route=route)
    expected = sorted(prefix for _, _, prefix in live_steps(out, PROMPTS, ENDS))
    assert sorted(asked) == expected


@pytest.mark.parametrize("route", ROUTES)
def test_an_end_inside_a_prompt_does_not_finish_the_row(policy, scorer, route):
    prompts = [[5, 6, models.EOS, 7, 30, 8], [9, models.EOS], [60, 5, 6]]
    out = generate(policy, prompts, scorer, route=route, min_new_tokens=3)
    minimum = MinNewTokensLengthLogitsProcessor(6, 3, ENDS, device="cpu")
    assert_guided(out, prompts, before=[minimum])
    assert (out.sequences.shape[1] - 6) >= 3


@pytest.mark.parametrize("route", ROUTES)
def test_finished_rows_are_never_scored(policy, scorer, route, monkeypatch):
    width = max(map(len, PROMPTS))
    free = generate(policy, PROMPTS, scorer, route=route, eos_token_id=[models.EOS])
    ends = [models.EOS, int(free.sequences[1, width + 2])]  # row 1 ends at its third token
    scorer.stats.reset()
    asked = record_prefixes(scorer, monkeypatch)
    out = generate(policy, PROMPTS, scorer, route=route, eos_token_id=ends)
    live = [prefix for _, _, prefix in live_steps(out, PROMPTS, ends)]
    assert len(live) < len(PROMPTS) * len(out.scores), "no row finished early"
    assert sorted(asked) == sorted(live)
    assert scorer.stats.rows_scored == len(live)


class StopAt(StoppingCriteria):
    """Ends a row at a token that `generate` does not know as an end, as stop strings do."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def test_rows_that_a_stopping_criterion_finished_are_never_scored(policy, scorer, monkeypatch):
    width = max(map(len, PROMPTS))
    free = generate(policy, PROMPTS, scorer)
    stop = int(free.sequences[1, width + 2])  # row 1 stops at its third token
    asked = record_prefixes(scorer, monkeypatch)
    out = generate(policy, PROMPTS, scorer, stopping_criteria=[StopAt(stop)])
    live = [prefix for _, _, prefix in live_steps(out, PROMPTS, [*ENDS, stop])]
    assert sorted(asked) == sorted(live)


@pytest.mark.parametrize("route", ROUTES)
def test_a_pad_that_is_also_an_end(policy, scorer, route):
    prompts = [[models.EOS, 5, 6, models.EOS], [7, 8], PROMPTS[2]]
    out = generate(policy, prompts, scorer, route=route, pad=models.EOS)
    assert_guided(out, prompts)


@pytest.mark.parametrize("route", ROUTES)
def test_a_pad_that_is_also_bos_is_told_apart_by_the_mask(policy, scorer, route):
    prompts = models.prompts([7, 3, 21], bos=True)
    out = generate(policy, prompts, scorer, route=route, pad=models.BOS)
    assert_guided(out, prompts)


def test_a_pad_that_is_also_bos_is_refused_without_a_mask(policy, scorer):
    ids, mask = left_padded(models.prompts([7, 3], bos=True), pad=models.BOS)
    processor = ValueGuidedLogitsProcessor(
        scorer, CONFIG, pad_token_id=models.BOS, eos_token_id=ENDS
    )
    with pytest.raises(ValueError, match="attention_mask"):
        policy.generate(
            ids,
            attention_mask=mask,
            pad_token_id=models.BOS,
            max_new_tokens=2,
            logits_processor=[processor],
        )


def test_the_bare_processor_strips_pads_without_a_mask(policy, scorer):
    ids, mask = left_padded(PROMPTS)
    processor = ValueGuidedLogitsProcessor(
        scorer, CONFIG, pad_token_id=models.PAD, eos_token_id=ENDS
    )
    out = policy.generate(
        ids,
        attention_mask=mask,
        pad_token_id=models.PAD,
        eos_token_id=ENDS,
        max_new_tokens=8,
        do_sample=False,
        logits_processor=[processor],
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert_guided(out, PROMPTS)


@pytest.mark.parametrize(
    ("known", "missing"),
    [({"eos_token_id": ENDS}, "pad_token_id"), ({"pad_token_id": models.PAD}, "eos_token_id")],
)
def test_the_bare_processor_refuses_a_batch_that_it_cannot_tell_apart(
    policy, scorer, known, missing
):
    ids, mask = left_padded(PROMPTS)
    processor = ValueGuidedLogitsProcessor(scorer, CONFIG, **known)
    with pytest.raises(ValueError, match=missing):
        policy.generate(
            ids,
            attention_mask=mask,
            pad_token_id=models.PAD,
            max_new_tokens=2,
            logits_processor=[processor],
        )


def test_the_bare_processor_needs_nothing_for_a_single_row(policy, scorer):
    prompt = PROMPTS[0]
    out = policy.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        eos_token_id=None,
        max_new_tokens=8,
        do_sample=False,
        logits_processor=[ValueGuidedLogitsProcessor(scorer, CONFIG)],
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert_guided(out, [prompt], ends=[])


def test_one_processor_may_serve_one_generate_call_after_another(policy, scorer):
    processor = ValueGuidedLogitsProcessor(
        scorer, CONFIG, pad_token_id=models.PAD, eos_token_id=ENDS
    )

    def turn(prompts):
        ids, mask = left_padded(prompts)
        out = policy.generate(
            ids,
            attention_mask=mask,
            pad_token_id=models.PAD,
            eos_token_id=ENDS,
            max_new_tokens=6,
            do_sample=False,
            logits_processor=[processor],
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        )
        assert_guided(out, prompts)
        return out.sequences[:, ids.shape[1] :].tolist()

    first = turn(PROMPTS)
    assert any(set(answer) & set(ENDS) for answer in first)
    turn(PROMPTS[:2])
    # A second turn: the conversation so far, whatever ended it, and a new message.
    turn([[*prompt, *answer, 30, 9, 9] for prompt, answer in zip(PROMPTS, first, strict=True)])
    turn(PROMPTS)


def test_going_on_after_an_end_with_the_same_processor_is_a_new_generation(policy, scorer):
    processor = ValueGuidedLogitsProcessor(scorer, CONFIG, eos_token_id=ENDS)
    prompt = PROMPTS[1]
    for _ in range(3):  # each answer, with what ended it, is the next prompt
        out = policy.generate(
            torch.tensor([prompt]),
            eos_token_id=ENDS,
            max_new_tokens=40,
            do_sample=False,
            logits_processor=[processor],
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        )
        assert_guided(out, [prompt])
        prompt = out.sequences[0].tolist()
        assert prompt[-1] in ENDS


def test_another_prompt_of_just_the_next_length_is_a_new_generation(policy, scorer):
    processor = ValueGuidedLogitsProcessor(scorer, CONFIG)
    first = PROMPTS[0]
    # Begins as the first prompt, and is one token longer than what the processor saw last.
    second = first + models.prompts([6], seed=9)[0]
    for prompt in (first, second):
        out = policy.generate(
            torch.tensor([prompt]),
            eos_token_id=None,
            max_new_tokens=6,
            do_sample=False,
            logits_processor=[processor],
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        )
        assert_guided(out, [prompt], ends=[])


def test_one_decoding_may_serve_one_generate_call_after_another(policy, scorer):
    guided = GuidedDecoding(scorer, CONFIG)
    for prompts in (PROMPTS, PROMPTS[1:2], PROMPTS[::-1]):
        ids, mask = left_padded(prompts)
        out = policy.generate(
            ids,
            attention_mask=mask,
            pad_token_id=models.PAD,
            eos_token_id=ENDS,
            max_new_tokens=6,
            do_sample=False,
            custom_generate=guided,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        )
        assert_guided(out, prompts)


def test_inference_mode_may_come_and_go(policy, scorer):
    for inside in (True, False):
        with torch.inference_mode(inside):
            assert_guided(generate(policy, PROMPTS, scorer), PROMPTS)


def test_a_prompt_without_a_mask(policy, scorer):
    out = policy.generate(
        torch.tensor([PROMPTS[0]]),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=ENDS,
        custom_generate=GuidedDecoding(scorer, CONFIG),
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert_guided(out, PROMPTS[:1])


def test_a_prompt_given_as_embeddings_is_refused(policy, scorer):
    embeddings = policy.get_input_embeddings()(torch.tensor([PROMPTS[0]]))
    with pytest.raises(ValueError, match=r"inputs_embeds|empty"):
        policy.generate(
            inputs_embeds=embeddings,
            max_new_tokens=2,
            custom_generate=GuidedDecoding(scorer, CONFIG),
        )


def test_tokens_are_streamed_as_they_come(policy, scorer):
    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    streamer = Collect()
    # `generate` hands its own streamer to no custom loop.
    out = policy.generate(
        torch.tensor(PROMPTS[:1]),
        max_new_tokens=6,
        do_sample=False,
        custom_generate=GuidedDecoding(scorer, CONFIG, streamer=streamer),
    )
    assert streamer.tokens == [*out[0].tolist(), "end"]


# Nothing that is not asked for.


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "mode",
    [{}, {"do_sample": True, "temperature": 0.8}, {"num_beams": 3, "num_return_sequences": 2}],
)
def test_beta_zero_with_the_tail_kept_gives_the_bits_of_plain_generate(
    policy, scorer, route, mode, monkeypatch
):
    asked = record_prefixes(scorer, monkeypatch)
    scorer.stats.reset()
    torch.manual_seed(3)
    guided = generate(policy, PROMPTS, scorer, GuidanceConfig(beta=0.0, tail="keep"), route, **mode)
    ids, mask = left_padded(PROMPTS)
    torch.manual_seed(3)
    plain = policy.generate(
        ids,
        attention_mask=mask,
        pad_token_id=models.PAD,
        return_dict_in_generate=True,
        output_scores=True,
        **({"eos_token_id": ENDS, "max_new_tokens": 12, "do_sample": False} | mode),
    )
    assert torch.equal(guided.sequences, plain.sequences)
    assert len(guided.scores) == len(plain.scores)
    for ours, theirs in zip(guided.scores, plain.scores, strict=True):
        assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
    assert asked == []
    assert (scorer.stats.forwards, scorer.stats.rows_scored) == (0, 0)


def test_a_steady_generate_forwards_candidates_alone(policy, scorer):
    scorer.stats.reset()
    out = generate(policy, PROMPTS, scorer)
    live = list(live_steps(out, PROMPTS, ENDS))
    brute = [
        BRUTE.row(prefix, out.logits[step][row], CONFIG, ENDS).candidates
        for step, row, prefix in live
    ]
    assert scorer.stats.prefix_tokens == sum(map(len, PROMPTS))
    assert scorer.stats.candidate_tokens == sum(
        token not in ENDS for chosen in brute for token in chosen
    )
    assert scorer.stats.forwards == len(out.scores)


def test_samples_of_one_prompt_share_its_forward(policy, scorer):
    scorer.stats.reset()
    torch.manual_seed(0)
    generate(policy, PROMPTS[2:3], scorer, do_sample=True, num_return_sequences=8, max_new_tokens=1)
    assert scorer.stats.prefix_tokens == len(PROMPTS[2])
    assert scorer.stats.candidate_tokens <= CONFIG.top_k


# What a scorer can do wrong.


@pytest.mark.parametrize("route", ROUTES)
def test_a_nan_from_the_scorer_never_reaches_the_sampler(policy, scorer, route, monkeypatch):
    score = scorer.score

    def broken(prefixes, candidates):
        scores = score(prefixes, candidates)
        scores.values[0, 0] = torch.nan
        return scores

    monkeypatch.setattr(scorer, "score", broken)
    with pytest.raises(ValueError, match="NaN"):
        generate(policy, PROMPTS, scorer, route=route)


def test_a_policy_with_more_tokens_than_the_critic_is_refused_where_it_chooses_one(scorer):
    policy = models.tiny("llama", "lm", seed=1, vocab_size=131)
    with pytest.raises(ValueError, match=f"vocabulary.*{models.VOCAB}"):
        generate(policy, PROMPTS, scorer, GuidanceConfig(top_k=100))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_policy_and_critic_on_different_devices(scorer):
    policy = copy.deepcopy(models.tiny("llama", "lm", seed=1)).to("cuda")
    ids, mask = (tensor.to("cuda") for tensor in left_padded(PROMPTS))
    out = policy.generate(
        ids,
        attention_mask=mask,
        pad_token_id=models.PAD,
        eos_token_id=ENDS,
        max_new_tokens=6,
        do_sample=False,
        custom_generate=GuidedDecoding(scorer, CONFIG),
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert_guided(out, PROMPTS)
