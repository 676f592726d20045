"""The demo's table, and the sentences under it."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from guided_decode.lab.demo.chosen import GATED, PRUNE, REWEIGHT
from guided_decode.lab.demo.measure import Outcome

NOTES = (
    f"guided: beta {REWEIGHT.beta:g} and k {REWEIGHT.top_k}, gated at {GATED.gate:g}; "
    f"prune: margin {PRUNE.margin:g}, top-p {PRUNE.top_p:g}; chosen on other prompts. "
    "All but greedy sample at temperature 1.",
    "accuracy, with its 95% interval (Wilson).",
    "KL/token: from the policy at temperature 1, in nats, exact at each step; of a greedy "
    "decoder, −log π of its tokens; of best of n, an upper bound.",
    "tokens: forwarded for one answer. A prompt counts once, also for eight samples, as in an "
    "engine with a prefix cache.",
)


def table(outcomes: Sequence[Outcome]) -> Table:
    """A row for each method, a section for each policy."""
    result = Table(
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold"
    )
    result.add_column("\nmethod", no_wrap=True)
    for header in ("\naccuracy", "\n95%", "KL/\ntoken", "policy\ntokens", "scorer\ntokens"):
        result.add_column(header, justify="right", no_wrap=True)
    result.add_column("\nseconds", justify="right", no_wrap=True)
    for i, policy in enumerate(dict.fromkeys(outcome.policy for outcome in outcomes)):
        if i:
            result.add_row()
        result.add_row(Text(f"{policy} policy", style="bold"))
        for outcome in outcomes:
            if outcome.policy == policy and outcome.method.shown:
                result.add_row(*_cells(outcome))
    return result


def conclusions(outcomes: Sequence[Outcome]) -> list[str]:
    """What the table says about compute, one sentence a policy, whichever way it came out."""
    sentences = []
    for policy in dict.fromkeys(outcome.policy for outcome in outcomes):
        shown = [o for o in outcomes if o.policy == policy and o.method.shown]
        samples = next(o for o in shown if o.method.best_of > 1)
        gated = next(o for o in shown if o.method.curve == "gated")
        ratio = samples.tokens_per_answer / gated.tokens_per_answer
        sentences.append(
            f"{policy} policy: guided with a gate, {gated.accuracy:.0%} right for "
            f"{gated.tokens_per_answer:.0f} tokens an answer; best of {samples.method.best_of}, "
            f"{samples.accuracy:.0%} for {samples.tokens_per_answer:.0f} ({ratio:.1f} times as "
            "many)."
        )
    return sentences


def as_dict(outcome: Outcome) -> dict[str, object]:
    """An outcome's figures by name, for JSON."""
    low, high = outcome.interval
    answers = len(outcome.messages)
    return {
        "policy": outcome.policy,
        "method": outcome.method.name,
        "point": outcome.method.label,
        "answers": answers,
        "accuracy": outcome.accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
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
        f"{outcome.accuracy:.0%}",
        f"{low * 100:.0f}–{high * 100:.0f}",
        f"{bound}{outcome.kl_per_token:.3f}",
        f"{outcome.policy_tokens / answers:.0f}",
        f"{outcome.scorer_tokens / answers:.0f}",
        f"{outcome.seconds:.1f}",
    ]
