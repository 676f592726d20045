"""An ablation's files: every response as JSONL, a row a setting as CSV, a page of Markdown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict
from typing import Any

from guided_decode.lab.ablate.grid import Setting, shown
from guided_decode.lab.ablate.outcomes import Answer, Outcome
from guided_decode.lab.ablate.summary import AtCost, Comparison, Figures

_NOTES = (
    "quality: the mean reward over prompts (of several seeds, of their mean), with its 95% "
    "interval (bootstrap over prompts, bias-corrected and accelerated, 9,999 draws; where every "
    "reward is 0, or every one 1, Wilson's).",
    "− plain: quality minus the plain policy's over the same prompts, with its bootstrap interval "
    "(none where all differences are equal, which leave nothing to draw from), and p of a "
    "two-sided sign-flip test (exact where rewards have a step, as 0 and 1 have), corrected "
    "for all comparisons of the table and of the other policies' (Holm); **bold** below 0.05.",
    "KL: nats of a response from the policy at temperature 1; exact where the method's own "
    "distribution is known at each step, else (≤) the least of what is known of the method and "
    "−log π of the responses.",
    "tokens: distinct tokens that policy and scorer read or wrote for an answer, its prompt among "
    "them, as an engine with a prefix cache forwards them; drawn: tokens that were drawn, each of "
    "them.",
)


def response_lines(
    outcomes: Sequence[Outcome], prompts: Sequence[Mapping[str, Any]]
) -> Iterator[bytes]:
    """A line of JSON for each response, setting by setting, seed by seed, in the prompts' order.

    prompts: what a line says of its prompt; fields that are called as ours are come in "input".
    """
    for outcome in outcomes:
        for seed, answers in outcome.by_seed.items():
            for prompt, answer in zip(prompts, answers, strict=True):
                own, found = {**of_setting(outcome.setting), "seed": seed}, _of(answer)
                line = {**own, **_beside(prompt, {*own, *found}), **found}
                yield json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _beside(prompt: Mapping[str, Any], ours: Set[str]) -> dict[str, Any]:
    clashing = {name: value for name, value in prompt.items() if name in ours}
    if not clashing:
        return dict(prompt)
    free = {name: value for name, value in prompt.items() if name not in ours}
    return {**free, "input": {**free.get("input", {}), **clashing}}


def of_setting(setting: Setting) -> dict[str, Any]:
    """A setting by name, for JSON."""
    return {
        "policy": setting.policy,
        "scorer": setting.scorer,
        "method": setting.method,
        "name": setting.name,
        "settings": dict(setting.given),
    }


def _of(answer: Answer) -> dict[str, Any]:
    return {
        "response": answer.text,
        "reward": answer.reward,
        "tokens": answer.tokens,
        "ended": answer.ended,
        "stopped": answer.stopped,
        "log_prob": answer.log_prob,
        "kl": answer.kl,
        "kl_at_most": answer.bound,
        "cost": {
            "policy_tokens": answer.policy_tokens,
            "scorer_tokens": answer.scorer_tokens,
            "generated_tokens": answer.generated_tokens,
            "prompt_tokens": answer.prompt_tokens,
            "calls": answer.calls,
        },
    }


def rows_of(figures: Sequence[Figures]) -> list[dict[str, Any]]:
    """The table's rows by name, floats rounded to what is the same in every batch."""
    return [_row(each) for each in figures]


def _row(each: Figures) -> dict[str, Any]:
    settings = {k: shown(v) for k, v in each.setting.given.items()}
    row: dict[str, Any] = {
        "policy": each.setting.policy,
        "scorer": each.setting.scorer,
        "method": each.setting.method,
        "name": each.setting.name,
        "settings": "; ".join(f"{name} {value}" for name, value in settings.items()),
        "prompts": each.prompts,
        "seeds": each.seeds,
        "quality": each.quality.mean,
        "quality_low": each.quality.low,
        "quality_high": each.quality.high,
        "kl": each.kl,
        "kl_is": None if each.kl is None else "exact" if each.kl_exact else "at most",
        "policy_tokens": each.policy_tokens,
        "scorer_tokens": each.scorer_tokens,
        "forwarded_tokens": each.forwarded_tokens,
        "drawn_tokens": each.drawn_tokens,
        "generated_tokens": each.generated_tokens,
        "length": each.length,
        "finished": each.finished,
        **_compared(each.over_plain, "plain"),
    }
    return {name: _rounded(value) for name, value in row.items()}


def _compared(over: Comparison | None, other: str) -> dict[str, float | None]:
    values: tuple[float | None, ...] = (None,) * 5
    if over is not None:
        each = over.difference
        ends = (each.low, each.high) if each.low < each.high else (None, None)
        values = (each.mean, *ends, over.p, over.p_holm)
    names = (f"over_{other}", f"over_{other}_low", f"over_{other}_high", "p", "p_holm")
    return dict(zip(names, values, strict=True))


def cost_rows(rows: Sequence[AtCost]) -> list[dict[str, Any]]:
    """The rows at equal cost by name."""
    made = []
    for each in rows:
        row = {
            "policy": each.policy,
            "budget": each.budget,
            "method": each.curve,
            "chosen": list(each.chosen),
            **{f"quality_{k}".removesuffix("_mean"): v for k, v in asdict(each.quality).items()},
            "total_tokens": each.total_tokens,
            "against": each.against,
            **_compared(each.over, "it"),
        }
        made.append({name: _rounded(value) for name, value in row.items()})
    return made


def as_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows of one shape as CSV; what is not known is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if value is None else value for name, value in row.items()})
    return text.getvalue().encode()


def page(
    title: str, about: Sequence[str], figures: Sequence[Figures], at_cost: Sequence[AtCost],
    pictures: Sequence[str],
) -> str:  # fmt: skip
    """The ablation as a page of Markdown."""
    lines = [f"# {_escaped(title)}", "", *about]
    for policy in dict.fromkeys(each.setting.policy for each in figures):
        own = [each for each in figures if each.setting.policy == policy]
        lines += ["", f"## {_escaped(policy)}", "", *_table(own)]
        budgets = dict.fromkeys(each.budget for each in at_cost if each.policy == policy)
        if budgets:
            lines += ["", "### At equal total tokens", "", _EQUAL]
        for budget in budgets:
            rows = [r for r in at_cost if r.policy == policy and r.budget == budget]
            lines += ["", f"**At most {budget:g} × plain.**", "", *_cost_table(rows)]
    lines += ["", *(f"- {note}" for note in _NOTES)]
    for name in pictures:
        lines += ["", f"![{name.removesuffix('.png').replace('_', ' ')}]({name})"]
    return "\n".join(lines) + "\n"


_EQUAL = (
    "Of each method the settings that did best within the budget on one half of the prompts, "
    "counted on the other half, and the other way round. The budget is of policy and scorer "
    "together, as a multiple of the plain policy's; 5% more fit."
)


def _table(rows: Sequence[Figures]) -> list[str]:
    header = ["method", "scorer", "settings", "quality", "95%", "− plain", "p", "KL",
              "policy tokens", "scorer tokens", "drawn"]  # fmt: skip
    lines = [_line(header), _line(["---"] * 3 + ["---:"] * (len(header) - 3))]
    for row in rows:
        lines.append(
            _line([
                _escaped(row.setting.name), _escaped(row.setting.scorer or ""),
                _escaped(row.setting.values),
                f"{row.quality.mean:.3f}", f"{row.quality.low:.3f}–{row.quality.high:.3f}",
                *_difference(row.over_plain), divergence(row),
                f"{row.policy_tokens:.1f}", f"{row.scorer_tokens:.1f}",
                f"{row.generated_tokens:.1f}",
            ])
        )  # fmt: skip
    return lines


def _cost_table(rows: Sequence[AtCost]) -> list[str]:
    against = rows[0].against
    header = ["method", "settings", "tokens", "quality", "95%", f"− {_escaped(against)}", "p"]
    lines = [_line(header), _line(["---", "---", *["---:"] * 5])]
    for row in rows:
        lines.append(
            _line([
                _escaped(row.curve), _escaped(" / ".join(row.chosen)), f"{row.total_tokens:.1f}",
                f"{row.quality.mean:.3f}", f"{row.quality.low:.3f}–{row.quality.high:.3f}",
                *_difference(row.over),
            ])
        )  # fmt: skip
    return lines


def divergence(row: Figures) -> str:
    """A row's KL as tables show it."""
    if row.kl is None:
        return "–"
    return f"{'' if row.kl_exact else '≤'}{row.kl:.3f}"


def _difference(over: Comparison | None) -> tuple[str, str]:
    if over is None:
        return "", ""
    each = over.difference
    text = f"{each.mean:+.3f}"
    if each.low < each.high:
        text += f" ({each.low:+.3f} to {each.high:+.3f})"
    p = "<0.0001" if over.p_holm < 1e-4 else f"{over.p_holm:.4f}"
    return (f"**{text}**", f"**{p}**") if over.told_apart else (text, p)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Text from the config, which is no markup."""
    for mark in "\\|*_<>[]`":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def _rounded(value: Any) -> Any:
    """What lies beyond varies with the batch that it was computed in."""
    return round(value, 6) if isinstance(value, float) else value
