"""The options of `search` that say what decodes its policy: this process, vLLM, or servers."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Annotated, Any

import typer

from guided_decode.cli.errors import Refusal
from guided_decode.search.http_failures import Retry
from guided_decode.search.servers.generator import CONCURRENCY, TIMEOUT

_PANEL = "What decodes the policy"
_RETRIES = Retry().attempts - 1
LOCAL, VLLM = "local", "vllm"


def _option(text: str, *, metavar: str | None = None, min: float | None = None) -> Any:
    return typer.Option(help=text, metavar=metavar, min=min, rich_help_panel=_PANEL)


Engine = Annotated[
    str | None,
    _option("this process, or vLLM in it \\[local]", metavar=f"{LOCAL}|{VLLM}"),
]
EngineArgs = Annotated[
    str | None,
    _option("arguments of vllm.LLM, such as '{\"tensor_parallel_size\": 2}'", metavar="JSON"),
]
Endpoint = Annotated[
    list[str] | None,
    _option("an OpenAI-compatible server that has the policy, and needs --policy for its "
            "tokenizer; may be repeated: they share the load", metavar="http://HOST:PORT"),
]  # fmt: skip
ServedModel = Annotated[
    str | None, _option("the policy's name on the servers \\[the only one they have]")
]
ApiKeyEnv = Annotated[
    str | None, _option("environment variable that has the servers' key", metavar="NAME")
]
EndpointTimeout = Annotated[
    float | None,
    _option(f"seconds that a request to a server may take \\[{TIMEOUT:g}]", min=0.001),
]
EndpointRetries = Annotated[
    int | None,
    _option(f"how often one is sent to a server again, ever later \\[{_RETRIES}]", min=0),
]
EndpointConcurrency = Annotated[
    int | None,
    _option(f"requests that a server has at a time \\[{CONCURRENCY}]", min=1),
]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What decodes the policy."""

    engine: Engine = None
    engine_args: EngineArgs = None
    endpoint: Endpoint = None
    served_model: ServedModel = None
    api_key_env: ApiKeyEnv = None
    endpoint_timeout: EndpointTimeout = None
    endpoint_retries: EndpointRetries = None
    endpoint_concurrency: EndpointConcurrency = None

    @property
    def on_servers(self) -> bool:
        """Whether servers decode it."""
        return bool(self.endpoint)

    @property
    def on_vllm(self) -> bool:
        """Whether vLLM in this process does."""
        return self.engine == VLLM

    def check(self, policy: str | None, kl_coef: float | None) -> None:
        """Raises Refusal: what was given does not go together.

        policy: as it was named. kl_coef: of the method.
        """
        if self.engine not in (None, LOCAL, VLLM):
            raise Refusal(f"--engine {self.engine}: expected {LOCAL} or {VLLM}; servers are named "
                          "by --endpoint")  # fmt: skip
        if self.on_servers and self.engine is not None:
            raise Refusal(f"--engine {self.engine} came with --endpoint, whose server has an "
                          "engine: drop one of them")  # fmt: skip
        for name in () if self.on_servers else _OF_SERVERS:
            if getattr(self, name) is not None:
                raise Refusal(f"--{name.replace('_', '-')} came without --endpoint, a server that "
                              "has the policy")  # fmt: skip
        if self.engine_args is not None and not self.on_vllm:
            raise Refusal(f"--engine-args came without --engine {VLLM}")
        if self.on_servers and policy is None:
            raise Refusal("--endpoint needs --policy, a folder or Hub id that has the tokenizer of "
                          "the model that is served")  # fmt: skip
        if kl_coef and (self.on_servers or self.on_vllm):
            which = "--endpoint" if self.on_servers else f"--engine {VLLM}"
            raise Refusal(f"--kl-coef {kl_coef} compares the policy with a reference, which "
                          f"{which} does not have: drop one of them")  # fmt: skip

    def check_placement(self, device: str | None, dtype: str, *, scorer_here: bool) -> None:
        """Raises Refusal: a device or dtype was given, and nothing is loaded that would have it."""
        if scorer_here or not (self.on_servers or self.on_vllm):
            return
        which = "--endpoint, whose server has placed the policy" if self.on_servers else (
            f"--engine {VLLM}, which places the policy itself (--engine-args)"
        )  # fmt: skip
        given = [] if device is None else [f"--device {device}"]
        given += [f"--dtype {dtype}"] if self.on_servers and dtype != "auto" else []
        if given:
            raise Refusal(f"{given[0]} came with {which}, and no scorer is loaded here: drop it")

    def arguments(self) -> dict[str, Any]:
        """What `--engine-args` says. Raises Refusal: it is no JSON object."""
        if self.engine_args is None:
            return {}
        try:
            given = json.loads(self.engine_args)
        except ValueError as error:
            raise Refusal(f"--engine-args {self.engine_args}: {error}") from None
        if not isinstance(given, dict):
            raise Refusal(f"--engine-args {self.engine_args}: expected a JSON object")
        return given

    def limits(self) -> dict[str, Any]:
        """How servers are asked, as arguments of `connect_generator`: what was given of it."""
        given: dict[str, Any] = {
            "timeout": self.endpoint_timeout,
            "concurrency": self.endpoint_concurrency,
            "retry": None if self.endpoint_retries is None else Retry(self.endpoint_retries + 1),
        }
        return {name: value for name, value in given.items() if value is not None}


_OF_SERVERS = [each.name for each in fields(EngineOptions)
               if each.name not in ("engine", "engine_args", "endpoint")]  # fmt: skip
