"""Presets against the published formulas, written out over the whole vocabulary."""

import pytest
import torch

from guided_decode import Scores, guide
from guided_decode.guidance import PRESETS, preset, select_candidates

INF = torch.inf
VOCAB = 300


def top(logits, k):
    """A mask of each row's k largest logits."""
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(k).indices, True)


def cd(logits, values):
    return torch.where(top(logits, 16), logits.softmax(-1) * values.exp(), 0.0)


def fudge(logits, values):
    return torch.where(top(logits, 200), logits.softmax(-1) * values.sigmoid(), 0.0)


def vas(logits, values):
    chosen = top(logits, 20)
    mean = torch.where(chosen, values, 0.0).sum(-1, keepdim=True) / 20
    return torch.where(chosen, logits + 3.0 * (values - mean), logits).exp()


def args(logits, values):
    return torch.where(top(logits, 10), logits + 1.0 * values, -INF).exp()


def rad(logits, values):
    return torch.where(top(logits, 20), logits + 30.0 * values.clip(0, 1), -INF).exp()


def proxy_tuning(logits, values):
    # Of experts, values are differences of log-probabilities.
    return (logits + values).exp()


FORMULAS = {"cd": cd, "fudge": fudge, "vas": vas, "args": args, "rad": rad,
            "proxy-tuning": proxy_tuning}  # fmt: skip
TRANSFORMED = {"fudge": torch.nn.functional.logsigmoid, "rad": lambda values: values.clip(0, 1)}


def test_every_preset_has_a_formula():
    assert set(PRESETS) == set(FORMULAS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_published_distribution(name):
    draws = torch.Generator().manual_seed(5)
    logits, values = (torch.randn(6, VOCAB, generator=draws) * 2 for _ in range(2))
    # What the scorer says of the prefix; an implicit reward says nothing of it.
    before = torch.zeros(6) if name == "proxy-tuning" else torch.randn(6, generator=draws)
    config = preset(name)
    candidates = select_candidates(logits, config.top_k, config.top_p)
    seen = TRANSFORMED.get(name, lambda values: values)(values)
    guided = guide(logits, candidates, Scores(seen.gather(-1, candidates), before), config)
    expected = FORMULAS[name](logits, values)
    torch.testing.assert_close(
        guided.softmax(-1), expected / expected.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_genarm_is_proxy_tuning_from_the_policy_at_another_temperature(alpha, temperature):
    draws = torch.Generator().manual_seed(6)
    own, arm = (torch.randn(4, VOCAB, generator=draws).log_softmax(-1) for _ in range(2))
    config = preset("proxy-tuning", beta=alpha / (1 + alpha))
    whole = torch.arange(VOCAB).expand(4, -1)
    guided = guide(own, whole, Scores(arm - own, torch.zeros(4)), config)
    genarm = ((own + alpha * arm) / temperature).softmax(-1)
    torch.testing.assert_close((guided * (1 + alpha) / temperature).softmax(-1), genarm)


def test_settings_change_a_preset_and_unknown_ones_are_refused():
    assert preset("vas", beta=1.5, top_k=8) == PRESETS["vas"].config.changed(beta=1.5, top_k=8)
    with pytest.raises(ValueError, match=r"preset=genarm: unknown.* expected one of cd, fudge"):
        preset("genarm")
    with pytest.raises(ValueError, match="beta="):
        preset("vas", beta=float("nan"))
