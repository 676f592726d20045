"""The notebook: what it shows is what it does, and nothing of the machine that ran it."""

import json
import re
from importlib.util import find_spec

import pytest

from tests import PATIENCE, ROOT

TOUR = ROOT / "examples" / "tour.ipynb"
_NUMBER = re.compile(r"\d+(\.\d+)?")


def printed(notebook):
    """What each code cell prints, and the kinds of the rest."""
    shown = []
    for cell in notebook["cells"]:
        for one in cell.get("outputs", []):
            text = one.get("text")
            shown.append("".join(text) if text is not None else sorted(one["data"]))
    return shown


def test_it_was_run_from_the_top_and_says_nothing_of_a_machine():
    text = TOUR.read_text()
    notebook = json.loads(text)
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert "stderr" not in {o.get("name") for c in notebook["cells"] for o in c.get("outputs", [])}
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)
    assert len(text) < 100_000


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(find_spec, ("nbclient", "ipykernel", "nbformat", "matplotlib"))),
    reason="needs the extras docs and plots",
)
@pytest.mark.timeout(PATIENCE)
def test_a_run_shows_what_is_stored(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from run_notebook import run

    stored, found = (printed(each) for each in (json.loads(TOUR.read_text()), run(TOUR)))
    assert len(stored) == len(found)
    for before, now in zip(stored, found, strict=True):
        if isinstance(before, list):
            assert now == before
            continue
        # Figures may differ in their last digit on another processor.
        assert _NUMBER.sub("N", now) == _NUMBER.sub("N", before)
        first, second = ([float(m[0]) for m in _NUMBER.finditer(each)] for each in (before, now))
        assert second == pytest.approx(first, rel=0.1, abs=0.02)
