"""`guided-decode doctor`: whether guidance works on this machine, and what keeps it from that."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from guided_decode.cli.doctor.examination import examine
from guided_decode.cli.doctor.finding import Finding, as_text, works

Json = Annotated[bool, typer.Option("--json", help="as one JSON object")]
NoVllm = Annotated[bool, typer.Option("--no-vllm", help="leave vLLM out, also where it is there")]
TimeLimit = Annotated[float, typer.Option(min=1, help="seconds that one check may take")]


def doctor(no_vllm: NoVllm = False, as_json: Json = False, time_limit: TimeLimit = 300.0) -> None:
    """Check this machine and these versions, and print a block to paste into an issue.

    Exit code 1 where guidance does not work, in transformers or in the vLLM that is installed.
    """
    findings: list[Finding] = []
    for finding in examine(with_vllm=not no_vllm, limit=time_limit):
        findings.append(finding)
        if sys.stderr.isatty():
            print(f"\r\033[K{len(findings)} checks, {finding.check} ...", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    fine = works(findings)
    if as_json:
        checks = [each.as_dict() for each in findings]
        print(json.dumps({"works": fine, "checks": checks}, indent=2, ensure_ascii=False))
    else:
        print(as_text(findings))
    raise typer.Exit(0 if fine else 1)
