"""What is finished before its turn: kept beside the output, whatever a kill left there."""

import json

import pytest

from guided_decode.cli.ahead_file import Ahead
from guided_decode.cli.search_rows import SearchRow
from tests.cli.search_runs import PROMPTS, search, write

RUN = "0123456789abcdef"
ROWS = [SearchRow(i, i + 1, f"line {i + 1}", f"key {i}") for i in range(3)]


def line(row):
    return row.line({"response": "é" * 30}, RUN)


@pytest.mark.parametrize("left", [1, 30, 80])
def test_a_line_after_half_a_line_is_found_again(tmp_path, left):
    output = tmp_path / "out.jsonl"
    ahead = Ahead(output, RUN)
    ahead.put(ROWS[0], line(ROWS[0]))
    path = tmp_path / "out.jsonl.ahead"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:left])
    ahead = Ahead(output, RUN)
    ahead.put(ROWS[1], line(ROWS[1]))
    ahead.put(ROWS[2], line(ROWS[2]))
    found = Ahead(output, RUN)
    assert [found.get(row) for row in ROWS] == [line(row) for row in ROWS]
    found.settle(ROWS)
    assert not path.exists()


def test_what_is_left_beside_a_whole_output_goes(tmp_path):
    source = write(tmp_path / "in.jsonl", [{"prompt": PROMPTS[0]}])
    output, path = tmp_path / "out.jsonl", tmp_path / "out.jsonl.ahead"
    words = ("--method", "vote", "--n", 1, "--max-new-tokens", 4, "--output", output, source)
    search(*words)
    done = output.read_bytes()
    # A kill between the output's last line and the end of the file beside it.
    path.write_text(json.dumps(json.loads(done)) + "\n")
    search(*words)
    assert output.read_bytes() == done
    assert not path.exists()
