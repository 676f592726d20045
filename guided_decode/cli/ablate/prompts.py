"""The prompts of an ablation: lines of a file, or the embedded tasks' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guided_decode.cli.ablate.rewards import NumericKey, rollout_row
from guided_decode.cli.ablate.schema import Prompts, Reward
from guided_decode.cli.errors import Refusal
from guided_decode.cli.run_identity import digest
from guided_decode.cli.search_rows import SearchRow, read_search_rows
from guided_decode.cli.yaml_lines import Problems

_NEED_A_KEY = ("exact", "numeric", "math-verify")
_MOST_SAID = 3
# A response of which the line's own answer is all that is looked at.
_NOTHING = {"text": "", "ended": None}


def read_prompts(prompts: Prompts) -> list[SearchRow]:
    """All that are asked for. Raises Refusal: none, or a broken one. OSError: it cannot be read."""
    given = prompts.given
    rows = _embedded(given) if given.get("embedded") else _of_file(Path(given["file"]))
    first, most = given.get("skip") or 0, given.get("limit")
    rows = rows[first : None if most is None else first + most]
    if not rows:
        raise Refusal(f"prompts: none after skip {first}: expected at least one")
    return rows


def _of_file(file: Path) -> list[SearchRow]:
    if not file.is_file():
        raise Refusal(f"prompts: file: {file}: no such file")
    return read_search_rows(file, None, skip=False)


def _embedded(given: Any) -> list[SearchRow]:
    from guided_decode import tiny_tulu
    from guided_decode.tiny_tulu import lists

    sums = given["embedded"] == "tiny-tulu"
    task: Any = tiny_tulu if sums else lists
    held_out = given.get("split") != "validation"
    messages = task.held_out_prompts() if held_out else task.validation_prompts()
    rows = []
    for i, text in enumerate(messages):
        own = {"answer": str(sum(tiny_tulu.operands(text)))} if sums else {}
        chat = [{"role": "user", "content": text}]
        rows.append(SearchRow(i, i + 1, f"{given['embedded']}, prompt {i + 1}", digest(text), own,
                              chat))  # fmt: skip
    return rows


def check_answers(rows: list[SearchRow], reward: Reward, line: int, problems: Problems) -> None:
    """Adds a problem where a reward needs each line's right answer, and some have none."""
    field = reward.given.get("field") or "answer"
    placed = reward.kind == "regex" and "{answer}" in str(reward.given.get("pattern"))
    if reward.kind not in _NEED_A_KEY and not placed:
        return
    lacking = [row.where for row in rows if not is_key(row.passed.get(field))]
    if lacking:
        rest = len(lacking) - _MOST_SAID
        where = ", ".join(lacking[:_MOST_SAID]) + (f" and {rest} more" if rest > 0 else "")
        problems.append((line, f"reward: kind {reward.kind} compares with the field {field}, which "
                         f"is no text or number in {where}"))  # fmt: skip
    elif isinstance(reward.judge, NumericKey):
        try:
            reward.judge.rewards([rollout_row(row, reward, _NOTHING) for row in rows])
        except Refusal as error:
            problems.append((line, f"reward: {error}"))


def is_key(value: Any) -> bool:
    """Whether a value is an answer that responses can be compared with."""
    return isinstance(value, (str, int, float)) and not isinstance(value, bool) and value != ""
