"""Steps of responses, looked at afterwards: brute force at each token, and the guided run's own."""

import math

import pytest
import torch

from guided_decode import GuidanceConfig, load_scorer
from guided_decode.integrations.transformers import ValueGuidedLogitsProcessor
from guided_decode.lab.trace import steps as trace_steps
from guided_decode.lab.trace.steps import replay
from tests import models, oracle

ENDS = [models.EOS]
CONFIGS = [
    GuidanceConfig(beta=1.3, top_k=6),
    GuidanceConfig(beta=0.8, top_k=9, top_p=0.5, tail="keep", baseline="mean"),
    GuidanceConfig(rule="prune", margin=0.9, top_k=7),
    GuidanceConfig(beta=1.3, top_k=6, gate=0.2),
]


def policy():
    return models.tiny("llama", "lm", seed=1)


def critic():
    return load_scorer(models.saved("llama", "token"), kind="verl-critic")


def texts():
    (prompt,), (response,) = models.prompts([7], seed=5), models.prompts([11], seed=6)
    return prompt, [*response, models.EOS]


def softmax(logits):
    return [math.exp(each) for each in oracle.log_softmax(logits)]


@pytest.mark.parametrize("config", CONFIGS)
def test_each_step_is_what_brute_force_makes_of_its_prefix(config, monkeypatch):
    # More than one call of the policy.
    monkeypatch.setattr(trace_steps, "_ROWS", 5)
    prompt, response = texts()
    brute = oracle.Oracle(oracle.Values(models.tiny("llama", "token")))
    plain = oracle.LogProbs(policy())
    found = replay(policy(), critic(), config, prompt, response, terminals=ENDS)
    assert len(found) == len(response)
    gated = 0
    for i, step in enumerate(found):
        prefix = [*prompt, *response[:i]]
        logits = plain.logits(prefix)
        row = brute.row(prefix, logits, config, ENDS)
        assert list(step.tokens[: step.considered]) == row.candidates
        assert step.tokens[step.chosen] == response[i]
        assert step.outside == (response[i] not in row.candidates)
        assert len(step.tokens) == step.considered + step.outside
        odds, guided = softmax(logits.tolist()), softmax(row.logits)
        assert step.probabilities == pytest.approx([odds[t] for t in step.tokens], abs=1e-5)
        decided = [t not in row.undecided for t in step.tokens]
        if all(decided):
            assert step.guided == pytest.approx([guided[t] for t in step.tokens], abs=1e-4)
        free = [token for token in row.candidates if token not in ENDS]
        if config.gate is not None and max(odds) >= config.gate:
            gated += 1
            assert step.baseline is None
            assert set(step.values) == {None}
            continue
        wanted = brute.advantages(prefix, free, [], config, ENDS)
        quality = dict(zip(free, brute.values.after(prefix, free), strict=True))
        for token, value, advantage in zip(step.tokens, step.values, step.advantages, strict=True):
            assert (value is None) == (advantage is None) == (token not in free)
            if value is not None:
                assert value == pytest.approx(quality[token], abs=1e-4)
                assert advantage == pytest.approx(wanted[token], abs=1e-4)
        assert step.baseline == pytest.approx(brute.values([prefix])[0], abs=1e-4)
    assert (gated > 0) == (config.gate is not None)


def test_a_guided_run_met_the_same_probabilities():
    prompt, _ = texts()
    config, scorer, met = CONFIGS[0], critic(), []
    guidance = ValueGuidedLogitsProcessor(scorer, config, eos_token_id=ENDS)

    def processor(ids, scores):
        guided = guidance(ids, scores)
        met.append(guided[0].softmax(-1))
        return guided

    output = policy().generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False,
        max_new_tokens=12, logits_processor=[processor], pad_token_id=models.PAD,
    )  # fmt: skip
    response = output[0, len(prompt) :].tolist()
    for step, own, token in zip(
        replay(policy(), scorer, config, prompt, response, terminals=ENDS), met, response,
        strict=True,
    ):  # fmt: skip
        assert step.tokens[step.chosen] == token
        assert step.guided[step.chosen] == max(step.guided)
        assert step.guided == pytest.approx([float(own[t]) for t in step.tokens], abs=1e-5)


def test_of_a_whole_vocabulary_the_likeliest_are_told_and_the_responses_own():
    prompt, response = texts()
    scorer = load_scorer(
        models.saved("llama", "lm", seed=4), kind="implicit",
        reference=models.saved("llama", "lm", seed=1),
    )  # fmt: skip
    config = GuidanceConfig(beta=0.5, top_k=None)
    few, every = (
        replay(policy(), scorer, config, prompt, response, terminals=ENDS, most=most)
        for most in (5, models.VOCAB)
    )
    assert all(step.considered == len(step.tokens) == models.VOCAB for step in every)
    for step, whole, own in zip(few, every, response, strict=True):
        assert not step.outside
        assert step.tokens[:5] == whole.tokens[:5]
        assert step.tokens[step.chosen] == own
        assert len(step.tokens) == 5 + (own not in whole.tokens[:5])
        assert step.values[step.chosen] == pytest.approx(whole.values[whole.chosen], abs=1e-4)
        assert step.guided[step.chosen] == pytest.approx(whole.guided[whole.chosen], abs=1e-5)
        assert step.advantages[step.chosen] == pytest.approx(step.values[step.chosen])
