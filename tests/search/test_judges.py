"""What judges say of whole and partial responses, against the stock forward."""

import pytest
import torch

from guided_decode import load_scorer
from guided_decode.scoring import implicit
from guided_decode.search import Judged, ScorerJudge, response_ratios
from tests import models

EOS = 2
PROMPT = tuple(models.prompts([7], seed=3)[0])
RESPONSES = [(5, 9, 11), (5, 9, EOS), (5,), (8, 8, 8, 8, EOS), (5, 9, 11, EOS)]


def texts():
    return [Judged(PROMPT, each, each[-1] == EOS) for each in RESPONSES]


def values(head, response):
    model = models.tiny("llama", head)
    hidden = model.model(input_ids=torch.tensor([PROMPT + response])).last_hidden_state[0]
    return model.score(hidden)[:, 0]


@torch.inference_mode()
def test_a_critic_is_read_before_the_end(tmp_path):
    scorer = load_scorer(models.tiny("llama", "token"), kind="ppo-critic")
    judged = ScorerJudge(scorer, terminals=[EOS]).judge(texts())
    for response, value in zip(RESPONSES, judged, strict=True):
        own = response[:-1] if response[-1] == EOS else response
        assert value == pytest.approx(values("token", own)[-1].item(), abs=1e-4)


@torch.inference_mode()
def test_a_reward_model_is_read_at_the_end():
    scorer = load_scorer(models.tiny("llama", "sequence"), kind="reward-model")
    judged = ScorerJudge(scorer, terminals=[EOS]).judge(texts())
    for response, value in zip(RESPONSES, judged, strict=True):
        assert value == pytest.approx(values("sequence", response)[-1].item(), abs=1e-4)


@torch.inference_mode()
def test_a_finished_response_that_no_end_ends_is_read_at_its_last_token():
    scorer = load_scorer(models.tiny("llama", "token"), kind="ppo-critic")
    judged = ScorerJudge(scorer).judge([Judged(PROMPT, (5, 9, 11), finished=True)])
    assert judged == pytest.approx([values("token", (5, 9, 11))[-1].item()], abs=1e-4)


@torch.inference_mode()
def test_an_implicit_reward_is_summed_over_the_response():
    tuned, base = (models.tiny("llama", "lm", seed=seed) for seed in (0, 1))
    scorer = load_scorer(tuned, kind="implicit", reference=base)
    judged = ScorerJudge(scorer).judge([*texts(), Judged(PROMPT, (), finished=False)])
    for response, value in zip(RESPONSES, judged, strict=False):
        ids = torch.tensor([PROMPT + response])
        own, other = (
            model(ids).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1).gather(
                -1, torch.tensor(response)[:, None]).sum().item()
            for model in (tuned, base)
        )  # fmt: skip
        assert value == pytest.approx(own - other, abs=1e-3)
    assert judged[-1] == 0.0


def test_logits_of_long_responses_are_read_in_parts(monkeypatch):
    tuned, base = (models.tiny("llama", "lm", seed=seed) for seed in (0, 1))
    wanted = ScorerJudge(load_scorer(tuned, kind="implicit", reference=base)).judge(texts())
    scorer, held = load_scorer(tuned, kind="implicit", reference=base), []
    monkeypatch.setattr(implicit, "_MOST_LOGITS", 3 * scorer.vocab_size + 1)

    def read(logits, candidates, own=implicit.LanguageModel._read):
        held.append(len(logits))
        return own(logits, candidates)

    monkeypatch.setattr(implicit.LanguageModel, "_read", staticmethod(read))
    assert ScorerJudge(scorer).judge(texts()) == pytest.approx(wanted, abs=1e-5)
    # Ten tokens, of each of two models.
    assert held == [3, 3, 3, 1] * 2


def test_log_ratios_of_a_tree_are_asked_for_once(monkeypatch):
    tuned, base = (models.tiny("llama", "lm", seed=seed) for seed in (0, 1))
    scorer = load_scorer(tuned, kind="implicit", reference=base)
    judge, other = ScorerJudge(scorer), (9, *PROMPT)
    wanted = [ScorerJudge(scorer).judge([text])[0] for text in texts()]
    before = scorer.stats.rows_scored
    # Piece by piece, beside another prompt with the same responses.
    judge.judge([Judged(PROMPT, each[:2], finished=False) for each in RESPONSES])
    assert judge.judge(texts()) == pytest.approx(wanted, abs=1e-5)
    judge.judge([Judged(other, each, finished=False) for each in RESPONSES])
    assert judge.judge(texts()) == pytest.approx(wanted, abs=1e-5)
    # 5, 9, 11, EOS after each, and 8 four times with its EOS.
    assert scorer.stats.rows_scored - before == 2 * 10
    monkeypatch.setattr(response_ratios, "_MOST_KNOWN", 5)
    assert judge.judge(texts()) == pytest.approx(wanted, abs=1e-5)
    assert scorer.stats.rows_scored - before == 3 * 10
