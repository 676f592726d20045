"""The demo's table, and the sentences under it."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from guided_decode.guidance.config import GuidanceConfig
from guided_decode.lab.demo.measure import Outcome

_MEASURES = {
    "accuracy": "accuracy, with its 95% interval (Wilson).",
    "reward": "reward: the judge's mean, with its 95% interval (normal).",
}
_COSTS = (
    "KL/token: from the policy at temperature 1, in nats, exact at each step; of a greedy "
    "decoder, −log π of its tokens; of best of n, an upper bound.",
    "tokens: forwarded for one answer. A prompt counts once, also for eight samples, as in an "
    "engine with a prefix cache.",
)


def notes(outcomes: Sequence[Outcome]) -> list[str]:
    """How the table's figures were come by."""
    settings = dict.fromkeys(map(_settings, _sections(outcomes)))
    return [*settings, "All but greedy sample at temperature 1.",
            _MEASURES[outcomes[0].task.measure], *_COSTS]  # fmt: skip


def _settings(section: Sequence[Outcome]) -> str:
    """Of the guided methods of one section."""
    used = {o.method.curve: o.method.config for o in section if o.method.shown}
    own, gated, prune = used["reweight"], used["gated"], used["prune"]
    assert own is not None
    assert gated is not None
    assert prune is not None
    words = f"guided: {_words(own)}, gated at {gated.gate:g}; prune: margin {prune.margin:g}"
    if prune.top_p != own.top_p:
        words += f", top-p {prune.top_p:g}"
    if trunk := used.get("trunk"):
        words += f"; trunk: {_words(trunk)}"
    return f"{words}."


def _words(config: GuidanceConfig) -> str:
    mass = f", top-p {config.top_p:g}" if config.top_p is not None and config.top_p < 1.0 else ""
    return f"beta {config.beta:g} and k {config.top_k}{mass}"


def _sections(outcomes: Sequence[Outcome]) -> list[list[Outcome]]:
    """By policy."""
    names = dict.fromkeys(outcome.policy for outcome in outcomes)
    return [[o for o in outcomes if o.policy == name] for name in names]


def table(outcomes: Sequence[Outcome], measure: str = "accuracy") -> Table:
    """A row for each method, a section for each policy.

    measure: what the mean judgement is called, where there is no outcome to ask.
    """
    measure = outcomes[0].task.measure if outcomes else measure
    result = Table(
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold"
    )
    result.add_column("\nmethod", no_wrap=True)
    for header in (f"\n{measure}", "\n95%", "KL/\ntoken", "policy\ntokens", "scorer\ntokens"):
        result.add_column(header, justify="right", no_wrap=True)
    result.add_column("\nseconds", justify="right", no_wrap=True)
    for i, section in enumerate(_sections(outcomes)):
        if i:
            result.add_row()
        result.add_row(Text(section[0].title, style="bold"))
        for outcome in section:
            if outcome.method.shown:
                result.add_row(*_cells(outcome))
    return result


def conclusions(outcomes: Sequence[Outcome]) -> list[str]:
    """What the table says about compute, whichever way it came out: a sentence for each policy
    and each one who ranks best of n."""
    sentences = []
    for section in _sections(outcomes):
        gated = next(o for o in section if o.method.curve == "gated")
        for samples in (o for o in section if o.method.shown and o.method.best_of > 1):
            ratio = samples.tokens_per_answer / gated.tokens_per_answer
            name = f"best of {samples.method.best_of}"
            if samples.method.by != "critic":
                name += f" by the {samples.method.by}"
            right = " right" if gated.task.counted else ""
            sentences.append(
                f"{gated.title}: guided with a gate, {_score(gated)}{right} for "
                f"{gated.tokens_per_answer:.0f} tokens an answer; {name}, {_score(samples)} for "
                f"{samples.tokens_per_answer:.0f} ({ratio:.1f} times as many)."
            )
    return sentences


def as_dict(outcome: Outcome) -> dict[str, object]:
    """An outcome's figures by name, for JSON."""
    low, high = outcome.interval
    answers, measure = len(outcome.messages), outcome.task.measure
    return {
        "policy": outcome.policy,
        "method": outcome.method.name,
        "point": outcome.method.label,
        "answers": answers,
        measure: outcome.score,
        f"{measure}_low": low,
        f"{measure}_high": high,
        "kl_per_token": outcome.kl_per_token,
        "kl_is_bound": outcome.method.best_of > 1,
        "policy_tokens": outcome.policy_tokens / answers,
        "scorer_tokens": outcome.scorer_tokens / answers,
        "seconds": outcome.seconds if outcome.method.shown else None,
    }


def _cells(outcome: Outcome) -> list[str]:
    low, high = outcome.interval
    bound = "≤" if outcome.method.best_of > 1 else ""
    answers = len(outcome.messages)
    return [
        f"  {outcome.method.name}",
        _score(outcome),
        _span(low, high, outcome.task.counted),
        f"{bound}{outcome.kl_per_token:.3f}",
        f"{outcome.policy_tokens / answers:.0f}",
        f"{outcome.scorer_tokens / answers:.0f}",
        f"{outcome.seconds:.1f}",
    ]


def _score(outcome: Outcome) -> str:
    return f"{outcome.score:.0%}" if outcome.task.counted else f"{outcome.score:+.2f}"


def _span(low: float, high: float, counted: bool) -> str:
    if counted:
        return f"{low * 100:.0f}–{high * 100:.0f}"
    return f"{low:+.2f}…{high:+.2f}"
