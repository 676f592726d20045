"""`guided-decode calibrate`: the beta of a stated distance from the policy, or a threshold."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guided_decode.checkpoints.registry import find
from guided_decode.cli import model_options as models
from guided_decode.cli import row_options
from guided_decode.cli.calibrate_report import Report, as_dict, as_text, settings_of, write_settings
from guided_decode.cli.chats import format_of, prompt_ids, raw_ids
from guided_decode.cli.checkpoints import (
    NOT_REMOTE,
    Policy,
    known_as,
    load_policy,
    open_scorer,
    pair,
)
from guided_decode.cli.decoding import Sampling, generation_config, terminal_ids
from guided_decode.cli.errors import Refusal, warn
from guided_decode.cli.guidance_options import CalibratedOptions, chosen_for
from guided_decode.cli.remote_options import RemoteOptions, refuse_placement
from guided_decode.cli.search_rows import read_search_rows
from guided_decode.cli.threshold_options import ThresholdOptions
from guided_decode.scoring.remote.address import is_address

if TYPE_CHECKING:
    from guided_decode.guidance.config import GuidanceConfig
    from guided_decode.lab.calibration.sampling import Decoder
    from guided_decode.lab.calibration.states import States
    from guided_decode.scorer import Scorer

Source = Annotated[
    Path | None,
    typer.Argument(metavar="[INPUT]", help="prompts: .jsonl has a chat a line, and so has -, "
                   "stdin \\[tiny-tulu's validation prompts, for tiny-tulu]")]  # fmt: skip
HeldOut = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="other prompts, on which the result is measured "
                 "\\[tiny-tulu's held-out ones, for tiny-tulu]")]  # fmt: skip
Target = Annotated[
    list[float] | None,
    typer.Option("--target-kl", metavar="NATS", help="KL from the policy, in nats a token; may be "
                 "repeated")]  # fmt: skip
Output = Annotated[
    Path | None, typer.Option(metavar="FILE", help="gets the settings, for --config")
]
Longest = Annotated[int, typer.Option(min=1, help="tokens of the longest answer")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="prompts that are decoded at once")]
Rounds = Annotated[int, typer.Option(min=1, help="of decoding all prompts, at most")]
Raw = Annotated[bool, typer.Option("--raw", help="prompts are text as it is, not chats")]
Json = Annotated[bool, typer.Option("--json", help="the result as one JSON object")]

_AS_IT_IS, _NO_OPTIONS = models.ScorerOptions(), CalibratedOptions()
_NO_THRESHOLD = ThresholdOptions()

Prompts = Sequence[Sequence[int]]


def calibrate(
    target_kl: Target = None,
    source: Source = None,
    held_out: HeldOut = None,
    output: Output = None,
    policy: models.Policy = None,
    scorer: models.Scorer = None,
    device: models.Device = None,
    scorer_device: models.ScorerDevice = None,
    dtype: models.Dtype = "auto",
    reading: models.ScorerOptions = _AS_IT_IS,
    remote: RemoteOptions = NOT_REMOTE,
    guidance: CalibratedOptions = _NO_OPTIONS,
    thresholds: ThresholdOptions = _NO_THRESHOLD,
    max_new_tokens: Longest = 256,
    batch: Batch = 50,
    rounds: Rounds = 12,
    seed: row_options.Seed = 0,
    raw: Raw = False,
    prompt_format: row_options.PromptFormat = None,
    as_json: Json = False,
) -> None:
    """Find the beta at which guidance stays a stated KL from the policy, or a threshold.

    Values have other units with each critic, so no beta is right for all. It decodes the prompts at
    temperature 1, again with each better beta, and measures at each token. The other settings of
    guidance are part of what is calibrated, and are written with beta. With --abstain or --margin
    it finds from rollouts the threshold that at most --alpha of the good responses ever cross.
    """
    finds_threshold = thresholds.wanted
    target_kl = _check_targets(target_kl or [], output, source, other=finds_threshold)
    names = pair(policy, scorer, head=reading.head)
    refuse_placement(names[1], scorer_device=scorer_device)
    if reading.tp_plan is not None:
        raise Refusal("--tp-plan came, and calibrate decodes in one process: serve the scorer with "
                      "guided-decode scorer, and pass its address")  # fmt: skip
    reading = guidance.reading(reading)
    if finds_threshold:
        from guided_decode.cli.calibrate_threshold import Models, calibrate_threshold

        calibrate_threshold(
            Models(names, device, scorer_device, dtype, reading, remote), thresholds, guidance,
            held_out, output, raw=raw, prompt_format=prompt_format, seed=seed, as_json=as_json,
        )  # fmt: skip
        return
    if not is_address(names[1]):
        _config(guidance, names[1])
    messages = _messages(source, held_out, names[0])
    loaded = load_policy(names[0], device, dtype, trust_remote_code=reading.trust_remote_code)
    critic = open_scorer(
        names[1], reading, device=scorer_device or device, dtype=dtype, policy=loaded,
        remote=remote,
    )  # fmt: skip
    config = _config(guidance, known_as(critic, names[1]))
    ids = partial(_ids, loaded, format_of(prompt_format, find(names[0])), raw)
    prompts, others = ([ids(each) for each in own] for own in messages)
    decoder = _decoder(loaded, critic, config, max_new_tokens, batch)
    report = _calibrated(decoder, prompts, others, target_kl, rounds, seed)
    settings = settings_of(names, reading, remote, dtype, config)
    for result in report.results:
        if not result.calibrated.settled:
            warn(f"after {rounds} rounds beta is {result.calibrated.beta:.4g}, with a KL of "
                 f"{result.calibrated.measured.kl:.4g} ± {result.calibrated.measured.error:.2g}: "
                 "more prompts, or more --rounds, make it certain")  # fmt: skip
    if output is not None:
        write_settings(output, settings, report)
    print(json.dumps(as_dict(report, settings), indent=2) if as_json else as_text(report, config))
    if output is not None:
        print(f"settings for --config: {output}", file=sys.stderr)


def _check_targets(
    targets: list[float], output: Path | None, source: Path | None, *, other: bool
) -> list[float]:
    if other and (targets or source is not None):
        came = f"--target-kl {targets[0]:g}" if targets else f"INPUT {source}"
        raise Refusal(f"{came} came with a threshold to find, which is read off --rollouts: drop "
                      "it")  # fmt: skip
    if not (targets or other):
        raise Refusal("nothing to find: pass --target-kl NATS for beta, or --abstain or --margin "
                      "with --alpha and --rollouts for a threshold")  # fmt: skip
    for target in targets:
        if not 0.0 < target < float("inf"):
            raise Refusal(f"--target-kl {target:g}: expected nats above 0")
    if output is not None and len(targets) > 1:
        raise Refusal(f"--output {output} takes one beta, and {len(targets)} targets came: pass "
                      "one --target-kl")  # fmt: skip
    return targets


def _config(guidance: CalibratedOptions, scorer: str) -> GuidanceConfig:
    """What is calibrated but for beta. Raises Refusal or ValueError: it has no beta to choose."""
    if guidance.beta is not None:
        raise Refusal(f"--beta {guidance.beta:g} came, which calibrate finds: drop it")
    config = guidance.over(chosen_for(scorer, guidance.rule))
    if config.rule != "reweight":
        raise Refusal(f"--rule {config.rule} has no beta: calibrate is for reweight")
    return config


def _messages(source: Path | None, held_out: Path | None, policy: str) -> tuple[Any, Any]:
    """Conversations to calibrate on, and to measure on."""
    task = embedded_task(policy)
    if source is None and task is None:
        raise Refusal("no prompts came: pass a file of them, INPUT, as your users write them")
    if source is not None:
        own: list[Any] = [row.messages for row in read_search_rows(source, None, skip=False)]
    else:
        own = [_user(each) for each in task.validation_prompts()]
    if held_out is not None:
        return own, [row.messages for row in read_search_rows(held_out, None, skip=False)]
    if source is None:
        return own, [_user(each) for each in task.held_out_prompts()]
    return own, []


def embedded_task(policy: str) -> Any:
    """The task of an embedded policy, which has prompts; None for any other."""
    record = find(policy)
    if record is None or record.assets is None:
        return None
    from guided_decode import tiny_tulu
    from guided_decode.tiny_tulu import lists

    name, _, _ = record.assets.rpartition("/")
    return {"": tiny_tulu, "lists": lists}.get(name)


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _ids(policy: Policy, text_format: str | None, raw: bool, messages: Any) -> list[int]:
    if not raw:
        return prompt_ids(policy.tokenizer, text_format, messages)
    if len(messages) > 1:
        raise Refusal(f"--raw takes text, and this chat has {len(messages)} messages")
    return raw_ids(policy.tokenizer, text_format, messages[0]["content"])


def _decoder(
    policy: Policy, scorer: Scorer, config: GuidanceConfig, longest: int, batch: int
) -> Decoder:
    from guided_decode.integrations.transformers import ValueGuidedLogitsProcessor
    from guided_decode.lab.calibration.sampling import Decoder

    ends = terminal_ids(policy.model)
    generation = generation_config(policy.model, Sampling(1.0, 1, longest))

    def processor(own: GuidanceConfig, mask: Any) -> Any:
        return ValueGuidedLogitsProcessor(
            scorer, own, pad_token_id=generation.pad_token_id, eos_token_id=ends,
            attention_mask=mask,
        )  # fmt: skip

    return Decoder(policy.model, scorer, config, generation, processor, ends, batch)


def _calibrated(
    decoder: Decoder, prompts: Prompts, others: Prompts, targets: Sequence[float], rounds: int,
    seed: int,
) -> Report:  # fmt: skip
    from guided_decode.cli.calibrate_report import Result
    from guided_decode.lab.calibration.solving import calibrate as solve_for
    from guided_decode.lab.calibration.states import measured, spread

    tail = decoder.config.tail
    _tell(f"{len(prompts)} prompts without guidance")
    pilot = decoder.plain(prompts, seed)
    results = []
    for target in sorted(set(targets)):

        def sample(beta: float, number: int, target: float = target) -> States:
            _tell(f"KL {target:g}, round {number}: beta {beta:.4g}")
            return decoder.guided(prompts, beta, seed + number)

        found = solve_for(sample, pilot, target, tail, rounds)
        elsewhere = None
        if others:
            _tell(f"KL {target:g} on held-out prompts")
            elsewhere = measured(decoder.guided(others, found.beta, seed), found.beta, tail)
        results.append(Result(found, elsewhere))
    _tell("")
    return Report(len(prompts), len(others), spread(pilot), results)


def _tell(doing: str) -> None:
    """At a terminal, one line that is written over; the rounds take minutes."""
    if sys.stderr.isatty():
        print(f"\r\033[K{doing}", end="", file=sys.stderr, flush=True)
