"""`guided-decode models`: the known checkpoints, and what each needs."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from guided_decode.checkpoints.plan.cards import find_card
from guided_decode.checkpoints.plan.footprint import Workload
from guided_decode.checkpoints.plan.placement import Placement, make_plan
from guided_decode.checkpoints.registry import CHAT_TEMPLATE, REGISTRY, Record
from guided_decode.cli.plan_report import described, way_fields
from guided_decode.cli.terminal import console

# Terminal rules, as a candidate that ends the response meets them.
_AT_THE_END = {
    "baseline": "an end has A = 0",
    "critic": "an end has Q = V(s·EOS)",
    "reward": "an end has its reward",
    "included": "ends scored like any token",
}

# One value of the rewards of a response's steps.
_OF_ALL = {
    "last": "the last one counts",
    "min": "the lowest one counts",
    "product": "steps are multiplied",
    "mean": "steps are averaged",
}


def models(
    as_json: Annotated[bool, typer.Option("--json", help="as one JSON array")] = False,
) -> None:
    """List the registered checkpoints: memory, policy, kind, how each is read, what it fits."""
    if as_json:
        print(json.dumps([_fields(record) for record in REGISTRY], indent=2))
        return
    table = Table(
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, show_lines=True, header_style="bold"
    )
    table.add_column("checkpoint", overflow="fold")
    table.add_column("weights\nbf16", justify="right", no_wrap=True)
    table.add_column("KV per\n1k tokens", justify="right", no_wrap=True)
    for group, records in groupby(REGISTRY, key=lambda record: record.group):
        table.add_row(Text(group, style="bold underline"), "", "")
        for record in records:
            table.add_row(_description(record), *map(size, (record.weight_bytes, _kv(record))))
    console().print(table)


def size(count: int) -> str:
    """Bytes as a person reads them: "12.6 GiB"."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.{0 if value >= 100 else 1}f} {units[0]}"


def _kv(record: Record) -> int:
    return 1_000 * record.shape.kv_bytes()


def _fitting(record: Record) -> Placement | None:
    """The way to take on 80 GB GPUs, of one row of the usual length; None: it scores nothing.

    A policy that is scored by its own log-probabilities is planned beside its reference.
    """
    if record.kind is None:
        return None
    policy = record.policy or record.reference or record.name
    return make_plan(policy, record.name, find_card("80GB"), Workload()).take


def _description(record: Record) -> Text:
    kind = record.kind or "policy"
    text = Text(record.name, style="bold").append(f"\n{kind}", style="cyan not bold")
    own = record.prompt_format
    reads = "its own chat template" if own == CHAT_TEMPLATE else f"{own} format"
    text.append(f" · {reads} · {record.summary}", style="not bold")
    if (reading := _reading(record)) is not None:
        text.append(f"\n{reading}", style="not bold")
    if record.policy is not None and record.policy != record.name:
        text.append(f"\nguides {record.policy}", style="not bold")
        if not record.one_format:
            text.append(f", prompted by its own {record.policy_format}", style="not bold")
    if record.reference is not None:
        text.append(f"\nagainst {record.reference}", style="not bold")
    if (fitting := _fitting(record)) is not None:
        count = fitting.way.total
        cards = "one 80 GB GPU" if count == 1 else f"{count} 80 GB GPUs"
        text.append(f"\n{cards}: {described(fitting.way)}", style="green not bold")
    return text


def _reading(record: Record) -> str | None:
    """How its score is read, in words; None for a policy that is only decoded."""
    from guided_decode.checkpoints.record_conventions import conventions_of

    how = conventions_of(record)
    if how.bos is None or how.read is None or how.terminal is None:
        return None
    bos = {"keep": "BOS kept", "drop": "BOS dropped", "policy": "BOS as the policy's"}[how.bos]
    if how.aggregate is not None:
        return f"{bos} · read at the end of each step · {_OF_ALL[how.aggregate]}"
    read = {"token": "read at each token", "eos": "read at EOS"}[how.read]
    return f"{bos} · {read} · {_AT_THE_END[how.terminal]}"


def _fields(record: Record) -> dict[str, Any]:
    from guided_decode.checkpoints.record_conventions import conventions_of

    how, fitting = conventions_of(record), _fitting(record)
    return {
        "name": record.name,
        "group": record.group,
        "aliases": list(record.aliases),
        "kind": record.kind,
        "architecture": record.architecture,
        "prompt_format": record.prompt_format,
        "prompt_format_bos": how.format_bos,
        "policy_format": record.policy_format or record.prompt_format,
        "bos": how.bos,
        "read": how.read,
        "terminal": how.terminal,
        "transform": how.transform,
        "steps": record.steps,
        "aggregate": how.aggregate,
        "turn_end": record.turn_end,
        "stop": list(record.stop),
        "policy": record.policy,
        "reference": record.reference,
        "weight_bytes_bf16": record.weight_bytes,
        "kv_bytes_per_1k_tokens": _kv(record),
        "fits_80gb": None
        if fitting is None
        else {**way_fields(fitting.way), "described": described(fitting.way)},
        "summary": record.summary,
        "defects": list(record.defects),
        "inferred": list(record.inferred),
    }
