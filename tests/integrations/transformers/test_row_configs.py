"""A config for each prompt or row, through the whole generation, against brute force."""

import pytest
import torch

from guided_decode import GuidanceConfig, load_scorer
from guided_decode.integrations.transformers import (
    GuidedDecoding,
    TrunkLookahead,
    ValueGuidedLogitsProcessor,
)
from tests import models, oracle, trunk_heads
from tests.integrations.transformers.test_beams import responses
from tests.integrations.transformers.test_generate import (
    ENDS,
    PROMPTS,
    ROUTES,
    eager_to_end,
    generate,
    live_steps,
)

CONFIGS = [
    GuidanceConfig(beta=3.0, top_k=6),
    GuidanceConfig(beta=0.0, tail="keep"),
    GuidanceConfig(rule="prune", margin=0.4, top_k=12, tail="keep"),
    GuidanceConfig(beta=-2.0, top_k=4, gate=0.3),
]
BRUTE = oracle.Oracle(oracle.Values(models.tiny("llama", "token")))
WIDTH = max(map(len, PROMPTS))


@pytest.fixture
def scorer():
    return load_scorer(models.tiny("llama", "token"), kind="verl-critic")


def answers(sequences):
    """Each row's tokens up to its end."""
    for sequence in sequences[:, WIDTH:].tolist():
        stop = next((n + 1 for n, token in enumerate(sequence) if token in ENDS), len(sequence))
        yield sequence[:stop]


def assert_scores_equal(out, configs, brute=BRUTE):
    """Each live row's scores are brute force by the row's own config."""
    for step, row, prefix in live_steps(out, PROMPTS, ENDS):
        expected = brute.row(prefix, out.logits[step][row].float(), configs[row], ENDS)
        oracle.assert_row_equal(out.scores[step][row], expected)


@pytest.mark.parametrize("route", ROUTES)
def test_greedy_rows_of_each_config_equal_brute_force_token_for_token(scorer, route):
    policy = eager_to_end()
    out = generate(policy, PROMPTS, scorer, CONFIGS, route, max_new_tokens=16)
    lm = oracle.LogProbs(policy)
    expected = [
        BRUTE.greedy(lm, prompt, config, ENDS, 16)
        for prompt, config in zip(PROMPTS, CONFIGS, strict=True)
    ]
    lengths = [len(tokens) for tokens, _ in expected]
    assert min(lengths) < max(lengths), "no row finished before the others"
    oracle.assert_greedy_equal(list(answers(out.sequences)), expected)
    assert_scores_equal(out, CONFIGS)


def test_the_trunks_own_loop_takes_a_config_a_prompt():
    policy, scorer, brute = trunk_heads.policy(), trunk_heads.scorer(), trunk_heads.brute_force()
    out = trunk_heads.generate(
        policy, PROMPTS, scorer, CONFIGS, eos_token_id=ENDS, max_new_tokens=16
    )
    lm = oracle.LogProbs(policy)
    expected = [
        brute.greedy(lm, prompt, config, ENDS, 16)
        for prompt, config in zip(PROMPTS, CONFIGS, strict=True)
    ]
    oracle.assert_greedy_equal(list(answers(out.sequences)), expected)
    assert_scores_equal(out, CONFIGS, brute)


@pytest.mark.parametrize("made", [GuidedDecoding, TrunkLookahead])
def test_samples_of_a_prompt_share_its_config_or_have_their_own(made):
    policy, scorer, brute = trunk_heads.policy(), trunk_heads.scorer(), trunk_heads.brute_force()
    options = {"eos_token_id": ENDS, "do_sample": True, "top_k": 0, "num_return_sequences": 3}
    shared = [config for config in CONFIGS for _ in range(3)]
    own = [CONFIGS[(7 * row) % 4] for row in range(12)]
    for given, rows in ((CONFIGS, shared), (own, own)):
        torch.manual_seed(0)
        out = trunk_heads.generate(policy, PROMPTS, scorer, given, loop=made, **options)
        assert_scores_equal(out, rows, brute)


def test_samples_by_the_bare_processor(scorer):
    policy = models.tiny("llama", "lm", seed=1)
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": 2}
    torch.manual_seed(0)
    out = generate(policy, PROMPTS, scorer, CONFIGS, "logits_processor", **options)
    assert_scores_equal(out, [config for config in CONFIGS for _ in range(2)])


@pytest.mark.parametrize("route", ROUTES)
def test_beams_of_a_prompt_go_by_its_config(scorer, route):
    policy = eager_to_end()
    configs = [GuidanceConfig(beta=beta, top_k=8) for beta in (0.8, 0.0, -0.5, 2.0)]
    options = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.0}
    out = generate(policy, PROMPTS, scorer, configs, route, **options)
    lm = oracle.LogProbs(policy)
    each = zip(out.sequences_scores.tolist(), responses(out, PROMPTS, ENDS), strict=True)
    for row, (score, (prompt, response)) in enumerate(each):
        expected = BRUTE.beam_score(lm, prompt, response, configs[row // 3], ENDS)
        assert score == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("number", "options", "message"),
    [
        (3, {}, r"3 configs came for 4 prompts with 1 rows each: pass one config, one a prompt"),
        (
            6,
            {"num_return_sequences": 2, "do_sample": True},
            r"one a prompt \(4\), or one a row \(8",
        ),
        (2, {"num_return_sequences": 2, "do_sample": True}, r"2 configs came for 4 prompts"),
        (8, {"num_beams": 2}, r"8 configs came for 4 prompts with 2 rows each: .*prompt \(4\)$"),
    ],
)
def test_another_number_of_configs_is_refused_before_anything_is_scored(
    scorer, route, number, options, message
):
    scorer.stats.reset()
    configs = [GuidanceConfig(top_k=8)] * number
    with pytest.raises(ValueError, match=message):
        generate(models.tiny("llama", "lm", seed=1), PROMPTS, scorer, configs, route, **options)
    assert scorer.stats.forwards == 0


def test_the_trunks_own_loop_refuses_another_number_of_configs():
    with pytest.raises(ValueError, match="3 configs came for 4 prompts"):
        trunk_heads.generate(trunk_heads.policy(), PROMPTS, trunk_heads.scorer(), CONFIGS[:3])


def test_beams_that_the_bare_processor_was_not_told_of_refuse_configs_of_their_own(scorer):
    configs = [GuidanceConfig(beta=beta, top_k=8) for beta in (0.5, 1.0, 1.5, 2.0)]
    processor = ValueGuidedLogitsProcessor(scorer, configs, eos_token_id=ENDS, pad_token_id=0)
    with pytest.raises(ValueError, match="different configs, as in beam search: pass num_beams"):
        models.tiny("llama", "lm", seed=1).generate(
            torch.tensor(PROMPTS[:1]),
            num_beams=4,
            max_new_tokens=12,
            eos_token_id=ENDS,
            pad_token_id=0,
            logits_processor=[processor],
        )


def test_a_gate_with_beams_is_refused_wherever_it_stands(scorer):
    with pytest.raises(ValueError, match=r"gate=0\.3.*beams"):
        ValueGuidedLogitsProcessor(scorer, [GuidanceConfig(), CONFIGS[3]], num_beams=2)
