"""One cell of an ablation's grid, with what answers it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from guided_decode.cli.ablate.schema import Model
from guided_decode.cli.model_options import ScorerOptions
from guided_decode.cli.search_plan import Plan
from guided_decode.guidance.config import GuidanceConfig
from guided_decode.lab.ablate.grid import GUIDE, PLAIN, Setting


@dataclass(frozen=True, slots=True)
class TokenPlan:
    """Decoding of single tokens: by itself (no config), or guided."""

    config: GuidanceConfig | None
    temperature: float
    max_tokens: int
    seed: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """Of a search, which it is not: its KL term, if it has one, is the scorer's."""
        return {}

    def identity(self) -> dict[str, Any]:
        """From what a response follows, by name."""
        return {
            "method": PLAIN if self.config is None else GUIDE,
            "guidance": None
            if self.config is None
            else sorted(asdict(self.config).items(), key=str),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
        }


@dataclass(frozen=True, slots=True)
class Cell:
    """A setting with what answers it. reading: of the scorer, as this method needs it.

    text_format: of prompts, as `chats.prompt_ids`. kl_reference: of a search's KL term.
    """

    setting: Setting
    plan: Plan | TokenPlan
    policy: Model
    scorer: Model | None
    reading: ScorerOptions
    text_format: str | None
    kl_reference: str | None = None

    @property
    def group(self) -> tuple[Any, ...]:
        """Cells with an equal one share loaded models."""
        label = None if self.scorer is None else self.scorer.label
        single = isinstance(self.plan, TokenPlan)
        return (self.policy.label, label, self.reading, self.kl_reference, single)

    @property
    def shown(self) -> dict[str, Any]:
        """All settings that matter for what it costs and how far it goes."""
        if isinstance(self.plan, TokenPlan):
            return {} if self.plan.config is None else asdict(self.plan.config)
        budget = {f"max_{name}": value for name, value in asdict(self.plan.budget).items()}
        return {**self.plan.method.checked(self.plan.settings), **budget}
