"""`guided-decode serve`: vLLM's OpenAI server, with guidance."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer

from guided_decode.checkpoints.registry import find
from guided_decode.cli import guidance_options as guidance
from guided_decode.cli import model_options as models
from guided_decode.cli.checkpoints import DEFAULT_POLICY, location
from guided_decode.cli.served_guidance import example_request, guided_config, paired
from guided_decode.cli.vllm_command import (
    additional_config,
    engines,
    installed_vllm,
    launch,
    refuse_unserved,
)
from guided_decode.cli.vllm_options import VllmOptions
from guided_decode.cli.vllm_process import require_free, run

_LIMITS = "Limits of requests"


def _of_scorer(text: str, metavar: str | None = None) -> Any:
    return typer.Option(help=text, metavar=metavar, rich_help_panel="Models")


def _limit(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=_LIMITS)


Policy = Annotated[
    str | None, typer.Argument(help="folder, registered name or Hub id \\[tiny-tulu]")
]
Device = Annotated[str | None, _of_scorer("of the scorer \\[the policy's]")]
Dtype = Annotated[
    str | None, _of_scorer("of the scorer \\[its own]", metavar="float32|bfloat16|float16")
]
ByDefault = Annotated[
    bool,
    typer.Option(
        "--guide-by-default",
        help="guide every request that does not say guide: 0",
        rich_help_panel="Guidance",
    ),
]
MaxTopK = Annotated[int | None, _limit("of guide_top_k \\[64]")]
MaxBeta = Annotated[float | None, _limit("of guide_beta \\[none]")]
MaxGroup = Annotated[int | None, _limit("siblings of a group; 0 refuses groups \\[64]")]
OnError = Annotated[
    str | None,
    typer.Option(help="what a scorer that fails does \\[passthrough]",
                 metavar="passthrough|raise"),
]  # fmt: skip
LogEvery = Annotated[
    float | None, typer.Option(help="seconds between log lines of counters \\[10]")
]
Host = Annotated[str, typer.Option(help="address to listen on")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="port to listen on")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="print environment and command, start nothing")
]


def serve(
    context: typer.Context,
    policy: Policy = None,
    scorer: models.Scorer = None,
    kind: models.Kind = None,
    reward: models.Reward = None,
    reference: models.Reference = None,
    scorer_revision: models.Revision = None,
    scorer_device: Device = None,
    scorer_dtype: Dtype = None,
    cache_tokens: models.CacheTokens = None,
    max_forward_tokens: models.ForwardTokens = None,
    beta: guidance.Beta = None,
    top_k: guidance.TopK = None,
    top_p: guidance.TopP = None,
    rule: guidance.Rule = None,
    margin: guidance.Margin = None,
    tail: guidance.Tail = None,
    gate: guidance.Gate = None,
    baseline: guidance.Baseline = None,
    kl_coef: guidance.KlCoef = None,
    guide_by_default: ByDefault = False,
    max_top_k: MaxTopK = None,
    max_beta: MaxBeta = None,
    max_group_size: MaxGroup = None,
    on_error: OnError = None,
    log_every: LogEvery = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    dry_run: DryRun = False,
) -> None:
    """Start vLLM's OpenAI server with guidance; every other option goes to vLLM as it is."""
    distribution = installed_vllm()
    options = VllmOptions(context.args)
    refuse_unserved(options)
    other = additional_config(options)
    in_json = other.pop("guided_decode", {})
    names = paired(policy or _single(options.take("--model")), scorer or in_json.get("scorer"))
    settings = {
        "kind": kind, "reward": reward, "reference": reference, "revision": scorer_revision,
        "device": scorer_device, "dtype": scorer_dtype, "cache_tokens": cache_tokens,
        "max_forward_tokens": max_forward_tokens, "beta": beta, "top_k": top_k, "top_p": top_p,
        "rule": rule, "margin": margin, "tail": tail, "gate": gate, "baseline": baseline,
        "kl_coef": kl_coef, "guide_by_default": guide_by_default or None, "max_top_k": max_top_k,
        "max_beta": max_beta, "max_group_size": max_group_size, "on_error": on_error,
        "log_every": log_every,
    }  # fmt: skip
    groups = engines(options) == 1
    config = guided_config(names[1], in_json, settings, groups=groups)
    if not groups:
        typer.echo("note: siblings are on several engines, so groups are refused "
                   "(max_group_size 0)", err=True)  # fmt: skip
    served = _served_name(names[0])
    ready = launch(distribution, location(names[0]), served, config, other_config=other,
                   host=host, port=port, cpu_cache_gib=_cpu_cache_gib(names[0]),
                   options=options)  # fmt: skip
    if dry_run:
        print(ready.as_shell())
        return
    require_free(host, port)
    model = options.values("--served-model-name")[:1] or [served or names[0]]
    base = f"http://{_reachable(host)}:{port}"
    greeting = _greeting(names, base, example_request(config, model[0]), options)
    # Nothing answers plain HTTP there otherwise.
    plain_http = not options.has("--uds", "--ssl-keyfile", "--ssl-certfile")
    raise typer.Exit(run(ready, f"{base}/health" if plain_http else None, greeting))


def _single(values: list[str]) -> str | None:
    return values[0] if values else None


def _served_name(policy: str) -> str | None:
    """What requests call a policy whose folder nobody would type; None keeps vLLM's name."""
    if policy == DEFAULT_POLICY:
        return "tiny-tulu"
    return policy if location(policy) != policy else None


def _cpu_cache_gib(policy: str) -> int:
    """Enough for a policy; those of this package are tiny."""
    record = find(policy)
    return 1 if record is not None and record.assets is not None else 4


def _reachable(host: str) -> str:
    """Where a client on this machine finds a server that listens there."""
    here = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"[{here}]" if ":" in here else here


def _greeting(names: tuple[str, str], base: str, body: str, options: VllmOptions) -> str:
    headers = ["-H 'Content-Type: application/json'"]
    if options.has("--api-key"):
        headers.append('-H "Authorization: Bearer $VLLM_API_KEY"')
    request = f"curl -s {base}/v1/chat/completions {' '.join(headers)} -d {shlex.quote(body)}"
    return (
        f"\n{names[0]} is served at {base}/v1, guided by {names[1]}. "
        f"Guided (plain without vllm_xargs):\n\n{request}\n"
    )
