"""What an ablation amounts to: quality with its interval, what it gained on plain, and its cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from guided_decode.lab.ablate.grid import Setting
from guided_decode.lab.ablate.outcomes import Floats, Outcome
from guided_decode.lab.bootstrap import Interval, bootstrap, bootstrap_of_rewards
from guided_decode.lab.paired_tests import holm, sign_flip_test

# A draw and its judgement are two tokens for one of plain's, and their ends a little more.
TOLERANCE = 0.05


@dataclass(frozen=True, slots=True)
class Comparison:
    """Quality minus another's over the same prompts; p: of the sign-flip test; p_holm: corrected
    for all comparisons of its table."""

    difference: Interval
    p: float
    p_holm: float

    @property
    def told_apart(self) -> bool:
        """Whether the two differ at 5%, of all comparisons together."""
        return self.p_holm < 0.05


@dataclass(frozen=True, slots=True)
class Figures:
    """A row of the table. Tokens are means of an answer. kl: nats of a response from the policy,
    exact or at most so. over_plain: None of the plain policy itself."""

    setting: Setting
    prompts: int
    seeds: int
    quality: Interval
    kl: float | None
    kl_exact: bool
    policy_tokens: float
    scorer_tokens: float
    generated_tokens: float
    forwarded_tokens: float
    drawn_tokens: float
    length: float
    finished: float
    over_plain: Comparison | None

    def total_tokens(self, counting: str) -> float:
        """Of policy and scorer, as of `outcomes.COUNTINGS`."""
        return self.drawn_tokens if counting == "drawn" else self.forwarded_tokens


@dataclass(frozen=True, slots=True)
class AtCost:
    """A method at a budget of total tokens, its settings chosen on the other half of the prompts.

    chosen: the settings, on the first half and on the second. over: None of `against` itself.
    """

    policy: str
    budget: float
    curve: str
    chosen: tuple[str, ...]
    quality: Interval
    total_tokens: float
    against: str
    over: Comparison | None


def summarise(outcomes: Sequence[Outcome]) -> list[Figures]:
    """A row for each setting, in their order; each policy has a plain one, which is the first."""
    plain = {each.setting.policy: each for each in reversed(outcomes) if each.setting.is_plain}
    rows = [_figures(each, plain[each.setting.policy]) for each in outcomes]
    return _corrected(rows)


def _figures(outcome: Outcome, plain: Outcome) -> Figures:
    kl, exact = outcome.divergence()
    return Figures(
        setting=outcome.setting,
        prompts=len(outcome.rewards),
        seeds=len(outcome.by_seed),
        quality=bootstrap_of_rewards(outcome.rewards),
        kl=kl,
        kl_exact=exact,
        policy_tokens=outcome.mean("policy_tokens"),
        scorer_tokens=outcome.mean("scorer_tokens"),
        generated_tokens=outcome.mean("generated_tokens"),
        forwarded_tokens=outcome.mean("forwarded_tokens"),
        drawn_tokens=outcome.mean("drawn_tokens"),
        length=outcome.mean("tokens"),
        finished=outcome.mean("finished"),
        over_plain=None if outcome is plain else _compared(outcome.rewards, plain.rewards),
    )


def _compared(first: Floats, second: Floats) -> Comparison:
    apart = first - second
    p = sign_flip_test(apart)
    return Comparison(bootstrap(apart), p, p)


def _corrected(rows: list[Figures]) -> list[Figures]:
    compared = [each.over_plain for each in rows if each.over_plain is not None]
    p_holm = iter(holm([each.p for each in compared]))
    return [
        row if row.over_plain is None
        else replace(row, over_plain=replace(row.over_plain, p_holm=next(p_holm)))
        for row in rows
    ]  # fmt: skip


def at_equal_cost(
    outcomes: Sequence[Outcome], budgets: Sequence[float], against: str, counting: str
) -> list[AtCost]:
    """Every method at every budget, with the best of its settings that fit.

    The settings are chosen on half of the prompts (every other one) and counted on the other half,
    and the other way round, so that no method is measured on what it was chosen by. A budget is a
    multiple of the plain policy's total tokens; 5% more fit.

    against: the method that others are compared with; plain where it has no setting that fits.
    counting: of `outcomes.COUNTINGS`.
    """
    rows: list[AtCost] = []
    for policy in dict.fromkeys(each.setting.policy for each in outcomes):
        own = [each for each in outcomes if each.setting.policy == policy]
        if len(own[0].rewards) >= 2:
            for budget in budgets:
                rows += _at_budget(own, policy, budget, against, counting)
    p_holm = iter(holm([each.over.p for each in rows if each.over is not None]))
    return [
        row if row.over is None else replace(row, over=replace(row.over, p_holm=next(p_holm)))
        for row in rows
    ]


def _at_budget(
    own: list[Outcome], policy: str, budget: float, against: str, counting: str
) -> list[AtCost]:
    plain = next(each for each in own if each.setting.is_plain)
    limit = budget * (1 + TOLERANCE) * float(plain.total_tokens(counting).mean())
    halves = np.arange(len(plain.rewards)) % 2 == 0
    chosen: dict[str, list[Outcome]] = {}
    for curve in dict.fromkeys(each.setting.curve for each in own):
        siblings = [each for each in own if each.setting.curve == curve]
        # Chosen on one half, for the other.
        best = [_best(siblings, part, limit, counting) for part in (~halves, halves)]
        if None not in best:
            chosen[curve] = [each for each in best if each is not None]
    tokens = partial(Outcome.total_tokens, counting=counting)
    rewards = {curve: _joined(pair, halves, _rewards) for curve, pair in chosen.items()}
    name = next((c for c in chosen if c == against or c.startswith(f"{against}, ")), None)
    name = plain.setting.curve if name is None else name
    reference = rewards.get(name, plain.rewards)
    return [
        AtCost(
            policy, budget, curve, tuple(dict.fromkeys(each.setting.values for each in pair)),
            bootstrap_of_rewards(rewards[curve]), float(_joined(pair, halves, tokens).mean()),
            name, None if curve == name else _compared(rewards[curve], reference),
        )
        for curve, pair in chosen.items()
    ]  # fmt: skip


def _rewards(outcome: Outcome) -> Floats:
    return outcome.rewards


def _best(siblings: list[Outcome], part: Floats, limit: float, counting: str) -> Outcome | None:
    """The best of those that fit, on a part of the prompts; of equals the cheapest."""
    merits = [
        (float(each.rewards[part].mean()), -float(each.total_tokens(counting)[part].mean()), i)
        for i, each in enumerate(siblings)
    ]
    fitting = [each for each in merits if -each[1] <= limit]
    return siblings[max(fitting, key=lambda merit: merit[:2])[2]] if fitting else None


def _joined(pair: list[Outcome], halves: Floats, read: Callable[[Outcome], Floats]) -> Floats:
    first, second = pair
    return np.where(halves, read(first), read(second))


def front(costs: Sequence[float], qualities: Sequence[float]) -> list[int]:
    """The places of what nothing else is as good and as cheap as (the Pareto front), by cost."""
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -qualities[i]))
    kept: list[int] = []
    for i in order:
        if not kept or qualities[i] > qualities[kept[-1]]:
            kept.append(i)
    return kept
