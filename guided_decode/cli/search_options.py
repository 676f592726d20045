"""The options of `search`: settings of the methods, how pieces are drawn, and budgets."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any

import typer

from guided_decode.cli.errors import Refusal
from guided_decode.search.budget import Budget


def _option(panel: str, text: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, metavar=metavar, rich_help_panel=panel)


def _setting(text: str, *names: str, metavar: str | None = None) -> Any:
    return _option("The method's own settings \\[as published]", text, *names, metavar=metavar)


def _limit(text: str, *names: str) -> Any:
    return _option("Budget of one prompt's search", text, *names)


Temperature = Annotated[float | None, _setting("of the draws; 0 is greedy")]
TopP = Annotated[float | None, _setting("probability mass of the draws")]
Stop = Annotated[
    list[str] | None,
    _setting("text that ends a response (best-of-n, votes) or a piece of it; may be repeated"),
]
StopEnds = Annotated[
    bool | None,
    _setting("that text ends the response, or a piece of it (block searches, prune-and-refill, "
             "smc)", "--stop-ends/--stop-cuts"),
]  # fmt: skip
N = Annotated[int | None, _setting("responses (best-of-n, votes, prune-and-refill)")]
Particles = Annotated[int | None, _setting("responses at a time (smc)")]
Width = Annotated[int | None, _setting("beams that a tree keeps (block searches)")]
Branches = Annotated[int | None, _setting("blocks drawn after each beam (block searches)")]
Block = Annotated[int | None, _setting("tokens of a block, or between two looks at values")]
Trees = Annotated[int | None, _setting("searches side by side (block searches)")]
Margin = Annotated[
    float | None,
    _setting("drop what is further below the best value (block searches, prune-and-refill)"),
]
Leave = Annotated[
    bool | None,
    _setting("finished beams leave their tree, or stay in the competition", "--leave/--stay"),
]
Patient = Annotated[
    bool | None,
    _setting("a tree ends when all beams that stay are finished, or when the best one is",
             "--patient/--no-patient"),
]  # fmt: skip
Spread = Annotated[
    bool | None,
    _setting("all beams begin at the prompt, or one does (block searches)",
             "--spread/--no-spread"),
]  # fmt: skip
Beta = Annotated[
    float | None,
    _setting("weight of a value, in nats a unit (smc); tolerance in units of value (cards)"),
]
Threshold = Annotated[
    float | None, _setting("share of the particles below which they are drawn anew (smc)")
]
Choice = Annotated[
    str | None,
    _setting("response drawn by weight, or the best one (smc)", metavar="sample|best"),
]

Target = Annotated[
    float | None, _setting("what a whole response should be worth, in units of value (cards)")
]
Entropy = Annotated[float | None, _setting("a segment ends before a token of so many nats (cards)")]
Shortest = Annotated[int | None, _setting("tokens of a segment (cards)")]
Longest = Annotated[int | None, _setting("tokens of a segment (cards)")]
Alpha = Annotated[
    float | None,
    _setting("where the threshold begins: 0 the prompt's value, 1 the target (cards)"),
]
Accept = Annotated[
    str | None, _setting("by chance, or above the threshold only (cards)", metavar="soft|hard")
]
TopK = Annotated[int | None, _setting("likeliest tokens that are drawn from (cards)")]
Retries = Annotated[int | None, _setting("rejections before the best is taken (cards)")]
Simulations = Annotated[int | None, _setting("of a token (ppo-mcts, as all that follows)")]
K = Annotated[int | None, _setting("next tokens of a node")]
CPuct = Annotated[float | None, _setting("weight of exploration, in units of value")]
PriorTemperature = Annotated[float | None, _setting("of the priors")]
Sample = Annotated[
    bool | None,
    _setting("tokens drawn by visits, or the most visited", "--sample/--most-visited"),
]
VisitTemperature = Annotated[float | None, _setting("of draws by visits")]
Anneal = Annotated[bool | None, _setting("that temperature falls to 0", "--anneal/--no-anneal")]
Gamma = Annotated[float | None, _setting("discount, where there is a KL term")]
KlCoef = Annotated[float | None, _setting("weight of the KL term; needs --reference")]
KlTerm = Annotated[
    str | None,
    _setting("the paper's, or its code's", metavar="log-ratio|probability"),
]
ClampKl = Annotated[bool | None, _setting("no term below 0", "--clamp-kl/--no-clamp-kl")]
EndValue = Annotated[str | None, _setting("of a finished response", metavar="judge|published")]
LookPast = Annotated[
    bool | None, _setting("simulations go on at the most tokens", "--look-past/--no-look-past")
]
KeepSubtree = Annotated[bool | None, _setting("of the chosen token", "--keep-subtree/--fresh-tree")]
Leaves = Annotated[int | None, _setting("that are evaluated in one batch")]
VirtualLoss = Annotated[
    float | None, _setting("of a simulation that is under way, in units of value")
]


@dataclass(frozen=True, slots=True)
class MethodOptions:
    """The settings of all methods, by the library's names; None was not given."""

    n: N = None
    particles: Particles = None
    width: Width = None
    branches: Branches = None
    block: Block = None
    trees: Trees = None
    margin: Margin = None
    leave: Leave = None
    patient: Patient = None
    spread: Spread = None
    beta: Beta = None
    threshold: Threshold = None
    choice: Choice = None
    temperature: Temperature = None
    top_p: TopP = None
    stop: Stop = None
    stop_ends: StopEnds = None
    target: Target = None
    entropy: Entropy = None
    shortest: Shortest = None
    longest: Longest = None
    alpha: Alpha = None
    accept: Accept = None
    top_k: TopK = None
    retries: Retries = None
    simulations: Simulations = None
    k: K = None
    c_puct: CPuct = None
    prior_temperature: PriorTemperature = None
    sample: Sample = None
    visit_temperature: VisitTemperature = None
    anneal: Anneal = None
    gamma: Gamma = None
    kl_coef: KlCoef = None
    kl_term: KlTerm = None
    clamp_kl: ClampKl = None
    end_value: EndValue = None
    look_past: LookPast = None
    keep_subtree: KeepSubtree = None
    leaves: Leaves = None
    virtual_loss: VirtualLoss = None

    def given(self) -> dict[str, Any]:
        """What was given, by name."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        own["stop"] = tuple(self.stop) if self.stop else None
        return {name: value for name, value in own.items() if value is not None}


PolicyTokens = Annotated[int | None, _limit("distinct tokens that the policy reads or writes")]
ScorerTokens = Annotated[int | None, _limit("distinct tokens that the scorer reads")]
Seconds = Annotated[float | None, _limit("on the clock, looked at between two calls of a model")]


@dataclass(frozen=True, slots=True)
class BudgetOptions:
    """The limits of one search; None is no limit."""

    max_policy_tokens: PolicyTokens = None
    max_scorer_tokens: ScorerTokens = None
    max_seconds: Seconds = None

    def budget(self) -> Budget:
        """The same for the library. Raises Refusal: a limit that is not above 0."""
        for field in fields(self):
            given = getattr(self, field.name)
            if given is not None and not given > 0:
                flag = field.name.replace("_", "-")
                raise Refusal(f"--{flag} {given}: expected a number above 0")
        return Budget(self.max_policy_tokens, self.max_scorer_tokens, self.max_seconds)
