"""`guided-decode ablate`: which method, at which settings, at what price, with intervals."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer

from guided_decode.cli.ablate.cell import Cell
from guided_decode.cli.ablate.cells import cells_of
from guided_decode.cli.ablate.example import EXAMPLE
from guided_decode.cli.ablate.models import Group, grouped
from guided_decode.cli.ablate.plan import print_plan
from guided_decode.cli.ablate.prompts import check_answers, read_prompts
from guided_decode.cli.ablate.reading import read_ablation
from guided_decode.cli.ablate.rewards import checked_reward
from guided_decode.cli.ablate.run import REWARDS, UNITS, Run, progress
from guided_decode.cli.ablate.schema import Ablation
from guided_decode.cli.ablate.words import in_keys
from guided_decode.cli.checkpoints import load_tokenizer
from guided_decode.cli.config_file import refuse
from guided_decode.cli.errors import INTERRUPTED, Refusal, one_line
from guided_decode.cli.search_models import policy_ids
from guided_decode.cli.search_rows import SearchRow
from guided_decode.cli.yaml_lines import Problems
from guided_decode.lab.ablate.runner import Abandoned
from guided_decode.lab.ablate.store import Store

# Prompts whose tokens are counted for an estimate.
_COUNTED = 100

Config = Annotated[
    Path | None,
    typer.Argument(metavar="CONFIG.yaml", help="what is tried on what; --init prints one that is "
                   "commented")]  # fmt: skip
Output = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="where everything goes, and a run goes on from \\[the file's "
                 "output]")]  # fmt: skip
Limit = Annotated[int | None, typer.Option(min=1, help="of the prompts, so many: for a trial")]
Parallel = Annotated[
    int | None,
    typer.Option(min=1, help="units under way at once, of policies on servers \\[the file's]"),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="print the grid and what it costs at most; run nothing")
]
Init = Annotated[bool, typer.Option("--init", help="print a commented example of a file")]
NoPlots = Annotated[bool, typer.Option("--no-plots", help="draw no pictures")]


def ablate(
    config: Config = None,
    output: Output = None,
    limit: Limit = None,
    parallel: Parallel = None,
    dry_run: DryRun = False,
    init: Init = False,
    no_plots: NoPlots = False,
) -> None:
    """Compare decoding methods over a grid of settings, as a file asks.

    Policies, scorers, methods, betas, ks, budgets and seeds, over a file of
    prompts, with rewards that are verified or a reward model's. What is
    finished is kept: killed at any moment, the same command goes on, and
    computes nothing twice. It writes every response with its costs (JSONL), a
    table (CSV, Markdown) with bootstrap intervals and paired tests against
    plain decoding, and plots of quality against KL, tokens and seconds.

    The file's keys: prompts, reward, policies, scorers, methods, seeds,
    max_new_tokens, block, parallel, equal_cost, counting, output. An example
    with a comment on each: --init.
    """
    if init:
        print(EXAMPLE, end="")
        return
    if config is None:
        raise Refusal("expected a file: CONFIG.yaml, or --init for an example of one")
    # A file that is changed while it runs is not what ran.
    text = config.read_bytes() if config.is_file() else b""
    ablation, rows, cells = _read(config, limit)
    if not (no_plots or dry_run):
        from guided_decode.lab.demo.plot import require_matplotlib

        require_matplotlib()
    folder = output or (None if ablation.output is None else Path(ablation.output))
    if folder is None and not dry_run:
        raise Refusal(f"{config} has no output, a folder: pass --output DIR")
    ablation.parallel = parallel or ablation.parallel
    raw = bool(ablation.prompts and ablation.prompts.given.get("raw"))
    groups = grouped(cells, raw=raw)
    prompt_tokens = _prompt_tokens(cells, rows, raw)
    if dry_run:
        done = None if folder is None else _done(ablation, rows, cells, groups, folder)
        print_plan(ablation, cells, len(rows), prompt_tokens, done)
        return
    assert folder is not None
    with Store(folder, (UNITS, REWARDS)) as store:
        run = Run(ablation, rows, cells, groups, store, prompt_tokens, limit)
        _run(run, config, text, not no_plots)


def _read(config: Path, limit: int | None) -> tuple[Ablation, list[SearchRow], list[Cell]]:
    """What the file asks for. Raises Refusal: all that is wrong with it, by line."""
    ablation, problems = read_ablation(config)
    rows: list[SearchRow] = []
    if ablation.prompts is not None and not any(
        line == ablation.prompts.line and said.startswith("prompts") for line, said in problems
    ):
        rows = _rows(ablation, limit, problems)
    if ablation.reward is not None:
        try:
            ablation.reward = checked_reward(ablation.reward)
            check_answers(rows, ablation.reward, ablation.reward.line, problems)
        except (Refusal, ValueError, ImportError) as error:
            said = in_keys(one_line(error))
            problems.append((ablation.reward.line, f"reward: {said.removeprefix('reward: ')}"))
    cells = cells_of(ablation, problems)
    refuse(config, problems)
    return ablation, rows, cells


def _rows(ablation: Ablation, limit: int | None, problems: Problems) -> list[SearchRow]:
    assert ablation.prompts is not None
    try:
        return read_prompts(ablation.prompts)[:limit]
    except (Refusal, OSError) as error:
        problems.append((ablation.prompts.line, one_line(error)))
        return []


def _prompt_tokens(cells: list[Cell], rows: list[SearchRow], raw: bool) -> float:
    """Of a prompt, on average, as the first policy reads it."""
    cell = cells[0]
    tokenizer = load_tokenizer(
        cell.policy.model, f"policy {cell.policy.label}",
        trust_remote_code=cell.reading.trust_remote_code,
    )  # fmt: skip
    return fmean(
        len(policy_ids(tokenizer, cell.text_format, raw, row.messages)) for row in rows[:_COUNTED]
    )


def _done(
    ablation: Ablation, rows: list[SearchRow], cells: list[Cell], groups: list[Group], folder: Path
) -> int | None:
    """Units that the folder has; None: whether they are these, servers would have to say."""
    if any(group.elsewhere for group in groups):
        return None
    run = Run(ablation, rows, cells, groups, Store(folder), 0.0)
    run.find()
    return len(run.every) - sum(map(len, run.missing))


def _run(run: Run, config: Path, text: bytes, plots: bool) -> None:
    from guided_decode.cli.ablate.report import write_report

    try:
        for group in run.groups:
            group.connect()
        run.find()
        run.check_reward()
        bar, finished, rewarded = progress(run)
        with bar:
            try:
                run.decode(finished)
                run.judge(rewarded)
            except KeyboardInterrupt as error:
                bar.stop()
                _say_interrupted(run)
                if isinstance(error, Abandoned):
                    # What is finished is on the disk; a usual exit waits for the threads.
                    sys.stderr.flush()
                    os._exit(INTERRUPTED)
                raise typer.Exit(INTERRUPTED) from None
    finally:
        for group in run.groups:
            group.close()
    write_report(run, config, text, plots=plots)
    print(f"{len(run.cells)} settings on {len(run.rows)} prompts are in {run.store.folder}",
          file=sys.stderr)  # fmt: skip


def _say_interrupted(run: Run) -> None:
    done = sum(run.store.has(UNITS, task.unit.key) for task in run.every)
    print(f"interrupted: {done} of {len(run.every)} units are done in {run.store.folder}; the same "
          "command goes on from there", file=sys.stderr)  # fmt: skip
