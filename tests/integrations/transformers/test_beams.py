"""Beam search: scores telescope, prune leaves enough candidates, a gate is refused."""

import pytest
import torch

from guided_decode import GuidanceConfig, load_scorer
from guided_decode.integrations.transformers import ValueGuidedLogitsProcessor
from tests import models, oracle
from tests.integrations.transformers.test_generate import (
    ENDS,
    PROMPTS,
    ROUTES,
    eager_to_end,
    generate,
)

POLICIES = {"plain": lambda: models.tiny("llama", "lm", seed=1), "eager to end": eager_to_end}


def scorer_and_oracle(terminal, arch="llama"):
    reward = {"reward": models.saved("llama", "sequence", seed=7)} if terminal == "reward" else {}
    scorer = load_scorer(
        models.saved(arch, "token"), kind="verl-critic", terminal=terminal, **reward
    )
    brute = oracle.Oracle(
        oracle.Values(models.tiny(arch, "token")),
        terminal=terminal,
        reward=oracle.Values(models.tiny("llama", "sequence", seed=7)),
    )
    return scorer, brute


def responses(out, prompts, ends):
    """Each returned beam's prompt and response, up to its end."""
    width, beams = max(map(len, prompts)), len(out.sequences) // len(prompts)
    for row, sequence in enumerate(out.sequences[:, width:].tolist()):
        stop = next((n + 1 for n, token in enumerate(sequence) if token in ends), len(sequence))
        yield prompts[row // beams], sequence[:stop]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("terminal", ["baseline", "critic", "reward"])
@pytest.mark.parametrize("policy", list(POLICIES))
def test_a_beams_score_is_its_log_probability_and_what_it_gained(route, terminal, policy):
    scorer, brute = scorer_and_oracle(terminal)
    model = POLICIES[policy]()
    config = GuidanceConfig(beta=0.8, top_k=8)
    out = generate(
        model,
        PROMPTS,
        scorer,
        config,
        route,
        num_beams=4,
        num_return_sequences=4,
        length_penalty=0.0,
    )
    lm = oracle.LogProbs(model)
    ended = 0
    for score, (prompt, response) in zip(
        out.sequences_scores.tolist(), responses(out, PROMPTS, ENDS), strict=True
    ):
        expected = brute.beam_score(lm, prompt, response, config, ENDS)
        assert score == pytest.approx(expected, abs=1e-3)
        ended += response[-1] in ENDS
    assert ended > 0 or policy == "plain"


def test_beams_of_another_architecture():
    scorer, brute = scorer_and_oracle("baseline", arch="gemma2")
    model = models.tiny("qwen3", "lm", seed=1)
    config = GuidanceConfig(beta=1.0, top_k=6)
    options = {"num_beams": 4, "length_penalty": 0.0, "max_new_tokens": 20}
    out = generate(model, PROMPTS, scorer, config, **options)
    for score, (prompt, response) in zip(
        out.sequences_scores.tolist(), responses(out, PROMPTS, ENDS), strict=True
    ):
        expected = brute.beam_score(oracle.LogProbs(model), prompt, response, config, ENDS)
        assert score == pytest.approx(expected, abs=1e-3)


def test_beams_that_are_sampled():
    scorer, brute = scorer_and_oracle("baseline")
    model = eager_to_end()
    config = GuidanceConfig(beta=0.8, top_k=8)
    torch.manual_seed(0)
    options = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0, "top_k": 0}
    out = generate(model, PROMPTS, scorer, config, do_sample=True, **options)
    for score, (prompt, response) in zip(
        out.sequences_scores.tolist(), responses(out, PROMPTS, ENDS), strict=True
    ):
        expected = brute.beam_score(oracle.LogProbs(model), prompt, response, config, ENDS)
        assert score == pytest.approx(expected, abs=1e-3)


def test_beams_share_slots_and_forward_no_prefix_twice():
    scorer, _ = scorer_and_oracle("baseline")
    scorer.stats.reset()
    generate(POLICIES["plain"](), PROMPTS, scorer, num_beams=4)
    assert scorer.stats.prefix_tokens == sum(map(len, PROMPTS))


@pytest.mark.parametrize("route", ROUTES)
def test_prune_keeps_the_candidates_that_beam_search_needs(route):
    scorer, _ = scorer_and_oracle("baseline")
    config = GuidanceConfig(rule="prune", margin=0.0, top_k=8)
    out = generate(eager_to_end(), PROMPTS, scorer, config, route, num_beams=4)
    needed = max(2, 1 + len(ENDS))
    for scores in out.scores:
        assert ((scores > -torch.inf).sum(-1) >= needed).all()
    assert (out.sequences_scores > -1e6).all()


def test_what_prune_keeps_for_beams_beyond_its_margin_has_the_largest_advantages():
    scorer, brute = scorer_and_oracle("baseline")
    config = GuidanceConfig(rule="prune", margin=0.2, top_k=8)
    needed = 1 + len(ENDS)
    processor = ValueGuidedLogitsProcessor(scorer, config, eos_token_id=ENDS, num_beams=4)
    prompt = PROMPTS[2]
    logits = oracle.LogProbs(eager_to_end()).logits(prompt)
    guided = processor(torch.tensor([prompt]), logits[None].log_softmax(-1))[0]
    row = brute.row(prompt, logits, config, ENDS)
    scored = [a for a in row.candidates if a not in ENDS]
    logp = oracle.log_softmax(logits.tolist())
    advantage = brute.advantages(prompt, scored, logp, config, ENDS)
    largest = sorted(scored, key=lambda a: -advantage[a])[:needed]
    within = {a for a in row.candidates if row.logits[a] > -torch.inf}
    assert set((guided > -torch.inf).nonzero().flatten().tolist()) == within | set(largest)


@pytest.mark.parametrize("top_k", [1, 2])
def test_too_few_candidates_for_beams_never_end_in_a_made_up_score(top_k):
    scorer, _ = scorer_and_oracle("baseline")
    config = GuidanceConfig(top_k=top_k)
    try:
        out = generate(eager_to_end(), PROMPTS, scorer, config, num_beams=4)
    except ValueError as refusal:
        assert "top_k" in str(refusal)  # noqa: PT017
    else:
        assert (out.sequences_scores > -1e6).all()


@pytest.mark.parametrize("route", ROUTES)
def test_a_gate_is_refused_with_beams(route):
    scorer, _ = scorer_and_oracle("baseline")
    config = GuidanceConfig(gate=0.9)
    with pytest.raises(ValueError, match=r"gate.*beam"):
        generate(POLICIES["plain"](), PROMPTS, scorer, config, route, num_beams=4)
