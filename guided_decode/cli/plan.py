"""`guided-decode plan`: what fits where, which way to take, and how fast a step can be."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from guided_decode.checkpoints.plan.cards import find_card
from guided_decode.checkpoints.plan.footprint import Workload
from guided_decode.checkpoints.plan.placement import make_plan
from guided_decode.checkpoints.plan.weight_forms import FORMS
from guided_decode.cli.plan_report import TABLE_WIDTH, plan_fields, print_plan
from guided_decode.cli.terminal import console

_NAME = "registered name, folder, or config.json"
_MOST = 2**31 - 1

Policy = Annotated[str, typer.Argument(help=f"{_NAME} of the policy")]
Scorer = Annotated[str, typer.Argument(help=f"{_NAME} of the scorer")]
Gpu = Annotated[str, typer.Option(help="its memory, 80GB, or its name: H100, H200, L40S, ...")]
Gpus = Annotated[int, typer.Option(min=1, max=1024, help="how many there are")]
Bandwidth = Annotated[
    float | None, typer.Option(help="of the GPU, in TB/s \\[its data sheet's]", metavar="TB/S")
]
Quantization = Annotated[
    str | None,
    typer.Option(help="the form to consider \\[bnb-8bit, bnb-4bit]", metavar="|".join(FORMS)),
]
Batch = Annotated[int, typer.Option(min=1, max=_MOST, help="rows that are decoded at once")]
Length = Annotated[
    int, typer.Option(min=1, max=_MOST, help="tokens of the longest prompt with its answer")
]
TopK = Annotated[int, typer.Option(min=1, max=_MOST, help="candidates a row and step")]
Kind = Annotated[str | None, typer.Option(help="the scorer's family \\[auto]")]
Reference = Annotated[str | None, typer.Option(help="of an implicit reward \\[the registry's]")]
Json = Annotated[bool, typer.Option("--json", help="as one JSON object, in bytes and seconds")]

_WORK = Workload()


def plan(
    policy: Policy,
    scorer: Scorer,
    gpu: Gpu = "80GB",
    gpus: Gpus = 1,
    bandwidth: Bandwidth = None,
    quantization: Quantization = None,
    batch: Batch = _WORK.batch,
    length: Length = _WORK.length,
    top_k: TopK = _WORK.top_k,
    kind: Kind = None,
    reference: Reference = None,
    as_json: Json = False,
) -> None:
    """What fits where, which way to take, and a step's floor: from shapes, nothing is loaded."""
    found = make_plan(
        policy,
        scorer,
        find_card(gpu, None if bandwidth is None else bandwidth * 1e12),
        Workload(batch, length, top_k),
        gpus=gpus,
        quantization=quantization,
        kind=kind,
        reference=reference,
    )
    if as_json:
        print(json.dumps(plan_fields(found), indent=2))
    else:
        print_plan(found, console(at_least=TABLE_WIDTH))
