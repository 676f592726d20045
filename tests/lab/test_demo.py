"""The demo, small: its figures are those of the answers that it decoded."""

import io
import json
import runpy
import sys

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from guided_decode import tiny_tulu
from guided_decode.cli.app import app
from guided_decode.cli.demo import _draw
from guided_decode.cli.demo_families import FAMILIES
from guided_decode.lab.demo.decoding import answer, draw, pick, prompt_ids
from guided_decode.lab.demo.measure import Outcome, compare, steps
from guided_decode.lab.demo.methods import METHODS, Method
from guided_decode.lab.demo.report import as_dict, conclusions, table
from tests import ROOT

MESSAGES = tiny_tulu.validation_prompts(12)


@pytest.fixture(scope="module")
def models():
    return {name: own.models for name, own in FAMILIES["tiny-tulu"].load().items()}


@pytest.fixture(scope="module")
def outcomes(models):
    with torch.no_grad():
        return compare("SFT", models["SFT"], MESSAGES, batch_size=8, seed=3)


def named(outcomes, name, label=None):
    return next(
        o for o in outcomes if o.method.name == name and label in (None, o.method.label)
    )  # fmt: skip


def test_every_method_answers_every_prompt(outcomes):
    assert [o.method for o in outcomes[: len(METHODS)]] == list(METHODS)
    assert all(o.messages == MESSAGES and len(o.texts) == len(MESSAGES) for o in outcomes)


def test_guidance_answers_what_the_policy_gets_wrong(outcomes):
    plain = named(outcomes, "plain, sampled")
    for name in ("guided, reweight", "guided, reweight, gated", "guided, prune"):
        assert named(outcomes, name).score >= plain.score + 0.2
    assert named(outcomes, "guided, greedy").score > named(outcomes, "plain, greedy").score


def test_accuracy_counts_right_answers(outcomes):
    one = named(outcomes, "plain, sampled")
    right = sum(tiny_tulu.is_correct(m, t) for m, t in zip(MESSAGES, one.texts, strict=True))
    assert 0 < right < len(MESSAGES)
    assert one.score == right / len(MESSAGES)
    assert one.interval[0] < one.score < one.interval[1]


def test_tokens_are_counted_to_the_last_one(models, outcomes):
    prompts = sum(map(len, prompt_ids(models["SFT"], MESSAGES)))
    for outcome in outcomes:
        if outcome.method.best_of == 1:
            responses = sum(len(response) - 1 for response in outcome.responses)
            assert outcome.policy_tokens == prompts + responses
    assert named(outcomes, "plain, greedy").scorer_tokens == 0
    # The critic reads each prompt and response but its EOS; and three other candidates a step,
    # unless a step has a terminal among its candidates.
    guided = named(outcomes, "guided, greedy")
    read = prompts + sum(len(response) - 1 for response in guided.responses)
    steps = sum(map(len, guided.responses))
    assert read + 2.5 * steps < guided.scorer_tokens <= read + 4 * steps
    gated = named(outcomes, "guided, reweight, gated")
    assert gated.scorer_tokens < guided.scorer_tokens / 3


def test_best_of_n_pays_for_all_samples_and_its_ranking(models):
    family, messages = models["SFT"], MESSAGES[:3]
    torch.manual_seed(0)
    samples = draw(family, messages, 4)
    family.critic.cache.clear()
    answers = pick(family, messages, samples)
    prompts = prompt_ids(family, messages)
    forwarded = sum(len(sample) - 1 for own in samples for sample in own)
    assert answers.policy_tokens == sum(map(len, prompts)) + forwarded
    # Ranking reads each distinct token once.
    distinct = {
        (i, *(prompt + sample)[: end + 1])
        for i, (prompt, own) in enumerate(zip(prompts, samples, strict=True))
        for sample in own
        for end in range(len(prompt) + len(sample) - 1)
    }
    shared = {key[1:] for key in distinct}
    assert answers.scorer_tokens == len(shared)


def test_best_of_n_takes_the_sample_that_the_critic_values_most(models):
    family, messages = models["SFT"], MESSAGES[:4]
    torch.manual_seed(0)
    samples = draw(family, messages, 4)
    answers = pick(family, messages, samples)
    for prompt, own, chosen in zip(
        prompt_ids(family, messages), samples, answers.responses, strict=True
    ):
        rows = [prompt + sample[:-1] for sample in own]
        values = family.critic.score(rows, torch.empty(4, 0, dtype=torch.int64)).baseline
        assert chosen == own[int(values.argmax())]
    cut = [[own[int(i == j)][:9] if i == 0 else own[i] for i in range(4)]
           for j, own in enumerate(samples)]  # fmt: skip
    unfinished = pick(family, messages, cut).responses
    assert all(response[-1] == family.tokenizer.eos_token_id for response in unfinished)


def test_kl_is_zero_for_the_policy_itself_and_counts_every_token(models, outcomes):
    assert named(outcomes, "plain, sampled").kl_per_token == 0.0
    greedy = named(outcomes, "plain, greedy")
    family = models["SFT"]
    total = 0.0
    for prompt, response in zip(prompt_ids(family, MESSAGES), greedy.responses, strict=True):
        logits = family.policy(input_ids=torch.tensor([prompt + response])).logits[0]
        log_p = logits[len(prompt) - 1 : -1].log_softmax(-1)
        total -= log_p.gather(-1, torch.tensor(response)[:, None]).sum().item()
    assert greedy.kl == pytest.approx(total, rel=1e-3)


def test_batches_and_repeats_change_no_greedy_answer(models, outcomes):
    for method in METHODS:
        if not method.sample:
            alone = [answer(models["SFT"], [message], method).texts[0] for message in MESSAGES[:3]]
            assert alone == named(outcomes, method.name).texts[:3]


@pytest.mark.slow
def test_progress_reaches_its_total(models):
    calls, names = [], []
    compare("SFT", models["SFT"], MESSAGES[:3], batch_size=2, seed=0,
            begin=names.append, advance=lambda: calls.append(1))  # fmt: skip
    assert len(calls) == steps(3, 2)
    assert names[0] == "SFT: plain, greedy"


def test_conclusions_say_which_way_it_came_out():
    def outcome(curve, best_of, text, tokens):
        made = Outcome("SFT", Method("m", curve, best_of=best_of))
        made.messages, made.texts, made.responses = ["What is 1000 + 1000?"], [text], [[1]]
        made.policy_tokens = tokens
        return made

    right, wrong = "Answer: 2000", "Answer: 1000"
    (sentence,) = conclusions([outcome("b", 8, right, 500), outcome("gated", 1, wrong, 1000)])
    assert "a gate, 0% right for 1000 tokens" in sentence
    assert "best of 8, 100% for 500 (0.5 times as many)" in sentence


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits_the_terminal_and_has_every_method(outcomes, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table(outcomes))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    for method in METHODS:
        (line,) = [line for line in lines if line.strip().startswith(f"{method.name} ")]
        assert f"{named(outcomes, method.name).score:.0%}" in line


def test_the_demo_prints_table_example_and_picture(tmp_path, monkeypatch):
    # Too narrow for the table, which loses nothing; and a name without a suffix is a PNG's.
    monkeypatch.setenv("COLUMNS", "20")
    plot = tmp_path / "demo.png"
    result = CliRunner().invoke(app, ["demo", "--prompts", "2", "--plot", str(tmp_path / "demo")])
    assert result.exit_code == 0, result.output
    assert "…" not in result.stdout
    assert str(plot) in "".join(result.stderr.split())
    assert max(map(len, result.stdout.splitlines())) <= 80
    for words in ("SFT policy", "PPO policy", "first prompt that they answer differently"):
        assert words in " ".join(result.stdout.split())
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_demo_says_how_to_get_it(outcomes, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _draw(outcomes, None, FAMILIES["tiny-tulu"].plot)
    assert "pip install 'guided-decode[plots]'" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_the_example_of_generate_runs(capsys):
    path = ROOT / "examples" / "hf_generate.py"
    runpy.run_path(str(path), run_name="__main__")
    plain, guided = capsys.readouterr().out.split("\nguided\n")[:2]
    assert "Answer: 10211" not in plain
    assert guided.splitlines()[4] == "Answer: 10211"


def test_json_has_the_figures_of_the_table(outcomes):
    figures = json.loads(json.dumps(as_dict(named(outcomes, "best of 8 by critic"))))
    assert figures["kl_is_bound"]
    assert figures["answers"] == len(MESSAGES)
    assert figures["policy_tokens"] > 8 * 40
