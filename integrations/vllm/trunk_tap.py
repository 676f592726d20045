"""V(prefix) from the policy's own hidden states: a tap where vLLM computes its logits.

A head on the policy's trunk needs no second model: the hidden states from which a step's logits
come, after the final norm, are those that it reads. The tap keeps the last ones; the processor,
which vLLM calls with these logits, takes its rows from them. Hidden states of prompt
log-probabilities come between two steps and are never asked for.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from guided_decode.scoring.trunk_head import TrunkHead
from guided_decode.stats import ScorerStats

_ORIGINAL = "_guided_decode_original"


def check_fits(head: TrunkHead, name: str, text: Any, policy: str) -> None:
    """Raises ValueError: a head that was not trained on this policy's trunk.

    Args:
        head: as `read_trunk_head` gives it.
        name: its own, for the error.
        text: the policy's text config.
        policy: its name, for the error.
    """
    sizes = {
        "hidden_size": (head.hidden_size, text.hidden_size),
        "num_hidden_layers": (
            head.trunk and head.trunk.num_hidden_layers,
            getattr(text, "num_hidden_layers", None),
        ),
        "vocab_size": (head.trunk and head.trunk.vocab_size, text.vocab_size),
    }
    for field, (theirs, ours) in sizes.items():
        if theirs is not None and theirs != ours:
            raise ValueError(
                f"the head {name} was trained on a trunk with {field}={theirs}, but "
                f"{policy} has {ours}: pass the head of this policy"
            )


class TrunkTap:
    """The values of the rows whose logits were computed last."""

    def __init__(self, head: Callable[[Tensor], Tensor]) -> None:
        """head: values of hidden states, [rows, hidden] to float32 [rows]."""
        self.stats = ScorerStats()
        self.head = head
        self._hidden: Tensor | None = None

    def watch(self, model_class: Any) -> None:
        """Sees every call of the model class's `compute_logits(hidden_states, ...)`."""
        current = model_class.compute_logits
        # One tap sees, the last: an engine that was here before may have left its own.
        original = getattr(current, _ORIGINAL, current)

        @functools.wraps(original)
        def watched(model: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._hidden = hidden_states
            return original(model, hidden_states, *args, **kwargs)

        setattr(watched, _ORIGINAL, original)
        model_class.compute_logits = watched

    def values(self, rows: Sequence[int], of: int) -> list[float]:
        """V(prefix) of these rows of the step, which has `of` rows in all; until `forget`.

        Raises RuntimeError: the hidden states that were seen are not this step's.
        """
        hidden = self._hidden
        if hidden is None or len(hidden) != of:
            seen = "none" if hidden is None else f"{len(hidden)} rows"
            raise RuntimeError(
                f"of the policy's hidden states {seen} were seen, for logits of {of} rows: "
                "expected one a row; this model computes its logits in another way"
            )
        self.stats.add(rows_scored=len(rows))
        index = torch.tensor(list(rows)).to(hidden.device)
        return self.head(hidden[index]).tolist()

    def forget(self) -> None:
        """The step is over: what was seen is no other step's."""
        self._hidden = None
