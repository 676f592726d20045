"""report.md and report.json of all records, written anew whenever some have come."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.device import assumed_rates
from benchmarks.gpu.targets import verdicts

Record = dict[str, Any]

_NOTES = """\
Weights are random, of the real shapes, in bf16; no row ends. Prompts' keys and values are drawn at
random instead of computed, but for the check of agreement and for `generate`. All ways but
`generate` run in one loop, whose policy step is a CUDA graph too; a step's time is the host's,
until the next token ids are there. Ways of a cell take turns (those that copy or recompute follow),
and ratios are medians of the rounds' ratios.

Floor: the larger of bytes (weights, keys and values read) over the measured copy bandwidth and
operations over the measured bf16 rate; the policy's and the critic's forwards added. Gated: a
random policy is never sure, so a script raises the top logit of 7 steps in 10 above the gate of
0.9, and the gate finds them itself. Pruning: the margin is so wide that no row goes; the decision
is made and comes to the host. Graphs replayed a step: 1 for the policy and 1 for a critic; less is
a step that launched kernels from the host."""

_VLLM_NOTES = """\
Two engines share the GPU, without and with the processor, tiny-tulu as policy and critic. The ways
of a cell take turns; ratios of seconds are taken within a round: median (least–most). Latency: the
median gap between two tokens of an unguided request. Host: a guided row and step in the processor
and the scorer, with the waits for the device. Preempted: requests in a turn, by vLLM's own count.
Full: the KV cache holds half of the requests. Before a cell is timed, unguided requests got the
plain engine's tokens, or others from a near tie (0.5 nats) on, which bf16 leaves to the batch."""


def write(records: Sequence[Record], about: Record, folder: Path) -> None:
    """Both files; about: date, command, machine, seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [asdict(each) for each in verdicts(records)]
    whole = {**about, "targets": found, "records": list(records)}
    text = json.dumps(whole, indent=1, ensure_ascii=False, default=str) + "\n"
    (folder / "report.json").write_text(text)
    (folder / "report.md").write_text("\n".join(markdown(records, about)) + "\n")


def markdown(records: Sequence[Record], about: Record) -> list[str]:
    """The report's lines."""
    lines = ["# GPU check", "", *_facts(records, about), "", "## Targets", "", *_targets(records)]
    lines += ["", "## Tests", "", *_tests(records)]
    if any(record["kind"] == "kernel" for record in records):
        lines += ["", "## Kernels", "", *_kernels(records)]
    if any(record["kind"] == "decoding" for record in records):
        lines += ["", "## Decoding", "", _NOTES, "", *_decoding(records)]
    if any(record["kind"] == "inside" for record in records):
        lines += ["", "## Inside a step", "", *_inside(records)]
    if any(record["kind"] == "vllm" for record in records):
        lines += ["", "## vLLM", "", _VLLM_NOTES, "", *_vllm(records)]
    problems = [record for record in records if record["kind"] == "not run"]
    if problems:
        lines += ["", "## Not run", "", *(line for record in problems for line in _problem(record))]
    return lines


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    body = (f"| {' | '.join(row)} |" for row in rows)
    return [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *body]


def number(value: float | None, digits: int = 2) -> str:
    return "—" if value is None else f"{value:,.{digits}f}"


def _facts(records: Sequence[Record], about: Record) -> list[str]:
    machine = about["machine"]
    gpu = machine["gpu"] or "none: only what compiles without one was run"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"- date: {about['date']}; {_took(about['seconds'])}",
        f"- command: `{about['command']}`",
        f"- GPU: {gpu}",
        f"- versions: {versions}",
    ]
    names = ("capability", "multiprocessors", "memory_gb", "l2_mb", "cuda", "driver")
    if machine["gpu"]:
        lines.append("- device: " + ", ".join(f"{name} {machine[name]}" for name in names))
    rates = [record for record in records if record["kind"] == "rates"]
    if machine["gpu"] and not rates:
        assumed, flops = assumed_rates(machine["gpu"])
        lines.append(
            f"- rates were not measured; floors assume a copy of {assumed / 1e12:.1f} TB/s and a "
            f"bf16 product of {flops / 1e12:.0f} TFLOP/s"
        )
    for rate in rates:
        lines.append(
            f"- measured: copy {rate['bytes'] / 1e12:.2f} TB/s (read and written), bf16 product "
            f"{rate['flops'] / 1e12:.0f} TFLOP/s"
        )
    agreed = [record for record in records if record["kind"] == "agreement"]
    holding = [record for record in agreed if record["reason"] is None]
    if holding:
        ways = ", ".join(record["way"] for record in holding)
        largest = max(record["difference"] for record in holding)
        lines.append(f"- agree with full recomputation in float32, to {largest:.1g}: {ways}")
    lines += [
        f"- **does not agree with full recomputation, and was not timed: {record['way']}**: "
        f"{record['reason']}"
        for record in agreed
        if record["reason"] is not None
    ]
    return lines


def _took(seconds: float | None) -> str:
    return "the run was cut short" if seconds is None else f"{seconds:.0f} s"


def _targets(records: Sequence[Record]) -> list[str]:
    rows = [(v.target, v.bound, number(v.figure, 3), v.word) for v in verdicts(records)]
    return table(("target", "asked", "measured", ""), rows)


def _tests(records: Sequence[Record]) -> list[str]:
    suites = [record for record in records if record["kind"] == "tests"]
    heads = ("file", "what", "passed", "failed", "skipped", "seconds")
    rows = [
        (s["file"], s["what"], *(str(s[n]) for n in heads[2:5]), f"{s['seconds']:.0f}")
        for s in suites
    ]
    lines = table(heads, rows)
    for suite in suites:
        for failure in suite["failures"]:
            lines += ["", f"**{suite['file']}: {failure['test']}**", *_quoted(failure["text"])]
        if suite["problem"]:
            lines += ["", f"**{suite['file']} ({suite['what']})**", *_quoted(suite["problem"])]
    return lines


def _quoted(text: str) -> list[str]:
    return ["", "```", *text.splitlines(), "```"]


def _kernels(records: Sequence[Record]) -> list[str]:
    def also(kind: str, record: Record) -> Record | None:
        keys = ("kernel", "shape")
        same = (r for r in records if r["kind"] == kind and all(r[k] == record[k] for k in keys))
        return next(same, None)

    rows = []
    for record in (record for record in records if record["kind"] == "kernel"):
        compiled, launched = also("compiled", record), also("launches", record)
        others = (f"{k}: {v if isinstance(v, str) else number(v, 1)}"
                  for k, v in record["others"].items())  # fmt: skip
        rows.append(
            (
                record["kernel"],
                record["shape"],
                f"{record['error']:.1g}",
                f"{record['microseconds']:.1f} ({record['least']:.1f}–{record['most']:.1f})",
                f"{100 * record['share_of_copy']:.0f}%",
                number(record["eager_microseconds"], 1),
                number(compiled and compiled["microseconds"], 1),
                "; ".join(others) or "—",
                "—" if launched is None else f"{launched['ours']} of {launched['eager']}",
            )
        )
    heads = ("kernel", "shape", "error", "µs", "of copy bandwidth", "eager µs", "torch.compile µs",
             "others µs", "launches, of eager's")  # fmt: skip
    return table(heads, rows)


def _decoding(records: Sequence[Record]) -> list[str]:
    timed = [record for record in records if record["kind"] == "decoding"]

    def cell(record: Record) -> tuple[Any, ...]:
        return record["model"], record["batch"], record["prefix"]

    stock = {cell(record): record["ms"] for record in timed if record["way"] == "generate"}
    rows = []
    for record in timed:
        base = stock.get(cell(record))
        rows.append(
            (
                *map(str, cell(record)),
                record["way"],
                f"{record['ms']:.2f} ({record['ms_least']:.2f}–{record['ms_most']:.2f})",
                number(record["floor_ms"]),
                number(record["over_floor"]),
                number(record["over_plain"]),
                number(None if base is None else record["ms"] / base),
                number(record["over_guided"]),
                number(record["graphs"], 1),
                " + ".join(map(str, record["merged"])) or "—",
            )
        )
    heads = ("model", "batch", "prefix", "way", "ms a step", "floor ms", "of floor", "of plain",
             "of generate", "of ours at this k", "graphs a step", "layers merged")  # fmt: skip
    return table(heads, rows)


def _inside(records: Sequence[Record]) -> list[str]:
    lines = []
    for record in (record for record in records if record["kind"] == "inside"):
        parts = ", ".join(f"{k} {v:.2f} ms" for k, v in record["parts_ms"].items())
        lines += [f"**{record['cell']}, {record['way']}**: {parts} (each waited for)"]
        if "device_ms" in record:
            lines[-1] += (
                f"; the device is busy for {record['device_ms']:.2f} ms in "
                f"{record['kernels_a_step']:.0f} kernels; the host waits {record['host_waits']} "
                "times"
            )
            rows = [(k["name"].replace("|", "/"), number(k["count"], 1), number(k["ms"], 3))
                    for k in record["slowest"]]  # fmt: skip
            lines += ["", *table(("kernel", "a step", "ms"), rows), ""]
        if "error" in record:
            lines.append(f"not profiled: {record['error']}")
    return lines


def _vllm(records: Sequence[Record]) -> list[str]:
    lines = []
    for record in (record for record in records if record["kind"] == "vllm engines"):
        for name, facts in record["engines"].items():
            lines.append(f"- {name}: " + ", ".join(f"{k} {v}" for k, v in facts.items()))
        lines.append(f"- unguided requests that parted at a near tie: {record['near_ties']}")
        lines += [f"- {'met' if t['met'] else 'not met'}: {t['target']}" for t in record["targets"]]
    rows = [
        (
            str(r["prompt"]),
            str(r["concurrency"]),
            "full" if r["full"] else "roomy",
            r["way"],
            number(r["tokens_per_second"], 0),
            f"{r['over_plain']:.2f} ({r['least']:.2f}–{r['most']:.2f})",
            str(len(r["seconds_over_plain"])),
            number(r["unguided_latency_ms"]),
            number(r["host_microseconds_a_row"], 0),
            number(r["preemptions"], 0),
        )
        for r in records
        if r["kind"] == "vllm"
    ]
    heads = ("prompt", "concurrency", "KV cache", "way", "tokens/s", "seconds over plain", "rounds",
             "unguided latency ms", "host µs a row", "preempted")  # fmt: skip
    return [*lines, "", *table(heads, rows)]


def _problem(record: Record) -> list[str]:
    ways = f" ({', '.join(record['ways'])})" if record.get("ways") else ""
    first, *rest = record["reason"].splitlines()
    line = f"- {record['what']}{ways}: not run: {first}"
    return [line, *_quoted("\n".join(rest)), ""] if rest else [line]
