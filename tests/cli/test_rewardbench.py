"""`guided-decode rewardbench`: where responses are read, and which files are refused."""

import json
import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    LlamaForSequenceClassification,
)
from typer.testing import CliRunner

from guided_decode import tiny_tulu
from guided_decode.checkpoints.prompts import tokenise
from guided_decode.cli.app import app
from guided_decode.lab.rewardbench.protocol import PRIOR_SETS, SUBSETS
from tests.cli.test_score import read, reward_model, tokenizer, write

TINY_VALUE = ("--model", "tiny-tulu-value")


def pairs(n):
    """Right sums against sums whose last digit is wrong."""
    prompts = tiny_tulu.held_out_prompts(n)
    answers = [tiny_tulu.worked_answer(*tiny_tulu.operands(prompt)) for prompt in prompts]
    return [
        {"prompt": prompt, "chosen": right, "rejected": right[:-1] + str((int(right[-1]) + 3) % 10),
         "subset": "math-prm", "id": i, "chosen_model": "a", "rejected_model": "b"}
        for i, (prompt, right) in enumerate(zip(prompts, answers, strict=True))
    ]  # fmt: skip


def bench(*args, code=0):
    result = CliRunner().invoke(app, ["rewardbench", *map(str, args)])
    assert result.exit_code == code, result.output
    return result


def chat(pair, side):
    return [
        {"role": "user", "content": pair["prompt"]},
        {"role": "assistant", "content": pair[side]},
    ]


def prompt_length(pair, prompt_format):
    return len(tokenise(tokenizer(), chat(pair, "chosen")[:1], prompt_format,
                        add_generation_prompt=True))  # fmt: skip


def hidden_scores(model, ids):
    """The reward after each token, by the stock forward."""
    hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return model.score(hidden)[:, 0]


@pytest.mark.parametrize(("where", "end"), [("eos", "eos"), ("last", "turn"), (None, "turn")])
@torch.inference_mode()
def test_a_reward_model_is_read_where_it_is_asked_for(tmp_path, where, end):
    given = pairs(5)
    data, output = write(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl"
    asked = () if where is None else ("--read", where)
    bench("--model", reward_model(), "--data", data, "--output", output, "--partial",
          "--prompt-format", "tulu-2", *asked)  # fmt: skip
    model = LlamaForSequenceClassification.from_pretrained(reward_model())
    for pair, line in zip(given, read(output), strict=True):
        assert (line["subset"], line["id"], line["chosen_model"]) == ("math-prm", pair["id"], "a")
        for side in ("chosen", "rejected"):
            whole = tokenise(tokenizer(), chat(pair, side), "tulu-2", end=end)
            scores = hidden_scores(model, whole)
            assert line[side]["score"] == pytest.approx(scores[-1].item(), abs=1e-4)
            start = prompt_length(pair, "tulu-2")
            response = scores[start:][: whole[start:].index(tokenizer().eos_token_id) + 1]
            at = [math.ceil(part * len(response)) - 1 for part in (0.25, 0.5, 0.75, 1)]
            assert line[side]["prefixes"] == pytest.approx(response[at].tolist(), abs=1e-4)


@torch.inference_mode()
def test_a_critic_is_read_at_the_last_token_before_eos(tmp_path):
    given = pairs(3)
    data, output = write(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl"
    bench(*TINY_VALUE, "--data", data, "--output", output, "--partial")
    critic = AutoModelForTokenClassification.from_pretrained(tiny_tulu.model_path("value"))
    for pair, line in zip(given, read(output), strict=True):
        ids = tokenise(tokenizer(), chat(pair, "chosen"), "tulu-3", end="open")
        value = critic(input_ids=torch.tensor([ids])).logits[0, -1, 0].item()
        assert line["chosen"]["score"] == pytest.approx(value, abs=1e-5)
        assert line["chosen"]["prefixes"][-1] == line["chosen"]["score"]


@torch.inference_mode()
def test_an_implicit_reward_is_summed(tmp_path):
    given = pairs(3)
    data, output = write(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl"
    bench("--model", "tiny-tulu-ppo", "--data", data, "--output", output, "--partial")
    models = [AutoModelForCausalLM.from_pretrained(tiny_tulu.model_path(one)) for one in
              ("ppo", "sft")]  # fmt: skip
    for pair, line in zip(given, read(output), strict=True):
        ids = torch.tensor([tokenise(tokenizer(), chat(pair, "rejected"), "tulu-3", end="eos")])
        tuned, base = (
            model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
            for model in models
        )
        ratios = (tuned - base)[prompt_length(pair, "tulu-3") - 1 :, 0]
        sums = ratios.cumsum(0)
        at = [math.ceil(part * len(sums)) - 1 for part in (0.25, 0.5, 0.75, 1)]
        assert line["rejected"]["prefixes"] == pytest.approx(sums[at].tolist(), abs=1e-3)
        assert line["rejected"]["score"] == pytest.approx(sums[-1].item(), abs=1e-3)


@pytest.mark.parametrize("prompt_format", ["tulu-2", "tulu-3"])
@torch.inference_mode()
def test_what_is_too_long_loses_its_beginning_but_not_its_bos(tmp_path, prompt_format):
    given, most = pairs(4), 14
    data, output = write(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl"
    bench("--model", reward_model(), "--data", data, "--output", output, "--partial",
          "--max-length", most, "--prompt-format", prompt_format)  # fmt: skip
    model = LlamaForSequenceClassification.from_pretrained(reward_model())
    for pair, line in zip(given, read(output), strict=True):
        whole = tokenise(tokenizer(), chat(pair, "chosen"), prompt_format)
        assert len(whole) > most
        lead = whole[:1] if prompt_format == "tulu-2" else []
        cut = [*lead, *whole[-(most - len(lead)) :]]
        expected = hidden_scores(model, cut)[-1].item()
        assert line["chosen"]["score"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_the_whole_data_set_is_counted_and_a_run_goes_on(tmp_path):
    fewer = pairs(40)
    given = [
        fewer[i % 40] | {"subset": subset.name}
        for subset in SUBSETS.values() if subset.section != PRIOR_SETS
        for i in range(subset.pairs)
    ]  # fmt: skip
    assert len(given) == 2985
    data, output = write(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl"
    asked = (*TINY_VALUE, "--data", data, "--output", output)
    found = json.loads(bench(*asked, "--json", "--batch-size", "64").stdout)
    whole = output.read_bytes()
    wins = {name: [] for name in found["subsets"]}
    for line in map(json.loads, whole.splitlines()):
        wins[line["subset"]].append(line["chosen"]["score"] > line["rejected"]["score"])
    assert {name: one["won"] for name, one in found["subsets"].items()} == {
        name: sum(won) for name, won in wins.items()
    }
    assert found["model_card"] == pytest.approx(sum(found["sections"].values()) / 4)
    assert found["leaderboard"] is None
    # Killed in the middle of a line, it goes on; another batch size changes nothing.
    kept = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(kept[:2900]) + kept[2900][:20])
    table = bench(*asked, "--batch-size", "7", "--plot", tmp_path / "picture").stdout
    again = output.read_bytes().splitlines(keepends=True)
    assert again[:2900] == kept[:2900]
    for line, before in zip(map(json.loads, again), map(json.loads, kept), strict=True):
        assert line["chosen"]["prefixes"] == pytest.approx(before["chosen"]["prefixes"], abs=1e-4)
        assert (line["key"], line["run"]) == (before["key"], before["run"])
    assert f"model cards): {found['model_card']:.1%}" in table
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_lines_are_those_of_the_file_alone(tmp_path):
    given = [pair | {"id": f"a\u2028{pair['id']}\x85"} for pair in pairs(2)]
    data = write(tmp_path / "in.jsonl", given)
    found = json.loads(bench(*TINY_VALUE, "--data", data, "--partial", "--json").stdout)
    assert found["subsets"]["math-prm"]["pairs"] == 2


GOOD = {"prompt": "2+2?", "chosen": "4", "rejected": "5", "subset": "hep-go", "id": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (GOOD | {"margin": 2}, "unknown column margin: expected prompt, chosen, rejected, subset"),
        (GOOD | {"subset": "hep-perl"}, "unknown subset 'hep-perl': expected one of alpacaeval-"),
        ({k: v for k, v in GOOD.items() if k != "subset"}, "unknown subset None"),
        ({"prompt": "2+2?", "response": "4", "subset": "hep-go"}, "expected a pair"),
        (GOOD | {"chosen": ["4", "four"]}, "expected a pair"),
        ("{broken", "not JSON"),
    ],
)
def test_a_line_that_is_no_pair_is_refused_by_its_number(tmp_path, row, message):
    lines = [json.dumps(GOOD), row if isinstance(row, str) else json.dumps(row)]
    data = tmp_path / "in.jsonl"
    data.write_text("".join(line + "\n" for line in lines))
    error = bench(*TINY_VALUE, "--data", data, "--partial", code=2).stderr
    assert error.startswith(f"error: {data}, line 2: ")
    assert message in error


def test_missing_subsets_and_pairs_are_named(tmp_path):
    data = write(tmp_path / "in.jsonl", [GOOD])
    error = bench(*TINY_VALUE, "--data", data, code=2).stderr
    assert "is not the whole data set: alpacaeval-easy has 0 of 100" in error
    assert "and 20 more subsets; pass --partial" in error
    data = write(tmp_path / "in.jsonl", [GOOD, GOOD | {"subset": "shp"}])
    assert "and 21 more subsets" in bench(*TINY_VALUE, "--data", data, code=2).stderr


def test_the_output_of_another_reading_is_not_continued(tmp_path):
    data, output = write(tmp_path / "in.jsonl", pairs(2)), tmp_path / "out.jsonl"
    asked = (*TINY_VALUE, "--data", data, "--output", output, "--partial")
    bench(*asked)
    assert "with other settings" in bench(*asked, "--max-length", 100, code=2).stderr
    bench(*asked, "--max-length", 100, "--overwrite")
