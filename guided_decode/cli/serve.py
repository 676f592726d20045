"""`guided-decode serve`: vLLM's OpenAI server, with guidance."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import Annotated

import typer

from guided_decode.checkpoints.registry import find
from guided_decode.cli import model_options as models
from guided_decode.cli.checkpoints import DEFAULT_POLICY, location
from guided_decode.cli.config_file import is_config
from guided_decode.cli.config_option import Configs
from guided_decode.cli.port_lock import held, require_free
from guided_decode.cli.serve_options import ServerSettings
from guided_decode.cli.served_guidance import example_request, guided_config, paired
from guided_decode.cli.served_models import examined
from guided_decode.cli.vllm_command import (
    additional_config,
    drain_seconds,
    engines,
    installed_vllm,
    launch,
    refuse_unserved,
)
from guided_decode.cli.vllm_options import VllmOptions
from guided_decode.cli.vllm_process import run

Policy = Annotated[
    str | None, typer.Argument(help="folder, registered name or Hub id \\[tiny-tulu]")
]
Host = Annotated[str, typer.Option(help="address to listen on")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="port to listen on")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="print environment and command, start nothing")
]


_AS_IT_IS = ServerSettings()


def serve(
    context: typer.Context,
    policy: Policy = None,
    scorer: models.Scorer = None,
    settings: ServerSettings = _AS_IT_IS,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    dry_run: DryRun = False,
    config: Configs = None,
) -> None:
    """Start vLLM's OpenAI server with guidance; every other option goes to vLLM as it is."""
    distribution = installed_vllm()
    options = VllmOptions([*context.args, *_of_vllm(config or [])])
    refuse_unserved(options, distribution)
    other = additional_config(options)
    in_json = other.pop("guided_decode", {})
    names = paired(policy or _single(options.take("--model")), scorer or in_json.get("scorer"))
    groups, drain = engines(options) == 1, drain_seconds(options)
    guided = guided_config(names[1], in_json, settings.given(), groups=groups)
    guided = examined(names[0], guided, options, only_here=dry_run)
    if not groups:
        typer.echo("note: siblings are on several engines, so groups are refused "
                   "(max_group_size 0)", err=True)  # fmt: skip
    served = _served_name(names[0])
    ready = launch(distribution, location(names[0]), served, guided, other_config=other,
                   host=host, port=port, cpu_cache_gib=_cpu_cache_gib(names[0]),
                   options=options)  # fmt: skip
    if dry_run:
        print(ready.as_shell())
        return
    model = options.values("--served-model-name")[:1] or [served or names[0]]
    base = f"http://{_reachable(host)}:{port}"
    greeting = _greeting(names, base, example_request(guided, model[0]), options)
    # Nothing answers plain HTTP there otherwise.
    plain_http = not options.has("--uds", "--headless", "--ssl-keyfile", "--ssl-certfile")
    listens_there = not options.has("--uds", "--headless")
    if listens_there:
        require_free(host, port)
    with held(host, port) if listens_there else contextlib.nullcontext():
        code = run(ready, f"{base}/health" if plain_http else None, greeting, drain)
    raise typer.Exit(code)


def _of_vllm(files: list[Path]) -> list[str]:
    """The files of --config that are vLLM's own, as they are handed on to it."""
    return [word for file in files if not is_config(file) for word in ("--config", str(file))]


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
