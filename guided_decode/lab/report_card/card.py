"""A critic's report card: its figures, as JSON and as Markdown."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from guided_decode.critics.rollout import Rollout
from guided_decode.guidance.config import GuidanceConfig
from guided_decode.lab.report_card.guidance import (
    Positions,
    Spread,
    Suggestion,
    read_positions,
    spread,
    suggest,
)
from guided_decode.lab.report_card.measures import (
    FRACTIONS,
    Bin,
    Rank,
    bellman_residual,
    calibration,
    last_step_error,
    rank_at,
    threshold_of,
)
from guided_decode.scorer import Scorer

# Nats a token: hardly anything, some, much.
BUDGETS = (0.01, 0.05, 0.2)
POSITIONS = 512
# Of the curve of KL over beta, in shares of the largest beta that is suggested.
_CURVE = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class ReportCard:
    """What is known of a critic by rollouts that it was not trained on.

    graded: whether rewards have more than two values. threshold: what is right lies above it.
    bins: the calibration curve. spread, suggestions, curve: None and empty without a policy; the
    curve is (beta, mean KL in nats a token).
    """

    scorer: str
    policy: str | None
    rollouts: int
    prompts: int
    tokens: int
    mean_reward: float
    graded: bool
    threshold: float
    ranks: list[Rank]
    bins: list[Bin]
    calibration_error: float
    bellman_residual: float | None
    last_step_error: float
    top_k: int | None
    positions: int
    spread: Spread | None
    suggestions: list[Suggestion]
    curve: list[tuple[float, float]]

    def as_dict(self) -> dict[str, Any]:
        """By name, for JSON."""
        return asdict(self)

    def markdown(self) -> str:
        """The same for people."""
        lines = [f"# Report card of {self.scorer}", "", self._about(), "", *self._rank_lines()]
        lines += ["", "| | |", "| --- | --- |"]
        lines += [f"| {name} | {value} |" for name, value in self._figures()]
        if self.suggestions:
            lines += ["", "| KL a token, nats | beta |", "| --- | --- |"]
            lines += [f"| {each.budget:g} | {_beta(each)} |" for each in self.suggestions]
        return "\n".join(lines) + "\n"

    def _about(self) -> str:
        of = f" of {self.policy}" if self.policy else ""
        right = "" if self.graded else f"; a reward above {self.threshold:g} is right"
        return (f"{self.rollouts:,} rollouts{of} on {self.prompts:,} prompts, "
                f"{self.tokens:,} tokens, mean reward {self.mean_reward:.3f}{right}.")  # fmt: skip

    def _rank_lines(self) -> list[str]:
        by_median = f" (reward above {self.threshold:g})" if self.graded else ""
        lines = [f"| of the response read | AUC{by_median} | Spearman |", "| --- | --- | --- |"]
        for each in self.ranks:
            lines.append(f"| {each.fraction:.0%} | {_or(each.auc)} | {_or(each.spearman)} |")
        return lines

    def _figures(self) -> list[tuple[str, str]]:
        figures = [
            ("expected calibration error", f"{self.calibration_error:.4f}"),
            ("Bellman residual, mean (V(s_t) − V(s_t+1))²", _or(self.bellman_residual, 5)),
            ("mean (V − reward)² at the last prefix", f"{self.last_step_error:.5f}"),
        ]
        if self.spread is not None:
            one = self.spread
            figures += [
                (f"deviation of A over {self.top_k} candidates, mean", f"{one.mean:.4f}"),
                ("the same, median and 90th percentile", f"{one.median:.4f}, {one.p90:.4f}"),
                ("best less worst candidate's A, mean", f"{one.range:.4f}"),
            ]
        return figures


@dataclass(frozen=True, slots=True)
class Guided:
    """What a card needs to say anything of guidance.

    policy: a causal LM. terminals: ids that end a response. config: its candidates and tail.
    """

    policy: Any
    terminals: Collection[int]
    config: GuidanceConfig
    budgets: Sequence[float] = BUDGETS
    positions: int = POSITIONS
    seed: int = 0

    def __post_init__(self) -> None:
        odd = next((each for each in self.budgets if not each > 0.0), None)
        if odd is not None:
            raise ValueError(f"budget={odd}: expected nats a token, a number above 0")


def make_card(
    values: Sequence[Tensor],
    rollouts: Sequence[Rollout],
    *,
    scorer: str,
    policy: str | None = None,
    scored_by: Scorer | None = None,
    guided: Guided | None = None,
) -> ReportCard:
    """The card of a critic.

    Args:
        values: V of each rollout's prefixes, as `critics.values.values_along` has them.
        rollouts: held out of the critic's training, with rewards.
        scorer, policy: names.
        scored_by: the critic, for what guidance by it would do; with `guided`.

    Raises ValueError: no rollout.
    """
    if not rollouts:
        raise ValueError("a report card needs rollouts that were held out: expected at least one")
    rewards = [each.reward for each in rollouts]
    bins, error = calibration(values, rewards)
    positions: Positions | None = None
    if scored_by is not None and guided is not None:
        positions = read_positions(
            guided.policy, scored_by, rollouts, guided.config,
            terminals=guided.terminals, count=guided.positions, seed=guided.seed,
        )  # fmt: skip
    suggestions, curve = _suggested(positions, guided)
    return ReportCard(
        scorer=scorer,
        policy=policy,
        rollouts=len(rollouts),
        prompts=len({each.prompt for each in rollouts}),
        tokens=sum(len(each.response) for each in rollouts),
        mean_reward=sum(rewards) / len(rewards),
        graded=len(set(rewards)) > 2,
        threshold=threshold_of(rewards),
        ranks=[rank_at(values, rewards, fraction) for fraction in FRACTIONS],
        bins=bins,
        calibration_error=error,
        bellman_residual=bellman_residual(values),
        last_step_error=last_step_error(values, rewards),
        top_k=None if guided is None else guided.config.top_k,
        positions=0 if positions is None else len(positions.logits),
        spread=None if positions is None else spread(positions),
        suggestions=suggestions,
        curve=curve,
    )


def _suggested(
    positions: Positions | None, guided: Guided | None
) -> tuple[list[Suggestion], list[tuple[float, float]]]:
    if positions is None or guided is None:
        return [], []
    suggestions = [suggest(positions, guided.config, each) for each in sorted(guided.budgets)]
    largest = max((each.beta for each in suggestions if each.beta is not None), default=0.0)
    betas = [share * largest for share in _CURVE] if largest else [0.0]
    return suggestions, [(b, positions.kl(guided.config.changed(beta=b))) for b in betas]


def _or(figure: float | None, digits: int = 3) -> str:
    return "—" if figure is None else f"{figure:.{digits}f}"


def _beta(suggestion: Suggestion) -> str:
    return suggestion.reason if suggestion.beta is None else f"{suggestion.beta:.3g}"
