"""`guided-decode generate`: answers to prompts, guided; with --compare, beside the plain ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from guided_decode.checkpoints.registry import find
from guided_decode.cli import model_options as models
from guided_decode.cli import row_options
from guided_decode.cli.chats import format_of
from guided_decode.cli.checkpoints import (
    NOT_REMOTE,
    follow_if_not_leading,
    known_as,
    load_policy,
    open_scorer,
    pair,
)
from guided_decode.cli.compare import compare
from guided_decode.cli.config_option import Config
from guided_decode.cli.decoding import Decoded, Sampling, Setup, decode, ids_of
from guided_decode.cli.errors import Refusal, report, typed, warn
from guided_decode.cli.guidance_options import GuidanceOptions, chosen_for
from guided_decode.cli.prompt_formats import warn_of_another_format
from guided_decode.cli.prompts_in import Prompt, read_prompts
from guided_decode.cli.remote_options import RemoteOptions, refuse_placement
from guided_decode.scoring.remote.address import is_address

Text = Annotated[str | None, typer.Option(help="the user's message")]
PromptFile = Annotated[
    Path | None, typer.Option(help="a message as text, or chats as .jsonl; without both, stdin")
]
Temperature = Annotated[float, typer.Option(help="0 is greedy")]
Samples = Annotated[int, typer.Option(help="answers to each prompt")]
Longest = Annotated[int, typer.Option(help="tokens of the longest answer")]
Raw = Annotated[bool, typer.Option("--raw", help="the prompt is text as it is, not a chat")]
Compare = Annotated[
    bool, typer.Option("--compare", help="plain and guided side by side, coloured by value")
]
Json = Annotated[bool, typer.Option("--json", help="one JSON object an answer")]
Stream = Annotated[bool | None, typer.Option(help="print tokens as they come \\[at a terminal]")]

_AS_IT_IS, _NO_OPTIONS = models.ScorerOptions(), GuidanceOptions()


def generate(
    prompt: Text = None,
    file: PromptFile = None,
    policy: models.Policy = None,
    scorer: models.Scorer = None,
    device: models.Device = None,
    scorer_device: models.ScorerDevice = None,
    dtype: models.Dtype = "auto",
    reading: models.ScorerOptions = _AS_IT_IS,
    remote: RemoteOptions = NOT_REMOTE,
    guidance: GuidanceOptions = _NO_OPTIONS,
    temperature: Temperature = 0.0,
    num_samples: Samples = 1,
    seed: row_options.Seed = 0,
    max_new_tokens: Longest = 256,
    raw: Raw = False,
    prompt_format: row_options.PromptFormat = None,
    on_error: row_options.OnError = row_options.Failing.STOP,
    compare_plain: Compare = False,
    as_json: Json = False,
    stream: Stream = None,
    config: Config = None,
) -> None:
    """Answer prompts with guided decoding (without options: tiny-tulu, which is built in)."""
    names = pair(policy, scorer, head=reading.head)
    refuse_placement(names[1], scorer_device=scorer_device)
    follow_if_not_leading(names[1], reading, dtype)
    if not is_address(names[1]):
        # What is refused is refused before models are loaded.
        guidance.over(chosen_for(names[1], guidance.rule))
    reading = guidance.reading(reading)
    sampling = Sampling(temperature, num_samples, max_new_tokens, seed)
    streams = _streams(stream, sampling, plain_text=not (as_json or compare_plain))
    if raw and prompt_format is not None:
        raise Refusal(f"--raw takes text as it is, so --prompt-format {prompt_format} has nothing "
                      "to say: drop one of them")  # fmt: skip
    skip = on_error is row_options.Failing.SKIP
    prompts = read_prompts(prompt, file, raw=raw, skip=skip)
    decoded_in = format_of(prompt_format, find(names[0]))
    # A head on the policy's hidden states reads them with the adapter in it.
    own = reading.adapter if reading.head is not None and names[0] == names[1] else None
    loaded = load_policy(
        names[0], device, dtype, adapter=own, trust_remote_code=reading.trust_remote_code
    )
    critic = open_scorer(
        names[1], reading, device=scorer_device or device, dtype=dtype, policy=loaded,
        remote=remote,
    )  # fmt: skip
    if not raw:
        warn_of_another_format(
            loaded.tokenizer, decoded_in, known_as(critic, names[1]), reading.bos
        )
    rule = guidance.over(chosen_for(known_as(critic, names[1]), guidance.rule))
    if guidance.preset and rule.top_k is None and not critic.scores_vocabulary:
        raise Refusal(f"--preset {guidance.preset} reads the whole vocabulary, which only an "
                      "implicit reward scores at once: pass --kind implicit with --reference, or "
                      "--top-k")  # fmt: skip
    setup = Setup(loaded, critic, rule, sampling, raw, decoded_in)
    answer = (
        partial(compare, as_json=as_json)
        if compare_plain
        else partial(_answer, as_json=as_json, stream=streams)
    )
    failed = sum(not _answered(answer, setup, one, skip) for one in prompts)
    if failed:
        report(f"{failed} prompts have no answer")
        raise typer.Exit(1)


def _answered(
    answer: Callable[[Setup, Prompt], None], setup: Setup, prompt: Prompt, skip: bool
) -> bool:
    """Answers a prompt, or says why not; whether that is all there is to say.

    Raises Refusal: the prompt failed, and neither is it to be skipped nor was it typed.
    """
    try:
        if prompt.problem is not None:
            raise Refusal(prompt.problem)
        answer(setup, prompt)
    except UnicodeEncodeError:
        # Not the prompt's fault, but the terminal's.
        raise
    except (ValueError, Refusal) as error:
        message = f"{prompt.where}: {typed(error)}" if prompt.where else typed(error)
        if not (skip or prompt.typed):
            raise Refusal(message) from error
        report(message)
        return prompt.typed
    return True


def _streams(asked: bool | None, sampling: Sampling, *, plain_text: bool) -> bool:
    possible = plain_text and sampling.num_samples == 1
    if asked and not possible:
        raise Refusal("--stream prints one answer as text: drop --json, --compare or --num-samples")
    return possible and (sys.stdout.isatty() if asked is None else asked)


def _answer(setup: Setup, prompt: Prompt, *, as_json: bool, stream: bool) -> None:
    streamer = None
    if stream:
        from transformers import TextStreamer

        streamer = TextStreamer(setup.policy.tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = ids_of(setup, prompt.messages)
    decoded = decode(setup.policy, ids, setup.sampling, setup.scorer, setup.config, streamer)
    if as_json:
        _print_json(prompt, decoded)
        return
    for i, text in enumerate(decoded.texts):
        if len(decoded.texts) > 1:
            print(f"--- {i + 1} of {len(decoded.texts)}")
        if not stream:
            print(text)
        if decoded.abstained is not None and decoded.abstained[i]:
            warn(f"the answer was ended after {len(decoded.responses[i])} tokens: its value is "
                 f"below --abstain {setup.config.abstain:g}")  # fmt: skip
    _print_cost(decoded)


def _print_json(prompt: Prompt, decoded: Decoded) -> None:
    for i, text in enumerate(decoded.texts):
        line: dict[str, Any] = {
            **prompt.fields(),
            "sample": i,
            "text": text,
            "tokens": len(decoded.responses[i]),
            "finished": decoded.finished[i],
        }
        if decoded.abstained is not None:
            line["abstained"] = decoded.abstained[i]
        # All samples of a prompt are decoded together, so this is what they cost together.
        print(json.dumps(line | {"cost": decoded.cost()}, ensure_ascii=False), flush=True)


def _print_cost(decoded: Decoded) -> None:
    """On stderr, and only where somebody looks: stdout is the answer."""
    if sys.stderr.isatty():
        tokens = f"policy {decoded.policy_tokens} tokens, scorer {decoded.scorer_tokens}"
        typer.secho(f"[{tokens}, {decoded.seconds:.2f} s]", dim=True, err=True)
