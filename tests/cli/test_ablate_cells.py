"""The cells of `guided-decode ablate`: what is compared with what, and drawn from what."""

import json
import shutil

from guided_decode import tiny_tulu
from guided_decode.cli.ablate.cells import cells_of
from guided_decode.cli.ablate.models import Group
from guided_decode.cli.ablate.prompts import read_prompts
from guided_decode.cli.ablate.reading import read_ablation
from guided_decode.lab.ablate.grid import Unit
from tests.cli.ablations import ablation, write


def read(path, **changed):
    """The cells and the prompts of an ablation."""
    found, problems = read_ablation(write(path / "small.yaml", ablation(**changed)))
    cells = cells_of(found, problems)
    assert not problems
    return cells, read_prompts(found.prompts)


def answered(cell, rows):
    """The answers of a unit of these prompts, with seed 0."""
    with Group([cell], False).loaded() as answers:
        unit = Unit(cell.setting, 0, 0, len(rows), "")
        return answers.answer(cell, unit, rows)["answers"]


def test_shorter_responses_are_not_what_all_is_compared_with(tmp_path):
    short = {"method": "plain", "name": "short", "max_new_tokens": 4}
    cells, _ = read(tmp_path, methods=[short])
    assert [(c.setting.name, c.setting.is_plain, c.plan.max_tokens) for c in cells] == [
        ("plain", True, 56), ("short", False, 4)
    ]  # fmt: skip
    as_long = {"method": "plain", "name": "whole", "max_new_tokens": 56}
    cells, _ = read(tmp_path, methods=[as_long])
    assert [(c.setting.name, c.setting.is_plain) for c in cells] == [("whole", True)]


def test_what_a_checkpoint_asks_generate_for_reshapes_nothing(tmp_path):
    policy = tmp_path / "policy"
    shutil.copytree(tiny_tulu.model_path("sft"), policy)
    file = policy / "generation_config.json"
    own = json.loads(file.read_text()) if file.exists() else {"eos_token_id": 1}
    greedy = {"method": "plain", "name": "greedy", "temperature": 0}
    (_, cell), rows = read(tmp_path, methods=[greedy], policies={"sft": str(policy)})
    plain = answered(cell, rows[:2])
    penalties = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "suppress_tokens": [30, 31],
                 "min_new_tokens": 50}  # fmt: skip
    file.write_text(json.dumps(own | penalties))
    assert answered(cell, rows[:2]) == plain
