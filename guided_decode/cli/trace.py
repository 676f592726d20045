"""`guided-decode trace`: a page that shows each token of a response and what else there was."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from guided_decode.checkpoints.registry import find
from guided_decode.cli import model_options as models
from guided_decode.cli import row_options
from guided_decode.cli.chats import format_of
from guided_decode.cli.checkpoints import (
    NOT_REMOTE,
    Policy,
    known_as,
    load_policy,
    open_scorer,
    pair,
)
from guided_decode.cli.config_option import Config
from guided_decode.cli.decoding import Sampling, Setup, terminal_ids
from guided_decode.cli.errors import Refusal
from guided_decode.cli.guidance_options import GuidanceOptions, chosen_for
from guided_decode.cli.jsonl import STDIN
from guided_decode.cli.prompt_formats import warn_of_another_format
from guided_decode.cli.prompts_in import read_prompts
from guided_decode.cli.remote_options import RemoteOptions, refuse_placement
from guided_decode.cli.rollout_ids import RolloutReader
from guided_decode.cli.trace_rows import TraceRow, read_trace_rows
from guided_decode.scoring.remote.address import is_address

Source = Annotated[
    Path | None,
    typer.Argument(metavar="[INPUT]", help="JSONL of prompts, of responses, or what search or "
                   "generate --json wrote; any other file is one message; - is stdin")]  # fmt: skip
Text = Annotated[str | None, typer.Option(help="one message, instead of a file")]
Output = Annotated[Path, typer.Option(metavar="FILE", help="the page; - is stdout")]
Line = Annotated[
    list[int] | None,
    typer.Option("--line", min=1, help="of the input, by its number; may be repeated \\[the "
                 "first ones]")]  # fmt: skip
Limit = Annotated[int, typer.Option("--limit", min=1, help="prompts on the page, at most")]
Temperature = Annotated[float, typer.Option(help="of what is decoded; 0 is greedy")]
Longest = Annotated[int, typer.Option(help="tokens of the longest answer that is decoded")]
Raw = Annotated[bool, typer.Option("--raw", help="prompts are text as it is, not chats")]

_AS_IT_IS, _NO_OPTIONS = models.ScorerOptions(), GuidanceOptions()


def trace(
    source: Source = None,
    prompt: Text = None,
    output: Output = Path("trace.html"),
    line: Line = None,
    limit: Limit = 8,
    policy: models.Policy = None,
    scorer: models.Scorer = None,
    device: models.Device = None,
    scorer_device: models.ScorerDevice = None,
    dtype: models.Dtype = "auto",
    reading: models.ScorerOptions = _AS_IT_IS,
    remote: RemoteOptions = NOT_REMOTE,
    guidance: GuidanceOptions = _NO_OPTIONS,
    temperature: Temperature = 0.0,
    seed: row_options.Seed = 0,
    max_new_tokens: Longest = 256,
    raw: Raw = False,
    prompt_format: row_options.PromptFormat = None,
    config: Config = None,
) -> None:
    """Write a page that shows why: tokens by advantage, their candidates, the value as it goes.

    A prompt is decoded plainly and guided, side by side; a response that the input has is looked at
    as it is, and a search's are shown as the tree that they make. One HTML file, without network.
    """
    if reading.tp_plan is not None:
        raise Refusal("--tp-plan came, and trace decodes in one process: serve the scorer with "
                      "guided-decode scorer, and pass its address")  # fmt: skip
    names = pair(policy, scorer, head=reading.head)
    refuse_placement(names[1], scorer_device=scorer_device)
    if not is_address(names[1]):
        guidance.over(chosen_for(names[1], guidance.rule))
    reading = guidance.reading(reading)
    sampling = Sampling(temperature, 1, max_new_tokens, seed)
    _check_output(output)
    rows = _rows(source, prompt, raw, line or (), limit)
    # A head on the policy's hidden states reads them with the adapter in it.
    own = reading.adapter if reading.head is not None and names[0] == names[1] else None
    loaded = load_policy(
        names[0], device, dtype, adapter=own, trust_remote_code=reading.trust_remote_code
    )
    critic = open_scorer(
        names[1], reading, device=scorer_device or device, dtype=dtype, policy=loaded,
        remote=remote,
    )  # fmt: skip
    known, own_format = known_as(critic, names[1]), format_of(prompt_format, find(names[0]))
    if not raw:
        warn_of_another_format(loaded.tokenizer, own_format, known, reading.bos)
    rule = guidance.over(chosen_for(known, guidance.rule))
    setup = Setup(loaded, critic, rule, sampling, raw, own_format)
    decoding = {"temperature": temperature, "seed": seed, "max_new_tokens": max_new_tokens}
    _write(output, _page(setup, known, rows, decoding))
    if output != STDIN:
        print(f"the page is {output}: open it in a browser", file=sys.stderr)


def _rows(
    source: Path | None, prompt: str | None, raw: bool, lines: Any, limit: int
) -> list[TraceRow]:
    if source is not None and prompt is None and (source == STDIN or source.suffix == ".jsonl"):
        return read_trace_rows(source, lines, limit)
    if lines:
        raise Refusal(f"--line {lines[0]} came without a file of lines: expected one that ends in "
                      ".jsonl, or - for stdin")  # fmt: skip
    if source is None and prompt is None:
        raise Refusal("expected a prompt: pass a file, - for stdin, or --prompt TEXT")
    try:
        return [TraceRow(each.where or "the prompt", "", each.messages)
                for each in read_prompts(prompt, source, raw=raw)]  # fmt: skip
    except Refusal as error:
        raise Refusal(str(error).replace("--file", f"INPUT {source}")) from error


def _page(setup: Setup, scorer: str, rows: list[TraceRow], decoding: dict[str, int | float]) -> str:
    from guided_decode.cli.trace_run import Tracer, warn_of_other_logits
    from guided_decode.lab.trace.html_page import page
    from guided_decode.lab.trace.record import Trace

    policy: Policy = setup.policy
    warn_of_other_logits(policy.model)
    vocabulary = int(policy.model.config.get_text_config().vocab_size)
    reader = RolloutReader(
        policy.tokenizer, setup.prompt_format, setup.raw, terminal_ids(policy.model), vocabulary
    )
    tracer = Tracer(setup, reader)
    prompts = []
    for row in rows:
        try:
            prompts.append(tracer.prompt(row))
        except (ValueError, Refusal) as error:
            # What is wrong with a line says so itself.
            where = "" if str(error).startswith(row.where) else f"{row.where}: "
            raise Refusal(f"{where}{error}") from error
    decoded = any(not row.recorded for row in rows)
    return page(
        Trace(
            policy.name, scorer, setup.config, prompts, decoding if decoded else {},
            summed=setup.scorer.terminal == "included",
        )
    )  # fmt: skip


def _check_output(output: Path) -> None:
    """Raises Refusal: at once what would fail after all the work."""
    if output != STDIN and output.is_dir():
        raise Refusal(f"--output {output} is a folder: expected a file, such as "
                      f"{output / 'trace.html'}")  # fmt: skip
    if output != STDIN and not output.parent.is_dir():
        raise Refusal(f"--output {output}: no such folder {output.parent}")


def _write(output: Path, page: str) -> None:
    if output == STDIN:
        print(page, end="")
        return
    output.write_text(page, encoding="ascii", newline="\n")
