"""The cells of `guided-decode ablate`: what is compared with what, and drawn from what."""

import json
import shutil

import pytest

from guided_decode import tiny_tulu
from guided_decode.cli import run_identity
from guided_decode.cli.ablate.cells import cells_of
from guided_decode.cli.ablate.models import Group, grouped
from guided_decode.cli.ablate.prompts import read_prompts
from guided_decode.cli.ablate.reading import read_ablation
from guided_decode.cli.ablate.run import Run
from guided_decode.lab.ablate.asked import Counts
from guided_decode.lab.ablate.grid import Unit
from guided_decode.search.budget import Spent
from guided_decode.search.requests import Judge, Judged, Next
from tests.cli.ablations import ablate, ablation, write


def read(path, **changed):
    """The cells and the prompts of an ablation."""
    found, problems = read_ablation(write(path / "small.yaml", ablation(**changed)))
    cells = cells_of(found, problems)
    assert not problems
    return cells, read_prompts(found.prompts)


def answer(answers, cell, rows):
    """The answers of a unit of these prompts, with seed 0."""
    return answers.answer(cell, Unit(cell.setting, 0, 0, len(rows), ""), rows)["answers"]


def answered(cell, rows):
    """The same, of models that are loaded for them."""
    with Group([cell], False).loaded() as answers:
        return answer(answers, cell, rows)


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


SCORERS = {
    "critic": "tiny-tulu-value",
    "implicit": {"model": "tiny-tulu-ppo", "kind": "implicit", "reference": "tiny-tulu-sft"},
}
GUIDES = [
    {"method": "guide", "beta": 10, "top_k": 3, "temperature": 0},
    {"method": "guide", "name": "kl", "beta": 10, "top_k": 3, "temperature": 0, "kl_coef": 0.1,
     "reference": "tiny-tulu-sft"},
]  # fmt: skip


@pytest.mark.parametrize("scorer", SCORERS)
def test_guidance_and_a_search_that_ask_the_same_cost_the_same(tmp_path, scorer, monkeypatch):
    scorers = {"critic": SCORERS[scorer]}
    cells, rows = read(tmp_path, methods=GUIDES, scorers=scorers, max_new_tokens=8)
    told = []
    taken = Counts.add

    def add(self, prefixes, candidates):
        told.append((self, [each.tokens.tolist() for each in prefixes],
                     None if candidates is None else candidates.tolist()))  # fmt: skip
        taken(self, prefixes, candidates)

    monkeypatch.setattr(Counts, "add", add)
    for cell in cells[1:]:
        with Group([cell], False).loaded() as answers:
            both = answer(answers, cell, rows[:2])
            (second,) = answer(answers, cell, rows[1:2])
            told.clear()
            (first,) = answer(answers, cell, rows[:1])
        # Whatever stands beside a prompt.
        assert [each["scorer_tokens"] for each in both] == [
            first["scorer_tokens"], second["scorer_tokens"]
        ]  # fmt: skip
        searched, referred = Spent(), Spent()
        for spent in (searched, referred):
            spent.begin()
        for _, (prefix,), asked in told:
            if asked is None:
                referred.continued(Next((tuple(prefix),), 1))
                continue
            texts = [Judged(tuple(prefix), (token,), False) for token in asked[0] if token >= 0]
            searched.judged(Judge(texts))
        assert first["scorer_tokens"] == searched.scorer_tokens > 8
        own = first["prompt_tokens"] + first["tokens"]
        assert first["policy_tokens"] == own + referred.policy_tokens
        assert bool(referred.policy_tokens) == (cell.setting.name == "kl")


@pytest.mark.parametrize("reference", [{}, {"reference": "tiny-tulu-ppo"}])
def test_a_grid_of_kl_terms_with_an_implicit_reward_is_searched(tmp_path, reference):
    mcts = {"method": "ppo-mcts", "simulations": 2, "k": 2, "kl_coef": [0.0, 0.1], **reference}
    cells, rows = read(
        tmp_path, methods=[mcts], scorers={"critic": SCORERS["implicit"]}, max_new_tokens=2
    )
    groups = grouped(cells[1:], raw=False)
    assert [len(group.cells) for group in groups] == [1, 1]
    for group, read_by_reference in zip(groups, (False, True), strict=True):
        with group.loaded() as answers:
            (found,) = answer(answers, group.first, rows[:1])
        # The KL term's reference counts with the policy's.
        assert (found["policy_tokens"] > found["scorer_tokens"]) == read_by_reference


def test_guides_kl_term_has_an_implicit_rewards_own_reference(tmp_path):
    found, problems = read_ablation(write(tmp_path / "small.yaml", ablation(
        methods=[{"method": "guide", "kl_coef": 0.1, "reference": "tiny-tulu-ppo"}],
        scorers={"critic": SCORERS["implicit"]},
    )))  # fmt: skip
    cells_of(found, problems)
    ((_, said),) = problems
    assert "critic is an implicit reward over tiny-tulu-sft, which guide has" in said


def test_what_ran_is_kept_whatever_becomes_of_the_file(tmp_path, monkeypatch):
    file = write(tmp_path / "small.yaml", ablation(methods=["plain"], max_new_tokens=2, seeds=[0]))
    before, find = file.read_bytes(), Run.find

    def changed(run):
        file.write_text("methods: []\n")
        find(run)

    monkeypatch.setattr(Run, "find", changed)
    ablate(file, "--output", tmp_path / "out", "--limit", 1, "--no-plots")
    assert (tmp_path / "out" / "config.yaml").read_bytes() == before
    about = json.loads((tmp_path / "out" / "summary.json").read_text())["about"]
    assert (about["limit"], about["prompts"]) == (1, 1)


def test_a_models_files_are_read_once_unless_they_change(tmp_path, monkeypatch):
    folder, read_files = tmp_path / "policy", []
    shutil.copytree(tiny_tulu.model_path("sft"), folder)
    whole = run_identity._of_file
    monkeypatch.setattr(
        run_identity, "_of_file", lambda path: read_files.append(path.name) or whole(path)
    )
    before = run_identity.fingerprint(str(folder))
    assert "model.safetensors" in read_files
    read_files.clear()
    assert run_identity.fingerprint(str(folder)) == before
    assert read_files == []
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert run_identity.fingerprint(str(folder)) != before
    assert read_files == ["config.json"]


def test_equal_cost_may_be_against_a_method_of_another_grid(tmp_path):
    cells, _ = read(
        tmp_path, methods=["vote"], equal_cost={"budgets": [2], "against": "best-of-n"}
    )  # fmt: skip
    assert [cell.setting.name for cell in cells] == ["plain", "vote"]
