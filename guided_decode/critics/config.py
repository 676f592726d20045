"""The settings of a critic's training: one frozen record, validated once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

Mode = Literal["full", "lora", "head"]
Target = Literal["outcome", "td", "scores"]
Loss = Literal["squared", "cross-entropy"]

MODES: tuple[Mode, ...] = ("full", "lora", "head")
TARGETS: tuple[Target, ...] = ("outcome", "td", "scores")
LOSSES: tuple[Loss, ...] = ("squared", "cross-entropy")
# Where nothing is said: epochs, rollouts a step, learning rate.
_BY_MODE: dict[str, tuple[int, int, float]] = {
    "full": (3, 16, 2e-5),
    "lora": (3, 16, 1e-4),
    "head": (40, 64, 4e-3),
}


@dataclass(frozen=True, slots=True)
class CriticConfig:
    """How a critic is trained.

    mode: all weights of a copy of the policy ("full"), LoRA adapters and a head on it ("lora"), or
        a head on the frozen policy's hidden states ("head").
    target: of each prefix the rollout's reward ("outcome", Monte Carlo), the λ-return of the
        critic's own values ("td"), or a reward model's score of the prefix ("scores").
    loss: squared error, or cross-entropy over the classes wrong, right and unfinished.
    lam: λ of "td"; 1 is "outcome".
    epochs, batch_size, lr: passes over the rollouts, rollouts a step, and AdamW's rate, which rises
        over the first `warmup` of the steps and falls to 0 by a cosine; None is the mode's own.
    validation: share of the training prompts that choose the epoch.
    width: of a head's inner layer; 0 is one linear layer.
    lora_rank, lora_alpha: of the adapters.

    Raises ValueError: a setting that has no meaning.
    """

    mode: Mode = "full"
    target: Target = "outcome"
    loss: Loss = "squared"
    lam: float = 0.95
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    weight_decay: float = 0.01
    warmup: float = 0.03
    max_grad_norm: float = 1.0
    validation: float = 0.1
    width: int = 256
    lora_rank: int = 16
    lora_alpha: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice("mode", self.mode, MODES)
        _check_choice("target", self.target, TARGETS)
        _check_choice("loss", self.loss, LOSSES)
        for name in ("epochs", "batch_size", "lr", "max_grad_norm", "lora_rank", "lora_alpha"):
            given = getattr(self, name)
            if given is not None and not (math.isfinite(given) and given > 0):
                raise ValueError(f"{name}={given}: expected a number above 0")
        for name in ("weight_decay", "width", "seed"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}={getattr(self, name)}: expected a number of at least 0")
        for name in ("lam", "warmup"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number from 0 to 1")
        if not 0.0 < self.validation < 1.0:
            raise ValueError(f"validation={self.validation}: expected a number between 0 and 1")
        if self.target == "scores" and self.loss != "squared":
            raise ValueError(
                'loss="cross-entropy" came with target="scores": scores have no classes; pass '
                'loss="squared"'
            )

    def settled(self) -> CriticConfig:
        """The same with the mode's own numbers where none were given."""
        epochs, batch_size, lr = _BY_MODE[self.mode]
        own: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "lr": lr}
        return replace(self, **{n: v for n, v in own.items() if getattr(self, n) is None})

    @property
    def labels(self) -> int:
        """Outputs of the head: one value, or the outcome classes."""
        return 1 if self.loss == "squared" else 3

    @property
    def kind(self) -> str:
        """The family that the critic is read as, a name of `checkpoints.families`."""
        if self.mode == "head":
            return "trunk-head"
        return "verl-critic" if self.loss == "squared" else "classifier"

    @property
    def at_end(self) -> bool:
        """Whether it is trained at the response's last token, and so is read at EOS."""
        return self.kind == "classifier"


def _check_choice(name: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise ValueError(f"{name}={given!r}: expected one of {', '.join(map(repr, choices))}")
