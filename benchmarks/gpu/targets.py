"""The targets of an H100 or H200, and whether the figures meet them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]
Figure = Callable[[Sequence[Record]], float | None]


@dataclass(frozen=True)
class Target:
    """A bound on a figure: at most it, or with `least` at least it."""

    text: str
    bound: float
    figure: Figure
    least: bool = False


@dataclass(frozen=True)
class Verdict:
    """word: "met", "not met", or "not run" where the figure was not measured."""

    target: str
    bound: str
    figure: float | None
    word: str


def verdict(target: Target, records: Sequence[Record]) -> Verdict:
    """Of one target."""
    figure = target.figure(records)
    bound = f"{'≥' if target.least else '≤'} {target.bound:g}"
    if figure is None:
        return Verdict(target.text, bound, None, "not run")
    met = figure >= target.bound if target.least else figure <= target.bound
    return Verdict(target.text, bound, figure, "met" if met else "not met")


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """Of all targets, in their order."""
    return [verdict(target, records) for target in TARGETS]


def _decoding(field: str, way: str, **wanted: Any) -> Figure:
    """A field of one way in one cell: the first that was measured."""

    def figure(records: Sequence[Record]) -> float | None:
        return next(iter(_fields(records, field, way, wanted)), None)

    return figure


def _first(*figures: Figure) -> Figure:
    """The first of these that was measured."""

    def figure(records: Sequence[Record]) -> float | None:
        return next((found for each in figures if (found := each(records)) is not None), None)

    return figure


def _worst(field: str, way: str, batches: Sequence[int], **wanted: Any) -> Figure:
    """The largest of a field over the ways that begin so; None until each batch was measured."""

    def figure(records: Sequence[Record]) -> float | None:
        every = [_fields(records, field, way, wanted | {"batch": b}) for b in batches]
        return max(max(each) for each in every) if all(every) else None

    return figure


def _fields(records: Sequence[Record], field: str, way: str, wanted: dict[str, Any]) -> list[float]:
    return [
        record[field]
        for record in records
        if record["kind"] == "decoding"
        and (record["way"] == way or record["way"].startswith(f"{way} "))
        and all(record[name] == value for name, value in wanted.items())
        and record[field] is not None
    ]


def _attention_share(records: Sequence[Record]) -> float | None:
    shares = [r["share_of_copy"] for r in records if r["kind"] == "kernel" and r["target"]]
    return min(shares, default=None)


def _added_launches(records: Sequence[Record]) -> float | None:
    fused = [
        record["ours"]
        for record in records
        if record["kind"] == "launches" and record["kernel"] == "lm_head_value"
    ]
    return fused[0] - 1 if fused else None


_ONE = {"model": "13B", "batch": 1, "prefix": 512}
TARGETS = (
    Target(
        "guided step, 13B + 13B, batch 1, k 16, prefix 512, over its floor",
        1.15,
        _decoding("over_floor", "k 16", **_ONE),
    ),
    Target("the same over plain decoding", 2.25, _decoding("over_plain", "k 16", **_ONE)),
    Target(
        "gated at 0.9, gate rate 0.7, over plain decoding (13B, batch 1, k 16, prefix 512)",
        1.5,
        _decoding("over_plain", "gated k 16", **_ONE),
    ),
    Target(
        "trunk-head lookahead over plain decoding (8B, the worst of batch 1, 4, 8, k 4, 8, 16)",
        1.10,
        _worst("over_plain", "trunk", (1, 4, 8), model="8B", prefix=512),
    ),
    Target(
        "trunk-head pruning over plain decoding (8B, the worst of batch 1, 4, 8)",
        1.02,
        _worst("over_plain", "pruning", (1, 4, 8), model="8B", prefix=512),
    ),
    Target(
        "times faster than per-candidate cache copies (8B, batch 8, k 16, prefix 4096; on a card "
        "under 120 GB prefix 2048)",
        5.0,
        _first(
            _decoding("over_guided", "copied k 16", model="8B", batch=8, prefix=4096),
            _decoding("over_guided", "copied k 16", model="8B", batch=8, prefix=2048),
        ),
        least=True,
    ),
    Target(
        "lookahead_attention's share of copy bandwidth "
        "(prefix 4096, batch 16, k 16, the worse of 8B and 13B shapes)",
        0.70,
        _attention_share,
        least=True,
    ),
    Target("launches added for the value head beyond the fused one", 0, _added_launches),
)
