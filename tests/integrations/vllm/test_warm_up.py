"""What a server does before it takes requests: nothing is compiled or captured for one later."""

from __future__ import annotations

import pytest

from guided_decode.scoring.implicit import ImplicitScorer, LanguageModel
from tests import models
from tests.forward.test_graphed_logits import packed
from tests.forward.test_graphs import scorer_like_a_gpus
from tests.guidance.test_compiled_kernels import decode_anything
from tests.integrations.vllm import vllm_parts
from tests.integrations.vllm.vllm_steps import CPU
from tests.kernels.compiled import Compiled, by_kernel

from guided_decode.integrations.vllm import warm_up  # isort: skip
from guided_decode.integrations.vllm.server_config import parse_config  # isort: skip


def config_of(**own):
    return parse_config(vllm_parts.scorer_config(**own)["guided_decode"], "the test")


def test_no_request_waits_for_a_kernel(monkeypatch):
    scorer, config = scorer_like_a_gpus(), config_of()
    compiled = Compiled(monkeypatch)
    warm_up.forward(scorer, 256, 200)
    warm_up.graphs(scorer, config, rows=16, most=200)
    warm_up.steps(scorer, config, models.VOCAB, CPU)
    warmed = compiled.take()
    assert scorer.stats.forwards == scorer.stats.passthroughs == 0
    for seed in range(2):
        decode_anything(scorer, seed=seed)
        assert compiled.take() <= warmed
    assert by_kernel(warmed)["_choose_kernel"] == 3


@pytest.mark.parametrize(
    ("most", "widths"), [(8, [8]), (16, [16]), (50, [16, 32, 50]), (64, [16, 32, 64])]
)
def test_each_width_that_is_compiled_anew_is_run_once(most, widths, monkeypatch):
    asked = []
    monkeypatch.setattr(warm_up, "guide_rows", lambda *given, **more: asked.append(given[3]))
    scorer = scorer_like_a_gpus()
    warm_up.steps(scorer, config_of(top_k=4, max_top_k=most, gate=0.5), models.VOCAB, CPU)
    assert [each.top_k for each in asked] == [4, *widths]
    assert {each.kl_coef for each in asked} == {0.0}
    asked.clear()
    scorer.reference = object()
    warm_up.steps(scorer, config_of(top_k=4, max_top_k=most), models.VOCAB, CPU)
    # The KL term is an argument more.
    assert [(each.top_k, each.kl_coef) for each in asked] == [
        (4, 0.0), *((width, kl) for width in widths for kl in (0.0, 1.0))
    ]  # fmt: skip


def test_a_head_on_the_policys_trunk_is_warmed_up_without_a_request(monkeypatch):
    nought, config = warm_up.Nought(models.VOCAB, "baseline"), config_of()
    compiled = Compiled(monkeypatch)
    warm_up.steps(nought, config, models.VOCAB, CPU)
    warmed = compiled.take()
    assert nought.stats.passthroughs == 0
    assert by_kernel(warmed)["_choose_kernel"] == 3
    warm_up.steps(scorer_like_a_gpus(), config, models.VOCAB, CPU)
    anew = by_kernel(compiled.take() - warmed)
    assert anew, "the critic's own forward"
    assert anew.keys().isdisjoint(by_kernel(warmed))


def test_usual_steps_are_captured_before_the_first_request():
    scorer = scorer_like_a_gpus()
    warm_up.graphs(scorer, config_of(top_k=8, max_top_k=8), rows=4, most=600)
    # One, two, three and four rows, by prefixes up to 512 and up to 1024.
    assert scorer.graphs.captures == 8
    assert scorer.stats.forwards == 0


def test_implicit_rewards_and_references_are_captured_too():
    pair = ImplicitScorer(packed(), packed(), graphs=True)
    warm_up.graphs(pair, config_of(top_k=None), rows=4, most=600)
    # Of 8 tokens: one, two and four rows, by prefixes up to 512 and up to 1024.
    assert [each.graphs.captures for each in (pair._tuned, pair._reference)] == [6, 6]


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_a_reference_is_captured_where_the_server_asks_for_it(kl_coef):
    scorer = scorer_like_a_gpus()
    scorer.reference = LanguageModel(packed(), graphs=True)
    config = config_of(top_k=8, reference="a path", kl_coef=kl_coef)
    warm_up.graphs(scorer, config, rows=1, most=100)
    assert scorer.graphs.captures == 1
    assert scorer.reference.graphs.captures == (kl_coef > 0)
