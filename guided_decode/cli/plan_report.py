"""A plan as a person reads it, and as a program does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from guided_decode.checkpoints.plan.cards import GIB
from guided_decode.checkpoints.plan.footprint import MOST_FORWARD_TOKENS, Load
from guided_decode.checkpoints.plan.model import PlannedModel
from guided_decode.checkpoints.plan.placement import Placement, Plan
from guided_decode.checkpoints.plan.ways import USABLE, Place, Way, card_for
from guided_decode.cli.plan_commands import HOST, KEYS, commands

TABLE_WIDTH = 88


def described(way: Way, stored: str | None = None) -> str:
    """In what form the scorer is, and where, in words."""
    form = way.form.name if stored is None else f"as it is ({stored})"
    over = "" if way.shards == 1 else f", tensor parallel over {way.shards}"
    policy = "" if way.policy_shards == 1 else f", the policy over {way.policy_shards}"
    if way.place is Place.ONE_GPU:
        return f"{form} beside the policy"
    if way.place is Place.OWN_GPU:
        return f"{form} on a GPU of its own{policy}"
    if way.place is Place.SERVED:
        return f"{form}{over} on another machine{policy}"
    if not way.beside:
        return f"{form}{over}{policy or ', the policy apart'}"
    return f"{form}{over}{', the policy too' if policy else ', the policy on the first'}"


def print_plan(plan: Plan, console: Console) -> None:
    """The models, the ways, the one to take with its commands, and what was assumed."""
    for line in _given(plan):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    console.print()
    console.print(_table(plan))
    console.print()
    for line in (*_advice(plan), "", *_counted(plan)):
        # Commands are copied: nothing may break their lines.
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _given(plan: Plan) -> Iterator[str]:
    card, work = plan.card, plan.work
    for role, models in (("policy", (plan.pair.policy,)), ("scorer", plan.pair.scorer)):
        for model in models:
            kind = f" ({plan.kind})" if role == "scorer" else ""
            yield f"{role}  {model.name}{kind}: {_sizes(model)}"
    rows = f"{work.batch} row{'s' if work.batch > 1 else ''} of {work.length:,} tokens"
    yield f"work    {rows}, {work.top_k} candidates a row"
    speed = "bandwidth not known" if card.bandwidth is None else f"{card.bandwidth / 1e12:.2f} TB/s"
    speed = card.assumed or speed
    yield f"GPU     {card.name}: {card.gib:.1f} GiB, {_gib(plan.usable)} of them used; {speed}"


def _sizes(model: PlannedModel) -> str:
    """Numbers of a model, as it is loaded without further quantisation."""
    form = "bf16" if model.stored is None else model.stored
    kv = model.kv_bytes() / 2**20
    return (
        f"{model.parameters / 1e9:.2f}B weights, {_gib(model.weight_bytes())} GiB in {form}, "
        f"KV {kv:.2f} MiB a token"
    )


def _table(plan: Plan) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1),
                  header_style="bold")  # fmt: skip
    table.add_column("the scorer")
    for name in ("GPUs", "weights", "caches", "rest", "GiB", "fits", "rows", "floor"):
        table.add_column(name, justify="right", no_wrap=True)
    for placement in plan.placements:
        way, fullest = placement.way, placement.fullest
        load = fullest.policy + fullest.scorer
        parts = (load.weights, load.cache, load.activations, load.total)
        table.add_row(
            described(way, _stored(plan)),
            str(way.here) if not way.elsewhere else f"{way.here}+{way.elsewhere}",
            *map(_gib, parts),
            "yes" if placement.fits else "no",
            f"{placement.rows:,}" if placement.rows else "–",
            "–" if placement.seconds is None else _ms(placement.seconds),
            style="bold" if placement is plan.take else None,
        )
    return table


def _advice(plan: Plan) -> Iterator[str]:
    take = plan.take
    if take is None:
        yield from _nothing_fits(plan)
        return
    words = described(take.way, _stored(plan))
    if plan.enough:
        yield f"Take: {words}."
    else:
        here = f"{plan.gpus} GPU{'s' if plan.gpus > 1 else ''} of {plan.card.name}"
        yield f"Nothing fits {here}. The smallest that does takes {take.way.total}: {words}."
    yield from _floor(plan, take)
    yield from _typed(plan, take)
    elsewhere = None if plan.enough or take.way.elsewhere else _served(plan)
    if elsewhere is not None:
        yield f"Or: {described(elsewhere.way, _stored(plan))}."
        yield from _typed(plan, elsewhere)


def _served(plan: Plan) -> Placement | None:
    """The way with another machine, where that makes the GPUs of this one enough."""
    served = (one for one in plan.placements if one.way.elsewhere and one.way.here <= plan.gpus)
    return next((one for one in served if one.fits), None)


def _floor(plan: Plan, take: Placement) -> Iterator[str]:
    if take.seconds is None or plan.plain_seconds is None:
        return
    beyond = ""
    if take.unpacked_seconds is not None:
        many = _ms(take.unpacked_seconds)
        beyond = f"; {many} where its library unpacks each matrix to bf16 first, for many rows"
    plain = _ms(plan.plain_seconds)
    yield f"A guided step takes at least {_ms(take.seconds)}{beyond}; a plain one {plain}."


def _typed(plan: Plan, placement: Placement) -> Iterator[str]:
    """The commands of a way, under the machine that they are for where there are two."""
    machine = None
    for command in commands(plan, placement):
        where = f"on {HOST}" if command.there else f"here, with {KEYS}.client from {HOST}"
        if placement.way.elsewhere and where != machine:
            machine = where
            yield f"  # {where}"
        yield f"  {command}"


def _nothing_fits(plan: Plan) -> Iterator[str]:
    yield f"Nothing fits GPUs of {plan.card.name}, however many of them."
    alone = [one for one in plan.placements if one.way.place is Place.ONE_GPU]
    on_one = min(alone, key=lambda one: one.fullest.bytes)
    for placement in dict.fromkeys((plan.smallest, on_one)):
        words, count = described(placement.way, _stored(plan)), placement.way.total
        cards = "one card" if count == 1 else f"{count} cards"
        needed = _gib(card_for(placement.fullest.bytes))
        yield f"Smallest on {cards}: {words}, which needs {needed} GiB of each."


def _counted(plan: Plan) -> Iterator[str]:
    yield (
        f"Counted: weights and caches in bf16 where nothing else is said; of the fullest GPU; "
        f"rest: activations of a forward of {plan.work.forward_tokens:,} tokens (prompts go "
        f"through {MOST_FORWARD_TOKENS:,} at a time at most), logits, CUDA graphs."
    )
    yield (
        f"Assumed: {1 - USABLE:.0%} of a card goes to CUDA, the framework and fragments (vLLM's "
        "own default), and 1 GiB to a second process on it. Rows: the largest batch that fits. "
        "Floor: bytes that a step has to read, at the data sheet's bandwidth; good kernels come "
        "within 10 to 20% of it, and a network's round trip comes on top."
    )
    for note in plan.notes:
        yield f"Note: {note}."


def _stored(plan: Plan) -> str | None:
    return next((model.stored for model in plan.pair.scorer if model.stored is not None), None)


def _gib(count: int) -> str:
    value = count / GIB
    return f"{value:.1f}" if value >= 0.1 else f"{value:.3f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def plan_fields(plan: Plan) -> dict[str, Any]:
    """The plan for programs: bytes and seconds."""
    card, work = plan.card, plan.work
    return {
        "policy": _model_fields(plan.pair.policy),
        "scorer": {"kind": plan.kind, "models": [_model_fields(m) for m in plan.pair.scorer]},
        "work": {
            "batch": work.batch,
            "length": work.length,
            "top_k": work.top_k,
            "cache_tokens": work.cache_tokens,
        },
        "gpu": {
            "name": card.name,
            "bytes": card.bytes,
            "usable_bytes": plan.usable,
            "bandwidth": card.bandwidth,
            "assumed": card.assumed,
            "count": plan.gpus,
        },
        "plain_floor_seconds": plan.plain_seconds,
        "ways": [_placement_fields(plan, placement) for placement in plan.placements],
        "take": None if plan.take is None else plan.placements.index(plan.take),
        "enough_gpus": plan.enough,
        "smallest": plan.placements.index(plan.smallest),
        "smallest_card_bytes": card_for(plan.smallest.fullest.bytes),
        "notes": list(plan.notes),
    }


def way_fields(way: Way) -> dict[str, Any]:
    """An arrangement for programs."""
    return {
        "way": str(way.place),
        "form": way.form.name,
        "quantization": way.form.name if way.form.bits < 16 else None,
        "gpus": way.here,
        "gpus_elsewhere": way.elsewhere,
        "scorer_shards": way.shards,
        "policy_shards": way.policy_shards,
        "beside": way.beside,
    }


def _placement_fields(plan: Plan, placement: Placement) -> dict[str, Any]:
    return {
        **way_fields(placement.way),
        "described": described(placement.way, _stored(plan)),
        "fits": placement.fits,
        "rows": placement.rows,
        "floor_seconds": placement.seconds,
        "floor_seconds_unpacked": placement.unpacked_seconds,
        "placement": [
            {
                "gpus": gpu.count,
                "bytes": gpu.bytes,
                "policy": _load_fields(gpu.policy),
                "scorer": _load_fields(gpu.scorer),
            }
            for gpu in placement.gpus
        ],
        "commands": [
            {"for": one.role, "elsewhere": one.there, "command": str(one)}
            for one in commands(plan, placement)
        ],
    }


def _model_fields(model: PlannedModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "architecture": model.architecture or None,
        "parameters": model.parameters,
        "weight_bytes": model.weight_bytes(),
        "kv_bytes_per_token": model.kv_bytes(),
        "quantised": model.stored,
    }


def _load_fields(load: Load) -> dict[str, int]:
    return {"weights": load.weights, "cache": load.cache, "activations": load.activations}
