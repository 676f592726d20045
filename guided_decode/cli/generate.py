"""`guided-decode generate`: answers to prompts, guided; with --compare, beside the plain ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from guided_decode.cli import model_options as models
from guided_decode.cli.chats import Messages
from guided_decode.cli.checkpoints import DEFAULT_SCORER, load_policy, open_scorer, pair
from guided_decode.cli.compare import compare
from guided_decode.cli.decoding import Decoded, Sampling, Setup, decode, ids_of
from guided_decode.cli.errors import Refusal
from guided_decode.cli.guidance_options import GuidanceOptions
from guided_decode.cli.prompts_in import read_prompts
from guided_decode.guidance.config import GuidanceConfig
from guided_decode.lab.demo import chosen

Prompt = Annotated[str | None, typer.Option(help="the user's message")]
PromptFile = Annotated[
    Path | None, typer.Option(help="a message as text, or chats as .jsonl; without both, stdin")
]
Temperature = Annotated[float, typer.Option(help="0 is greedy")]
Samples = Annotated[int, typer.Option(help="answers to each prompt")]
Seed = Annotated[int, typer.Option(help="of sampling")]
Longest = Annotated[int, typer.Option(help="tokens of the longest answer")]
Raw = Annotated[bool, typer.Option("--raw", help="the prompt is text as it is, not a chat")]
Compare = Annotated[
    bool, typer.Option("--compare", help="plain and guided side by side, coloured by value")
]
Json = Annotated[bool, typer.Option("--json", help="one JSON object an answer")]
Stream = Annotated[bool | None, typer.Option(help="print tokens as they come \\[at a terminal]")]

_AS_IT_IS, _NO_OPTIONS = models.ScorerOptions(), GuidanceOptions()


def generate(
    prompt: Prompt = None,
    file: PromptFile = None,
    policy: models.Policy = None,
    scorer: models.Scorer = None,
    device: models.Device = None,
    scorer_device: models.ScorerDevice = None,
    dtype: models.Dtype = "auto",
    reading: models.ScorerOptions = _AS_IT_IS,
    guidance: GuidanceOptions = _NO_OPTIONS,
    temperature: Temperature = 0.0,
    num_samples: Samples = 1,
    seed: Seed = 0,
    max_new_tokens: Longest = 256,
    raw: Raw = False,
    compare_plain: Compare = False,
    as_json: Json = False,
    stream: Stream = None,
) -> None:
    """Answer prompts with guided decoding (without options: tiny-tulu, which is built in)."""
    names = pair(policy, scorer, head=reading.head)
    config = guidance.over(_defaults(names[1], guidance.rule))
    sampling = Sampling(temperature, num_samples, max_new_tokens, seed)
    streams = _streams(stream, sampling, plain_text=not (as_json or compare_plain))
    chats = read_prompts(prompt, file, raw=raw)
    loaded = load_policy(names[0], device, dtype, trust_remote_code=reading.trust_remote_code)
    critic = open_scorer(
        names[1], reading, device=scorer_device or device, dtype=dtype, policy=loaded
    )
    setup = Setup(loaded, critic, config, sampling, raw)
    for messages in chats:
        if compare_plain:
            compare(setup, messages, as_json=as_json)
        else:
            _answer(setup, messages, as_json=as_json, stream=streams)


def _defaults(scorer: str, rule: str | None) -> GuidanceConfig:
    """The rule's settings that were chosen for a scorer, where some were."""
    if scorer != DEFAULT_SCORER:
        return GuidanceConfig()
    return chosen.PRUNE if rule == "prune" else chosen.REWEIGHT


def _streams(asked: bool | None, sampling: Sampling, *, plain_text: bool) -> bool:
    possible = plain_text and sampling.num_samples == 1
    if asked and not possible:
        raise Refusal("--stream prints one answer as text: drop --json, --compare or --num-samples")
    return possible and (sys.stdout.isatty() if asked is None else asked)


def _answer(setup: Setup, messages: Messages, *, as_json: bool, stream: bool) -> None:
    streamer = None
    if stream:
        from transformers import TextStreamer

        streamer = TextStreamer(setup.policy.tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = ids_of(setup, messages)
    decoded = decode(setup.policy, ids, setup.sampling, setup.scorer, setup.config, streamer)
    if as_json:
        _print_json(messages, decoded)
        return
    for i, text in enumerate(decoded.texts):
        if len(decoded.texts) > 1:
            print(f"--- {i + 1} of {len(decoded.texts)}")
        if not stream:
            print(text)
    _print_cost(decoded)


def _print_json(messages: Messages, decoded: Decoded) -> None:
    for i, text in enumerate(decoded.texts):
        line: dict[str, Any] = {
            "prompt": messages[-1]["content"],
            "sample": i,
            "text": text,
            "tokens": len(decoded.responses[i]),
            "finished": decoded.finished[i],
        }
        # All samples of a prompt are decoded together, so this is what they cost together.
        print(json.dumps(line | {"cost": decoded.cost()}, ensure_ascii=False), flush=True)


def _print_cost(decoded: Decoded) -> None:
    """On stderr, and only where somebody looks: stdout is the answer."""
    if sys.stderr.isatty():
        tokens = f"policy {decoded.policy_tokens} tokens, scorer {decoded.scorer_tokens}"
        typer.secho(f"[{tokens}, {decoded.seconds:.2f} s]", dim=True, err=True)
