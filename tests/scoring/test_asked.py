"""What is asked in another form than it is due is refused in our words."""

import numpy as np
import pytest
import torch

from guided_decode import GuidanceConfig, Scores, guide, load_scorer
from guided_decode.guidance.step import guide_rows
from tests import models


@pytest.fixture(scope="module")
def scorers():
    lm = models.tiny("llama", "lm")
    return {
        "critic": load_scorer(models.tiny("llama", "token"), kind="verl-critic"),
        "implicit": load_scorer(lm, kind="implicit", reference=lm),
        "trunk": load_scorer(lm, head=torch.nn.Linear(48, 1)),
    }


ASKED = [
    ([[3]], [[3]], "candidates came as list: expected a tensor"),
    ([[3]], np.array([[3]]), "candidates came as ndarray: expected a tensor"),
    ([[3]], None, "candidates came as NoneType"),
    ([[3]], torch.tensor([3]), "candidates came as torch.int64 [1] for 1 prefixes"),
    ([[3]], torch.tensor([[3.0]]), "candidates came as torch.float32 [1, 1]"),
    ([[3], [4]], torch.tensor([[3]]), "for 2 prefixes"),
    ([3], torch.tensor([[3]]), "a prefix came as int64 with shape []"),
    (3, torch.tensor([[3]]), "prefixes came as int: expected a sequence of rows"),
    ("ab", torch.tensor([[3], [3]]), "prefixes came as str"),
    ([[3.5]], torch.tensor([[3]]), "a prefix came as float64"),
    ([[]], torch.tensor([[3]]), "row 0 has an empty prefix"),
]


@pytest.mark.parametrize("kind", ["critic", "implicit", "trunk"])
@pytest.mark.parametrize(("prefixes", "candidates", "message"), ASKED)
def test_other_than_rows_and_integers_is_refused(scorers, kind, prefixes, candidates, message):
    import re

    with pytest.raises(ValueError, match=re.escape(message)):
        scorers[kind].score(prefixes, candidates)


def test_lists_for_logits_and_dicts_for_configs_are_refused(scorers):
    scores = Scores(torch.zeros(1, 1), torch.zeros(1))
    one = torch.tensor([[1]])
    with pytest.raises(ValueError, match="logits came as list: expected a tensor"):
        guide_rows(scorers["critic"], [[0.0] * 101], [[5]], GuidanceConfig())
    with pytest.raises(ValueError, match="logits came as list"):
        guide([[0.0]], one, scores, GuidanceConfig())
    with pytest.raises(ValueError, match="candidates came as list"):
        guide(torch.zeros(1, 5), [[1]], scores, GuidanceConfig())
    for config in ({"beta": 1.0}, [{"beta": 1.0}]):
        with pytest.raises(ValueError, match="a dict came as a config: expected a GuidanceConfig"):
            guide_rows(scorers["critic"], torch.zeros(1, 101), [[5]], config)


@pytest.fixture
def default_bfloat16():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


def guided(scorer):
    logits = torch.randn(2, 101, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    # No float of these is one of bfloat16.
    config = GuidanceConfig(beta=1.2345678, top_k=5, top_p=0.987, gate=0.98, kl_coef=0.123456)
    prune = config.changed(rule="prune", margin=0.7654321)
    return guide_rows(scorer, logits, [[5, 6], [7, 8, 9]], [config, prune], terminals=[4])


def test_the_callers_default_dtype_rounds_no_setting(request):
    critic, reference = models.tiny("llama", "token"), models.tiny("llama", "lm")
    expected = guided(load_scorer(critic, "verl-critic", reference=reference))
    from guided_decode.guidance import candidates, rule

    for kept in (candidates._kept, rule._rules_of_all):
        kept.cache_clear()
    request.getfixturevalue("default_bfloat16")
    # Settings that were kept under one default dtype serve under another.
    scorer = load_scorer(critic, "verl-critic", reference=reference)
    assert torch.equal(guided(scorer), expected)
    weights = rule._rules_of_all(GuidanceConfig(beta=1.2345678), 1, torch.device("cpu")).beta
    assert weights.dtype == torch.float32
    assert weights.item() == pytest.approx(1.2345678, abs=1e-7)
