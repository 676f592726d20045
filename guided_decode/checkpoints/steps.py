"""Steps of a response, as process reward models were trained to read them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from guided_decode.scoring.step_scorer import Aggregate, StepRow


@dataclass(frozen=True, slots=True)
class StepFormat:
    """How a family of process reward models reads a response's steps.

    separator: what ends a step in a policy's response.
    mark: the text after a step; its reward is read at the mark's last token.
    mark_token: the token that this one has to be; None: whatever the tokenizer makes of it.
    between: the text between a mark and the next step.
    whole: prompt, steps and marks are tokenised as one text; else each by itself.
    empty: empty steps have rewards of their own, but for one at the end.
    label_tokens: where the reward is read off the language-model head, the tokens of a bad and of
        a good step.
    aggregate: how its authors make one value of the steps' rewards.
    """

    name: str
    separator: str
    mark: str
    aggregate: Aggregate
    mark_token: str | None = None
    between: str = ""
    whole: bool = True
    empty: bool = False
    label_tokens: tuple[str, str] | None = None

    def split(self, response: str) -> list[str]:
        """The steps of a response, whole or partial; at least one, which may be empty.

        A mark in it ends a step, as a separator does: policies may have been trained to write it.
        """
        if self.mark.strip():
            whole_word = r"(?!\w)" if self.mark[-1].isalnum() else ""
            response = re.sub(re.escape(self.mark) + whole_word, self.separator, response)
        steps = response.split(self.separator)
        if not steps[-1].strip():
            steps.pop()
        return [step for step in steps if step or self.empty] or [""]


_RECORDS = (
    # The card of Qwen2.5-Math-PRM; the product: arXiv 2501.07301, best-of-n.
    StepFormat(
        name="extra-0", separator="\n\n", mark="<extra_0>", mark_token="<extra_0>",
        aggregate="product",
    ),
    # skywork-o1-prm-inference, prepare_input.
    StepFormat(
        name="newline", separator="\n", mark="\n", whole=False, empty=True, aggregate="mean",
    ),
    # The card of math-shepherd-mistral-7b-prm; the minimum: arXiv 2312.08935, section 3.4.
    StepFormat(
        name="math-shepherd", separator="\n", mark=" ки", mark_token="▁ки", between="\n",
        label_tokens=("▁-", "▁+"), aggregate="min",
    ),
)  # fmt: skip

STEP_FORMATS: dict[str, StepFormat] = {record.name: record for record in _RECORDS}
# By the endings of class names that only one trainer writes.
BY_CLASS = {"Qwen2ForProcessRewardModel": "extra-0", "Qwen2ForPrmModel": "newline"}


def find_steps(name: str) -> StepFormat:
    """The step format of that name. Raises ValueError for an unknown one."""
    if name not in STEP_FORMATS:
        raise ValueError(f"steps={name!r}: expected one of {', '.join(STEP_FORMATS)}")
    return STEP_FORMATS[name]


def token_ids(tokenizer: PreTrainedTokenizerBase, tokens: tuple[str, ...], name: str) -> list[int]:
    """The ids of single tokens. Raises ValueError: the tokenizer of `name` has no such token."""
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in tokens if token not in vocabulary]
    if missing:
        raise ValueError(
            f"the tokenizer of {name} has no token {missing[0]!r}, at which its steps are read: "
            "expected the one that it was trained with; pass another steps="
        )
    return [vocabulary[token] for token in tokens]


def step_reader(
    tokenizer: PreTrainedTokenizerBase, steps: StepFormat, name: str, *, bos: bool
) -> Callable[[str, str], StepRow]:
    """What makes token ids and marks of a prompt's text and a response's.

    bos: whether the text begins with the tokenizer's BOS, where it has one.

    Raises ValueError: the tokenizer of `name` lacks the mark.
    """
    mark_id = (
        None if steps.mark_token is None else token_ids(tokenizer, (steps.mark_token,), name)[0]
    )
    lead = [tokenizer.bos_token_id] if bos and tokenizer.bos_token_id is not None else []

    def encoded(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    def pieces(prompt: str, parts: list[str]) -> StepRow:
        ids, marks = lead + encoded(prompt), []
        for i, step in enumerate(parts):
            ids += encoded(steps.between) if i else []
            # As its code has it: the last of the ids of the mark.
            ids += [*encoded(step), encoded(steps.mark)[-1]]
            marks.append(len(ids) - 1)
        return StepRow(ids, marks)

    def whole(prompt: str, parts: list[str]) -> StepRow:
        text = prompt + steps.between.join(step + steps.mark for step in parts)
        ids = lead + encoded(text)
        found = [i for i, token in enumerate(ids) if token == mark_id]
        # A question may have the mark in it.
        asked = sum(token == mark_id for token in encoded(prompt))
        if len(found) - asked != len(parts):
            raise ValueError(
                f"the tokenizer of {name} reads {len(found) - asked} marks {steps.mark!r} of "
                f"{len(parts)} steps in {text[-80:]!r}: expected one token for each; pass another "
                "steps="
            )
        return StepRow(ids, found[asked:])

    read = whole if steps.whole else pieces
    return lambda prompt, response: read(prompt, steps.split(response))
