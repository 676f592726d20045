"""The examples of ablations: read as they are, and run with a few prompts."""

import json
import re

import pytest
import yaml

from guided_decode.cli.ablate.reading import read_ablation
from tests import ROOT
from tests.cli.ablations import ablate

FOLDER = ROOT / "examples" / "ablations"
FILES = sorted(FOLDER.glob("*.yaml"))
_BLOCK = re.compile(r"^## The file\n.*?^```\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_is_read_as_it_is(file):
    text = file.read_text()
    # It says whose comparison it is.
    assert re.search(r"\(arXiv \d{4}\.\d{5}\)", text.partition("output:")[0])
    plan = ablate(file, "--dry-run").stdout
    assert "nothing was run" in plan
    given = yaml.safe_load(text)
    for method in given["methods"]:
        assert method.get("name", method["method"]) in plan


def test_the_documentation_has_all_of_them():
    page = (ROOT / "docs" / "ablate.md").read_text()
    assert set(re.findall(r"^\| `(\w+\.yaml)` \|", page, re.MULTILINE)) == {
        file.name for file in FILES
    }


def test_the_file_of_the_documentation_has_keys_that_there_are(tmp_path):
    (block,) = _BLOCK.findall((ROOT / "docs" / "ablate.md").read_text())
    (tmp_path / "page.yaml").write_text(block)
    found, problems = read_ablation(tmp_path / "page.yaml")
    assert problems == []
    assert len(found.methods) == 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_runs(file, tmp_path):
    ablate(file, "--output", tmp_path / "out", "--limit", 4)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    budgets = yaml.safe_load(file.read_text())["equal_cost"]["budgets"]
    assert {row["budget"] for row in summary["equal_cost"]} == set(budgets)
    assert all(row["prompts"] == 4 for row in summary["settings"])
    assert (tmp_path / "out" / "pareto_kl.svg").exists()
