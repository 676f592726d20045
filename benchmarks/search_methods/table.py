"""The comparison on the held-out prompts, as JSON and as a page of tables."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.search_methods.choice import COUNTINGS, RUNGS, TOLERANCE, choose
from benchmarks.search_methods.records import Records, Total
from benchmarks.search_methods.settings import BEST_OF_N, GREEDY, PLAIN, Setting, tried
from guided_decode import tiny_tulu
from guided_decode.lab.intervals import wilson
from recipes.tiny_tulu.metrics import paired_bootstrap

HEADINGS = {
    "drawn": "Every token that is drawn counts, as in `generate`, vLLM and servers: they share a "
    "prompt's tokens, and not those that two draws happen to have in common.",
    "forwarded": "Tokens that are forwarded count, as in this package's local generator, where "
    "branches share all that they have in common.",
}


@dataclass(frozen=True)
class Difference:
    """Accuracy minus another method's over the same prompts, with its 95% paired bootstrap."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """A method at a budget; tokens and FLOPs are means of an answer. over_*: None where the other
    is itself or has no setting that fits."""

    counting: str
    rung: float
    method: str
    settings: Mapping[str, Any]
    written: str
    tokens: float
    mflops: float
    accuracy: float
    low: float
    high: float
    over_plain: Difference | None
    over_best_of_n: Difference | None


@dataclass(frozen=True)
class Flops:
    """Of a token through each model: two for each weight of a matrix product."""

    policy: int
    critic: int


def write(
    records: Records, flops: Mapping[str, Flops], about: dict[str, Any], folder: Path
) -> None:
    """search_methods.json and search_methods.md. Raises ValueError: too little was run."""
    compared = {policy: compare(records, policy, own, about) for policy, own in flops.items()}
    folder.mkdir(parents=True, exist_ok=True)
    written = about | {
        "policies": {p: {"prompts": n, "rows": [asdict(r) for r in rows]}
                     for p, (n, rows) in compared.items()},
        "tried": [asdict(each) for each in tried()],
    }  # fmt: skip
    text = json.dumps(written, indent=1, ensure_ascii=False)
    (folder / "search_methods.json").write_text(text + "\n")
    (folder / "search_methods.md").write_text(page(compared, about))


def compare(
    records: Records, policy: str, flops: Flops, about: Mapping[str, Any]
) -> tuple[int, list[Row]]:
    """How many held-out prompts all chosen settings have had, and the rows over these."""
    validation = records.totals(policy, "validation", about["validation"])
    settings = tried()
    plain = next(each for each in settings if each.method == PLAIN)
    if plain.key not in validation:
        raise ValueError(f"{records.path} has no validation runs of {policy}: run them first")
    choices = {
        (counting, rung): choose(settings, validation, validation[plain.key], rung, counting)
        for counting in COUNTINGS
        for rung in RUNGS
    }
    needed = {each.key for chosen in choices.values() for each in chosen.values()}
    prompts = records.common(policy, "held-out", needed)
    if not prompts:
        raise ValueError(f"{records.path} has no held-out prompts of {policy} that every chosen "
                         "setting has had: run them first")  # fmt: skip
    totals = records.totals(policy, "held-out", prompts)
    rows = []
    for (counting, rung), chosen in choices.items():
        best = chosen.get(BEST_OF_N)
        for setting in chosen.values():
            others = (plain, best)
            rows.append(_row(setting, counting, rung, totals, flops, others))
    return prompts, rows


def _row(
    setting: Setting, counting: str, rung: float, totals: Mapping[str, Total], flops: Flops,
    others: Sequence[Setting | None],
) -> Row:  # fmt: skip
    total = totals[setting.key]
    low, high = wilson(round(total.right.sum()), len(total.right))
    cost = total.forwarded * flops.policy + total.scorer * flops.critic
    over = [
        None if other is None or other.key == setting.key
        else Difference(*paired_bootstrap(total.right, totals[other.key].right))
        for other in others
    ]  # fmt: skip
    return Row(
        counting, rung, setting.method, setting.given, str(setting), total.tokens(counting),
        cost / 1e6, total.accuracy, low, high, *over,
    )  # fmt: skip


def page(compared: Mapping[str, tuple[int, list[Row]]], about: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        "# Decoding methods on tiny-tulu at equal total tokens",
        "",
        f"{about['date']} · `{about['command']}` · {versions} · 1 thread, float32",
        "",
        f"Each method's settings are those of {len(tried())} in all that did best on "
        f"{about['validation']} validation prompts within a budget of 2, 4 or 8 times plain "
        f"sampling's tokens, policy and critic together (at most {TOLERANCE:.0%} more); the "
        "figures are of held-out prompts. A method without a setting that fits is not in its "
        "table. All draw at temperature 1, but "
        "greedy. MFLOPs: of an answer, by the engines' counters of forwarded tokens, 2 a weight. "
        "Accuracy: with its 95% interval (Wilson). Differences: points over the same prompts, 95% "
        "paired bootstrap; **bold** where the interval leaves out 0. What was tried is in "
        "`benchmarks/search_methods/settings.py`, every figure in search_methods.json.",
    ]
    for policy, (prompts, rows) in compared.items():
        lines += ["", f"## {policy.upper()} policy, {prompts:,} held-out prompts"]
        if prompts < tiny_tulu.HELD_OUT:
            lines += [
                "",
                f"**{prompts} of the {tiny_tulu.HELD_OUT:,} held-out prompts, the same for every "
                "method: the run was cut short.** `python -m benchmarks.search_methods` does all.",
            ]
        for counting in COUNTINGS:
            lines += ["", f"### Tokens {counting}", "", HEADINGS[counting]]
            before: list[str] = []
            for rung in RUNGS:
                own = [r for r in rows if r.counting == counting and r.rung == rung]
                lines += ["", f"**At most {rung:g} × plain.** {verdict(own)}"]
                table = _table(own)
                lines += ["", *table] if table != before else ["The table is the last one."]
                before = table
    return "\n".join(lines) + "\n"


def verdict(rows: Sequence[Row]) -> str:
    """What a table says, whichever way it came out."""
    guided = [row for row in rows if row.method not in (PLAIN, GREEDY)]
    if not guided:
        return "Nothing but plain decoding fits."
    best = max(guided, key=lambda row: row.accuracy)
    said = f"Best: {best.method}, {best.accuracy:.1%} for {best.tokens:.0f} tokens."
    compared = [row for row in rows if row.over_best_of_n is not None]
    if not compared:
        return f"{said} No best-of-n fits."
    kinds = {"above": "better than best-of-n", "below": "worse", "near": "not told apart"}
    named = {
        kind: [r.method for r in compared if _side(r.over_best_of_n) == kind] for kind in kinds
    }
    parts = [f"{words}: {', '.join(named[kind])}" for kind, words in kinds.items() if named[kind]]
    clauses = "; ".join(parts)
    return f"{said} {clauses[0].upper()}{clauses[1:]}."


def _side(difference: Difference | None) -> str:
    assert difference is not None
    return "above" if difference.low > 0 else "below" if difference.high < 0 else "near"


def _table(rows: Sequence[Row]) -> list[str]:
    header = ["method", "settings", "tokens", "MFLOPs", "accuracy", "95%", "− plain", "− best-of-n"]
    lines = [_line(header), _line(["---", "---", *["---:"] * 6])]
    for row in rows:
        lines.append(
            _line([
                row.method, row.written.replace("|", "\\|"), f"{row.tokens:.0f}",
                f"{row.mflops:.0f}", f"{row.accuracy:.1%}",
                f"{row.low * 100:.0f}–{row.high * 100:.0f}", _points(row.over_plain),
                _points(row.over_best_of_n),
            ])
        )  # fmt: skip
    return lines


def _points(difference: Difference | None) -> str:
    if difference is None:
        return ""
    each = (difference.mean, difference.low, difference.high)
    mean, low, high = (f"{100 * one:+.1f}" for one in each)
    text = f"{mean} ({low} to {high})"
    return text if _side(difference) == "near" else f"**{text}**"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
