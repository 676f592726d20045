"""Rows that are ended by their value, steps that it gates, and values that `generate` returns."""

from __future__ import annotations

import itertools

import pytest
import torch

from guided_decode import GuidanceConfig, load_scorer
from guided_decode.guidance import value_trail
from guided_decode.integrations.transformers import (
    AbstentionCriteria,
    GuidedDecoding,
    TrunkLookahead,
    ValueGuidedLogitsProcessor,
)
from guided_decode.integrations.transformers.value_record import GuidedOutput
from guided_decode.prefix import PrefixHandle
from guided_decode.scorer import Scores
from tests import models, oracle, trunk_heads

ENDS = [models.EOS]
NEW = 12
PROMPTS = models.prompts([7, 3, 21, 12, 5, 9], seed=2)
WIDTH = max(map(len, PROMPTS))
UNGUIDED = GuidanceConfig(beta=0.0, tail="keep")
GUIDED = GuidanceConfig(beta=1.5, top_k=6)
POLICY = oracle.LogProbs(models.tiny("llama", "lm", seed=1))
BRUTE = oracle.Oracle(oracle.Values(models.tiny("llama", "token")))
TRUNK = trunk_heads.brute_force()


@pytest.fixture
def scorer():
    return load_scorer(models.tiny("llama", "token"), kind="verl-critic")


@pytest.fixture
def policy():
    return models.tiny("llama", "lm", seed=1)


def generate(policy, prompts=PROMPTS, **options):
    ids, mask = trunk_heads.padded(prompts)
    defaults = {"eos_token_id": ENDS, "pad_token_id": models.PAD, "max_new_tokens": NEW,
                "do_sample": False, "return_dict_in_generate": True}  # fmt: skip
    return policy.generate(ids, attention_mask=mask, **(defaults | options))


def responses(out, ended_at):
    """Each row's tokens up to its end, by a terminal or by its value."""
    rows = []
    for row, ended in zip(out.sequences[:, WIDTH:].tolist(), ended_at.tolist(), strict=True):
        stop = next((n + 1 for n, token in enumerate(row) if token in ENDS), len(row))
        rows.append(row[: ended if ended >= 0 else stop])
    return rows


_known = {}


def answers(brute, config):
    """Brute force's tokens and gaps of each prompt, computed once."""
    key = (brute is TRUNK, config)
    if key not in _known:
        _known[key] = [brute.greedy(POLICY, prompt, config, ENDS, NEW) for prompt in PROMPTS]
    return _known[key]


def middling(brute, config):
    """A bound that some rows meet on their way and others do not, clear of every value."""
    lowest = []
    values = []
    for prompt, (tokens, _) in zip(PROMPTS, answers(brute, config), strict=True):
        along = [brute.values([[*prompt, *tokens[:t]]])[0] for t in range(1, len(tokens))]
        values += along
        lowest.append(min(along))
    wanted = sorted(lowest)[len(lowest) // 2]
    above = min(value for value in values if value > wanted + 1e-3)
    return (wanted + above) / 2


@pytest.mark.parametrize("after", [None, 5])
@pytest.mark.parametrize("base", [UNGUIDED, GUIDED], ids=["unguided", "guided"])
def test_rows_end_where_brute_force_ends_them(policy, scorer, base, after):
    config = base.changed(abstain=middling(BRUTE, base), abstain_after=after)
    out = generate(policy, custom_generate=GuidedDecoding(scorer, config))
    expected = answers(BRUTE, config)
    assert isinstance(out, GuidedOutput)
    oracle.assert_greedy_equal(responses(out, out.abstained_at), expected)
    ended = [n for n in out.abstained_at.tolist() if n >= 0]
    assert 0 < len(ended) < len(PROMPTS)
    assert min(ended) >= (after or 1)
    for row, length in zip(out.sequences[:, WIDTH:].tolist(), out.abstained_at, strict=True):
        assert length < 0 or set(row[length:]) <= {models.PAD}


def test_the_criterion_alone_ends_the_same_rows(policy, scorer):
    config = UNGUIDED.changed(abstain=middling(BRUTE, UNGUIDED))
    _, mask = trunk_heads.padded(PROMPTS)
    criterion = AbstentionCriteria(
        scorer, config, attention_mask=mask, pad_token_id=models.PAD, eos_token_id=ENDS
    )
    for _ in range(2):
        out = generate(policy, stopping_criteria=[criterion])
        guided = generate(policy, custom_generate=GuidedDecoding(scorer, config))
        assert criterion.ended_at.tolist() == guided.abstained_at.tolist()
        assert torch.equal(out.sequences, guided.sequences)


def test_a_row_that_only_abstains_has_its_prefix_scored_and_nothing_else(policy, scorer):
    prompt = PROMPTS[2:3]
    config = UNGUIDED.changed(abstain=-1e9)
    generate(policy, prompt, custom_generate=GuidedDecoding(scorer, config), eos_token_id=None)
    assert scorer.stats.candidate_tokens == 0
    # The last token ends the response: of it nobody asks.
    assert scorer.stats.prefix_tokens == len(prompt[0]) + NEW - 1
    other = load_scorer(models.tiny("llama", "token"), kind="verl-critic")
    generate(policy, prompt, stopping_criteria=[AbstentionCriteria(other, config)],
             eos_token_id=None)  # fmt: skip
    assert other.stats.prefix_tokens == len(prompt[0]) + NEW - 1


def test_abstention_of_a_guided_row_forwards_nothing(policy, scorer):
    generate(policy, custom_generate=GuidedDecoding(scorer, GUIDED), eos_token_id=None)
    plain = scorer.stats.as_dict()
    other = load_scorer(models.tiny("llama", "token"), kind="verl-critic")
    config = GUIDED.changed(abstain=-1e9)
    generate(policy, custom_generate=GuidedDecoding(other, config), eos_token_id=None)
    for name in ("prefix_tokens", "candidate_tokens", "forwards"):
        assert getattr(other.stats, name) == plain[name], name


def gate_of(brute, config):
    """Bounds of value and of its fall that open some steps and not others."""
    along, falls = [], []
    for prompt, (tokens, _) in zip(PROMPTS, answers(brute, config), strict=True):
        values = [brute.values([[*prompt, *tokens[:t]]])[0] for t in range(len(tokens))]
        along += values
        falls += [a - b for a, b in itertools.pairwise(values)]
    along.sort()
    falls = sorted(each for each in falls if each > 0.05)
    return along[len(along) // 3] - 1e-3, falls[len(falls) // 2] - 1e-3


@pytest.mark.parametrize(
    "which",
    [
        pytest.param("value", marks=pytest.mark.slow),
        pytest.param("fall", marks=pytest.mark.slow),
        "both",
    ],
)
@pytest.mark.parametrize("base", [
    GUIDED,
    GuidanceConfig(rule="prune", margin=0.7, top_k=6, tail="keep"),
    GuidanceConfig(beta=2.0, top_k=6, tail="keep", gate=0.35),
], ids=["reweight", "prune-keep", "gate"])  # fmt: skip
@pytest.mark.parametrize("loop", [GuidedDecoding, TrunkLookahead])
def test_guidance_works_where_the_value_gate_is_open(policy, scorer, base, which, loop):
    brute, values = BRUTE, {}
    if loop is TrunkLookahead:
        brute, scorer = TRUNK, trunk_heads.scorer()
        policy = trunk_heads.policy()
    low, fall = gate_of(brute, base)
    values = {"value": {"value_gate": low}, "fall": {"value_gate_fall": fall},
              "both": {"value_gate": low, "value_gate_fall": fall}}[which]  # fmt: skip
    config = base.changed(**values)
    out = generate(policy, custom_generate=loop(scorer, config))
    expected = answers(brute, config)
    oracle.assert_greedy_equal(responses(out, torch.full((len(PROMPTS),), -1)), expected)
    steps = sum(len(tokens) for tokens, _ in expected)
    opened = sum(
        brute.is_open([*prompt, *tokens[:t]], config, len(prompt))
        for prompt, (tokens, _) in zip(PROMPTS, expected, strict=True)
        for t in range(len(tokens))
    )
    assert 0 < opened < steps
    if base.gate is None:
        assert scorer.stats.rows_gated == steps - opened
    # Of shut steps no candidate is forwarded; terminals never are.
    assert scorer.stats.candidate_tokens <= 6 * opened + steps


def test_a_shut_gate_scores_the_prefix_alone(policy, scorer):
    prompt = PROMPTS[2:3]
    config = GUIDED.changed(value_gate=-1e9, tail="keep")
    out = generate(policy, prompt, custom_generate=GuidedDecoding(scorer, config),
                   eos_token_id=None)  # fmt: skip
    plain = generate(policy, prompt, eos_token_id=None)
    assert torch.equal(out.sequences, plain.sequences)
    assert scorer.stats.candidate_tokens == 0
    assert scorer.stats.prefix_tokens == len(prompt[0]) + NEW - 1
    assert scorer.stats.rows_gated == NEW


class NoNumbers:
    """A scorer whose values of prefixes are NaN for one of the prompts."""

    def __init__(self, scorer, prompt):
        self._scorer, self._prompt = scorer, prompt

    def __getattr__(self, name):
        return getattr(self._scorer, name)

    def _spoiled(self, prefixes, values):
        begin = [list(prefix.tokens[: len(self._prompt)]) for prefix in prefixes]
        bad = torch.tensor([each == self._prompt for each in begin])
        return values.masked_fill(bad, torch.nan)

    def score(self, prefixes, candidates):
        values, baseline = self._scorer.score(prefixes, candidates)
        return Scores(values, self._spoiled(prefixes, baseline))

    def read(self, prefixes):
        found = self._scorer.read(prefixes)
        return found._replace(values=self._spoiled(prefixes, found.values))


def spoiled(loop, config, **options):
    """A loop over a scorer that has no number for the second prompt's values, its scorer and its
    policy."""
    trunk = loop is TrunkLookahead
    inner = trunk_heads.scorer() if trunk else load_scorer(models.tiny("llama", "token"),
                                                           kind="verl-critic")  # fmt: skip
    scorer = NoNumbers(inner, PROMPTS[1])
    policy = trunk_heads.policy() if trunk else models.tiny("llama", "lm", seed=1)
    guided = loop(inner, config, **options)
    guided.scorer = scorer
    return guided, inner, policy


@pytest.mark.parametrize("loop", [GuidedDecoding, TrunkLookahead])
def test_a_value_that_is_no_number_ends_no_row_and_is_not_passed_over(loop):
    config = UNGUIDED.changed(abstain=1e9)
    guided, _, policy = spoiled(loop, config)
    with pytest.raises(ValueError, match="NaN or infinity as the value of 1 of 6 prefixes"):
        generate(policy, custom_generate=guided)
    guided, scorer, policy = spoiled(loop, config, on_error="passthrough")
    out = generate(policy, custom_generate=guided, eos_token_id=None)
    assert out.abstained_at.tolist() == [1, -1, 1, 1, 1, 1]
    assert scorer.stats.passthroughs == NEW - 1


@pytest.mark.parametrize("loop", [GuidedDecoding, TrunkLookahead])
def test_a_row_whose_value_is_no_number_has_no_shut_gate(loop):
    config = GUIDED.changed(value_gate=-1e9)
    guided, _, policy = spoiled(loop, config)
    with pytest.raises(ValueError, match="NaN or infinity"):
        generate(policy, custom_generate=guided)
    guided, scorer, policy = spoiled(loop, config, on_error="passthrough")
    out = generate(policy, custom_generate=guided, eos_token_id=None, output_scores=True)
    assert scorer.stats.passthroughs == NEW
    assert scorer.stats.rows_gated == NEW * (len(PROMPTS) - 1)
    left = torch.stack([(scores > -torch.inf).sum(-1) for scores in out.scores], -1)
    # Untouched, where the others' tails are masked.
    assert (left[1] == models.VOCAB).all()
    assert (left[[0, 2, 3, 4, 5]] == 6).all()


def test_a_value_before_that_nobody_remembers_is_read_again(scorer):
    """The same rows with trails that know nothing: as after a preemption."""
    prompt = PROMPTS[0]
    fresh = [value_trail.ValueTrail(len(prompt))]
    rows = [prompt, [*prompt, 40]]
    now, before = (BRUTE.values([row])[0] for row in (rows[1], rows[0]))
    for fall, expected in ((abs(before - now) + 0.1, []), (0.0, [0] if before > now else [])):
        config = GUIDED.changed(value_gate_fall=fall)
        assert value_trail.open_rows(scorer, rows[1:], [config], [0], fresh) == expected
    with pytest.raises(ValueError, match="value_gate_fall=0 came without trails"):
        value_trail.open_rows(scorer, rows[1:], [config], [0], None)


def test_a_value_before_is_read_of_the_history_as_it_lies(scorer, monkeypatch):
    handle = PrefixHandle([*PROMPTS[0], 40])
    score, asked = scorer.score, []
    monkeypatch.setattr(scorer, "score", lambda prefixes, candidates: (
        asked.extend(prefixes), score(prefixes, candidates))[1])  # fmt: skip
    config = GUIDED.changed(value_gate_fall=0.0)
    value_trail.open_rows(scorer, [handle], [config], [0],
                          [value_trail.ValueTrail(len(PROMPTS[0]))])  # fmt: skip
    assert asked[0] is handle
    assert asked[1].tolist() == PROMPTS[0]
    assert asked[1].data_ptr() == torch.from_numpy(handle.tokens).data_ptr()


@pytest.mark.parametrize("loop", [GuidedDecoding, TrunkLookahead])
@pytest.mark.parametrize("config", [GUIDED, GuidanceConfig(beta=1.0, top_k=6, gate=0.3)])
def test_the_output_has_each_prefixes_value_and_each_tokens_advantage(policy, scorer, loop, config):
    brute = BRUTE
    if loop is TrunkLookahead:
        brute, scorer = TRUNK, trunk_heads.scorer()
        policy = trunk_heads.policy()
    config = config.changed(abstain=middling(brute, config))
    out = generate(policy, custom_generate=loop(scorer, config, values=True),
                   output_logits=True)  # fmt: skip
    gated = 0
    for i, (prompt, tokens) in enumerate(zip(PROMPTS, responses(out, out.abstained_at),
                                             strict=True)):  # fmt: skip
        values = [brute.values([[*prompt, *tokens[:t]]])[0] for t in range(len(tokens) + 1)]
        assert out.prefix_values[i, : len(tokens)].tolist() == pytest.approx(values[:-1], abs=1e-4)
        assert bool(out.prefix_values[i, len(tokens) :].isnan().all())
        for t, token in enumerate(tokens):
            added = float(out.advantages[i, t])
            sure = float(out.logits[t][i].softmax(-1).max()) >= (config.gate or 2)
            gated += sure
            if sure:
                assert added != added
            elif token in ENDS:
                assert added == 0.0
            else:
                assert added == pytest.approx(values[t + 1] - values[t], abs=1e-4)
        assert bool(out.advantages[i, len(tokens) :].isnan().all())
    assert (gated > 0) == (config.gate is not None)


@pytest.mark.parametrize("after", [None, 4])
def test_the_trunks_own_loop_ends_the_rows_that_the_other_ends(after):
    policy, brute = trunk_heads.policy(), TRUNK
    config = GUIDED.changed(abstain=middling(brute, GUIDED), abstain_after=after)
    outs = [
        generate(policy, custom_generate=loop(trunk_heads.scorer(), config))
        for loop in (GuidedDecoding, TrunkLookahead)
    ]
    assert outs[0].abstained_at.tolist() == outs[1].abstained_at.tolist()
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert (outs[0].abstained_at >= 0).any()


def test_a_batch_that_ends_at_once_ends_there():
    policy = trunk_heads.policy()
    config = GUIDED.changed(abstain=1e9, abstain_after=3)
    for loop in (GuidedDecoding, TrunkLookahead):
        out = generate(policy, custom_generate=loop(trunk_heads.scorer(), config, values=True),
                       eos_token_id=None)  # fmt: skip
        assert out.sequences.shape[1] == WIDTH + 3
        assert out.abstained_at.tolist() == [3] * len(PROMPTS)
        assert out.prefix_values.shape == (len(PROMPTS), 3)
        assert not out.prefix_values.isnan().any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: AbstentionCriteria(s, GUIDED), "config has no abstain: expected"),
        (lambda s: ValueGuidedLogitsProcessor(s, GUIDED.changed(abstain=1.0)),
         "abstain=1 was given to a logits processor, which ends no row"),
        (lambda s: ValueGuidedLogitsProcessor(s, GUIDED.changed(value_gate=1.0), num_beams=2),
         "value_gate=1 was given with 2 beams"),
        (lambda s: generate(models.tiny("llama", "lm", seed=1), num_beams=2, custom_generate=
                            GuidedDecoding(s, GUIDED.changed(abstain=1.0))),
         "abstain=1 was given with 2 beams"),
        (lambda s: generate(models.tiny("llama", "lm", seed=1), num_beams=3, stopping_criteria=[
                            AbstentionCriteria(s, UNGUIDED.changed(abstain=1.0))]),
         "abstain=1 was given with 3 beams: a beam that falls behind"),
        (lambda s: generate(models.tiny("llama", "lm", seed=1), num_beams=2, custom_generate=
                            GuidedDecoding(s, GUIDED, values=True)),
         "values=True was given with 2 beams"),
        (lambda s: generate(models.tiny("llama", "lm", seed=1), return_dict_in_generate=False,
                            custom_generate=GuidedDecoding(s, GUIDED, values=True)),
         "values=True was given without return_dict_in_generate=True"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(scorer, make, message):
    with pytest.raises(ValueError, match=message):
        make(scorer)


def test_an_implicit_reward_has_no_values_to_end_rows_by():
    pair = (models.saved("llama", "lm", seed=1), models.saved("llama", "lm", seed=2))
    scorer = load_scorer(pair[0], kind="implicit", reference=pair[1])
    for config in (GUIDED.changed(abstain=0.0), GUIDED.changed(value_gate_fall=0.5)):
        with pytest.raises(ValueError, match="values tokens or steps and no prefixes"):
            generate(
                models.tiny("llama", "lm", seed=1), custom_generate=GuidedDecoding(scorer, config)
            )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"value_gate": float("nan")}, "value_gate=nan: expected a finite number"),
        ({"value_gate_fall": -0.1}, "value_gate_fall=-0.1: expected .* at least 0"),
        ({"abstain": "low"}, "abstain='low': expected a finite number"),
        ({"abstain": 0.0, "abstain_after": 0}, "abstain_after=0: expected an integer of at least"),
        ({"abstain_after": 4}, "abstain_after=4 was given without abstain: pass abstain="),
    ],
)
def test_settings_without_meaning_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GuidanceConfig(**fields)


def test_a_config_that_no_longer_abstains_has_no_length_either():
    config = GuidanceConfig(abstain=0.5, abstain_after=8)
    assert config.changed(abstain=None) == GuidanceConfig()
    assert config.changed(beta=2.0).abstain_after == 8
