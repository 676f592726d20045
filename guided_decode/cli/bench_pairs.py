"""RewardBench's rows: which are taken, and what a scorer says of their responses."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from guided_decode.cli.chat_rows import Messages
from guided_decode.cli.chats import end_of_response, response_ids
from guided_decode.cli.errors import Refusal
from guided_decode.cli.score_rows import Row, read_rows
from guided_decode.cli.token_values import finite, last_value, rounded, token_values
from guided_decode.lab.rewardbench.outcome import FRACTIONS, Pair
from guided_decode.lab.rewardbench.protocol import PRIOR_SETS, SUBSETS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from guided_decode.scorer import Scorer

Read = Literal["eos", "last"]
# The data set's columns beside prompt, chosen and rejected.
_COLUMNS = ("subset", "id", "chosen_model", "rejected_model")
_SIDES = ("chosen", "rejected")


def read_pairs(source: Path, *, partial: bool) -> list[Row]:
    """All pairs of a file.

    partial: it may lack subsets, or pairs of them.

    Raises Refusal: a line that is no pair of the data set, by its number; pairs that are missing.
    OSError: it cannot be read.
    """
    rows = read_rows(source, skip=False)
    for row in rows:
        _check(row)
    if not partial:
        _check_whole(Counter(row.passed["subset"] for row in rows), source)
    return rows


def as_pairs(lines: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """The pairs of a run's output lines."""
    return [
        Pair(
            line["subset"],
            *(line[side]["score"] for side in _SIDES),
            *(line[side]["prefixes"] for side in _SIDES),
        )
        for line in lines
    ]


def _check(row: Row) -> None:
    unknown = [name for name in row.passed if name not in _COLUMNS]
    if unknown:
        raise Refusal(f"{row.where}: unknown column {unknown[0]}: expected prompt, chosen, "
                      f"rejected, {', '.join(_COLUMNS)}")  # fmt: skip
    if tuple(each.field for each in row.responses) != _SIDES or len(row.chats) != 2:
        raise Refusal(f"{row.where}: expected a pair: prompt, chosen and rejected")
    if (subset := row.passed.get("subset")) not in SUBSETS:
        raise Refusal(f"{row.where}: unknown subset {subset!r}: expected one of "
                      f"{', '.join(SUBSETS)}")  # fmt: skip


def _check_whole(found: Mapping[str, int], source: Path) -> None:
    wanted = [
        subset
        for subset in SUBSETS.values()
        if subset.section != PRIOR_SETS or subset.name in found
    ]
    wrong = [
        f"{subset.name} has {found.get(subset.name, 0)} of {subset.pairs}"
        for subset in wanted
        if found.get(subset.name, 0) != subset.pairs
    ]
    if wrong:
        more = f", and {len(wrong) - 3} more subsets" if len(wrong) > 3 else ""
        raise Refusal(f"{source} is not the whole data set: {', '.join(wrong[:3])} pairs{more}; "
                      "pass --partial to count what is there")  # fmt: skip


@dataclass(frozen=True, slots=True)
class PairReader:
    """How the responses of pairs are read.

    prompt_format: as `chats.prompt_ids` takes it. read: at EOS, or at the last token of the turn as
    the format ends it. max_length: tokens; what is longer loses its beginning, but not its BOS.
    """

    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    prompt_format: str | None
    read: Read
    max_length: int

    def answer(self, chats: Sequence[Messages]) -> list[dict[str, Any]]:
        """{"score", "prefixes"} of each conversation.

        prefixes: the value after each of FRACTIONS of the response's tokens, EOS among them; of an
        implicit reward, its sum so far.

        Raises Refusal or ValueError: one of them cannot be scored.
        """
        import torch

        pairs = [self._ids(chat) for chat in chats]
        # One packed forward for all; the values of single tokens are in the cache by then.
        nothing = torch.empty(len(pairs), 0, dtype=torch.int64)
        self.scorer.score([(prompt + response)[:-1] for prompt, response in pairs], nothing)
        return [self._answer(prompt, response) for prompt, response in pairs]

    def _ids(self, chat: Messages) -> tuple[list[int], list[int]]:
        prompt, response = response_ids(
            self.tokenizer, self.prompt_format, chat, whole_turn=self.read == "last"
        )
        lead = prompt[:1] if prompt[:1] == [self.tokenizer.bos_token_id] else []
        room = self.max_length - len(lead)
        rest = prompt[len(lead) :]
        if len(rest) + len(response) <= room:
            return prompt, response
        rest = rest[max(0, len(rest) + len(response) - room) :]
        kept = response[max(0, len(response) - room) :]
        # Something has to come before the first token that is scored.
        return (lead + rest, kept) if lead or rest else (kept[:1], kept[1:])

    def _answer(self, prompt: list[int], response: list[int]) -> dict[str, Any]:
        ends = [t for t in (self.scorer.eos_token_id, self.tokenizer.eos_token_id) if t is not None]
        values = token_values(self.scorer, prompt, response, sorted(set(ends)))
        end = end_of_response(response, self.tokenizer.eos_token_id)
        prefixes = [self._after(prompt, values[: math.ceil(part * end)]) for part in FRACTIONS]
        return {
            "score": rounded(finite(self._after(prompt, values))),
            "prefixes": [rounded(finite(value)) for value in prefixes],
        }

    def _after(self, prompt: list[int], values: Sequence[float | None]) -> float:
        """What the scorer says of a response that has these values so far."""
        if self.scorer.terminal == "included":
            return sum(value for value in values if value is not None)
        if (last := last_value(values)) is not None:
            return last
        import torch

        nothing = torch.empty(1, 0, dtype=torch.int64)
        return self.scorer.score([prompt], nothing).baseline.item()
