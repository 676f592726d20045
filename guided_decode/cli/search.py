"""`guided-decode search`: methods that judge whole pieces of responses, over a file of prompts."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from guided_decode.checkpoints.registry import find
from guided_decode.cli import model_options as models
from guided_decode.cli import row_options
from guided_decode.cli.ahead_file import Ahead
from guided_decode.cli.chats import format_of
from guided_decode.cli.checkpoints import NOT_REMOTE, follow_if_not_leading
from guided_decode.cli.config_option import Config, calibrated_beta
from guided_decode.cli.engine_options import EngineOptions
from guided_decode.cli.errors import Refusal, report
from guided_decode.cli.jsonl import STDIN
from guided_decode.cli.judge_options import JudgeOptions, check_judging
from guided_decode.cli.remote_options import RemoteOptions, refuse_placement, refuse_unmet
from guided_decode.cli.score_run import STDOUT, open_output, score_rest
from guided_decode.cli.search_models import SearchModels, loads_scorer, named
from guided_decode.cli.search_options import BudgetOptions, MethodOptions
from guided_decode.cli.search_plan import print_settings, read_plan
from guided_decode.cli.search_rows import read_search_rows
from guided_decode.search.driver import SINGLE_TOKENS
from guided_decode.search.method_table import METHODS

Source = Annotated[
    Path | None,
    typer.Argument(metavar="[INPUT]", help="prompts: .jsonl has a chat a line, and so has -, "
                   "stdin; any other file is one message")]  # fmt: skip
Name = Annotated[str, typer.Option("--method", metavar="NAME", help=", ".join(METHODS))]
Text = Annotated[str | None, typer.Option(help="one message, instead of a file")]
Output = Annotated[
    Path,
    typer.Option("--output", metavar="FILE", help="JSONL: a line for each prompt; kept and "
                 "continued; - is stdout")]  # fmt: skip
Answer = Annotated[
    str | None,
    typer.Option(metavar="final|boxed|number|MODULE:FUNCTION",
                 help="the answer in a response, for a vote at the end \\[final, where the method "
                 "is a vote]")]  # fmt: skip
Longest = Annotated[
    int | None, typer.Option(min=1, help="tokens of the longest response \\[the method's own]")
]
Batch = Annotated[int, typer.Option("--batch", min=1, help="prompts that are searched at once")]
Raw = Annotated[bool, typer.Option("--raw", help="prompts are text as it is, not chats")]
Seed = Annotated[int, typer.Option(min=-(2**63), max=2**63 - 1, help="of all draws")]
Listing = Annotated[
    bool, typer.Option("--list-settings", help="print the method's settings and their defaults")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="begin again instead of going on")]
_AS_HERE = JudgeOptions()
_AS_IT_IS, _NO_SETTINGS, _NO_LIMITS = models.ScorerOptions(), MethodOptions(), BudgetOptions()
_LOCAL = EngineOptions()


def search(
    method: Name,
    source: Source = None,
    prompt: Text = None,
    output: Output = STDOUT,
    policy: models.Policy = None,
    scorer: models.SearchScorer = None,
    engine: EngineOptions = _LOCAL,
    settings: MethodOptions = _NO_SETTINGS,
    list_settings: Listing = False,
    answer: Answer = None,
    max_new_tokens: Longest = None,
    limits: BudgetOptions = _NO_LIMITS,
    seed: Seed = 0,
    batch: Batch = 8,
    raw: Raw = False,
    prompt_format: row_options.PromptFormat = None,
    on_error: row_options.OnError = row_options.Failing.STOP,
    overwrite: Overwrite = False,
    device: models.Device = None,
    scorer_device: models.ScorerDevice = None,
    dtype: models.Dtype = "auto",
    reading: models.ScorerOptions = _AS_IT_IS,
    remote: RemoteOptions = NOT_REMOTE,
    judging: JudgeOptions = _AS_HERE,
    config: Config = None,
) -> None:
    """Search for the best response to each prompt, by a published method and at a stated budget.

    An output line has the chosen response, every candidate with its scores, and the costs. Run
    again, it goes on where it stopped. Without models: tiny-tulu, which is built in.
    """
    if list_settings:
        print_settings(method)
        return
    if method == "smc" and settings.beta is None:
        settings = replace(settings, beta=calibrated_beta(config))
    plan = read_plan(method, settings, answer, max_new_tokens, limits, seed)
    engine.check(policy, plan.settings.get("kl_coef"))
    names = named(plan, policy, scorer, reading)
    plan = plan.ending(find(names[0]))
    check_judging(names[1], reading, judging)
    if judging.judge_through_text and plan.method.per_token(plan.settings):
        raise Refusal(f"--judge-through-text came with --method {method}: {SINGLE_TOKENS}")
    refuse_unmet(names[1], remote)
    engine.check_placement(device, dtype, scorer_here=loads_scorer(names[1], reading))
    if names[1] is None and scorer_device is not None:
        raise Refusal(f"--scorer-device {scorer_device} came with --method {method}, which asks no "
                      "scorer: drop it")  # fmt: skip
    if names[1] is not None:
        refuse_placement(names[1], scorer_device=scorer_device)
        follow_if_not_leading(names[1], reading, dtype)
    if raw and prompt_format is not None:
        raise Refusal(f"--raw takes text as it is, so --prompt-format {prompt_format} has nothing "
                      "to say: drop one of them")  # fmt: skip
    skip = on_error is row_options.Failing.SKIP
    rows = read_search_rows(source, prompt, skip=skip)
    text_format = format_of(prompt_format, find(names[0]))
    asked = SearchModels(
        *names, reading, remote, device, scorer_device, dtype, text_format, raw, judging, engine
    )
    served, connected = asked.served(), asked.connected()
    run = asked.identity(plan, served, connected)
    with open_output(source or STDIN, output, rows, run, overwrite) as file:
        ahead = Ahead(output, run, overwrite=overwrite)
        if file.done < len(rows):
            job = asked.job(plan, served, connected, ahead, run, skip)
            file.begin()
            with job.generator:
                score_rest(job, rows, file, batch, doing="searching", done_so="prompts are done",
                           beside=job.columns())  # fmt: skip
        ahead.settle(rows)
        if output != STDOUT:
            print(f"{len(rows) - file.failed} prompts are done in {file.path}", file=sys.stderr)
        if file.failed:
            report(f"{file.failed} of {len(rows)} have no result")
            raise typer.Exit(1)
