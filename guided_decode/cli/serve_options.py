"""The options of `guided-decode serve` that set what is served: one for each key of the server's
configuration. Where vLLM has an option of that name, ours begins with `--scorer-`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any

import typer

from guided_decode.cli import guidance_options as guidance
from guided_decode.cli import model_options as models
from guided_decode.cli import remote_options as remote


def _option(panel: str | None, text: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, metavar=metavar, rich_help_panel=panel)


def _of_scorer(text: str, *names: str, metavar: str | None = None) -> Any:
    return _option("Models", text, *names, metavar=metavar)


def _limit(text: str) -> Any:
    return _option("Limits of requests", text)


Revision = Annotated[str | None, _of_scorer("of the scorer's repository", "--scorer-revision")]
Device = Annotated[str | None, _of_scorer("of the scorer \\[the policy's]", "--scorer-device")]
Dtype = Annotated[
    str | None,
    _of_scorer("of the scorer \\[its own]", "--scorer-dtype", metavar="float32|bfloat16|float16"),
]
TrustRemoteCode = Annotated[
    bool, _of_scorer("run code that comes with the scorer", "--scorer-trust-remote-code")
]
Quantization = Annotated[
    str | None,
    _of_scorer("of the scorer's weights", "--scorer-quantization", metavar=models.QUANTIZATIONS),
]
ByDefault = Annotated[
    bool,
    _option("Guidance", "guide every request that does not say guide: 0", "--guide-by-default"),
]
MaxTopK = Annotated[int | None, _limit("of guide_top_k \\[64]")]
MaxBeta = Annotated[float | None, _limit("of guide_beta \\[none]")]
MaxGroup = Annotated[int | None, _limit("siblings of a group; 0 refuses groups \\[64]")]
OnError = Annotated[
    str | None,
    _option(None, "what a scorer that fails does \\[passthrough]", metavar="passthrough|raise"),
]
LogEvery = Annotated[float | None, _option(None, "seconds between log lines of counters \\[10]")]
ValueLog = Annotated[
    str | None, _option(None, "file that gets a JSON line with V(prefix) of requests")
]
ValueLogEvery = Annotated[int | None, _option(None, "tokens between its lines \\[16]")]


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What was given, by the keys of the server's configuration."""

    kind: models.Kind = None
    adapter: models.Adapter = None
    reward: models.Reward = None
    reference: models.Reference = None
    revision: Revision = None
    device: Device = None
    dtype: Dtype = None
    bos: models.Bos = None
    terminal: models.Terminal = None
    transform: models.Transform = None
    rope_theta: models.RopeTheta = None
    allow_pickle: models.AllowPickle = False
    trust_remote_code: TrustRemoteCode = False
    cache_tokens: models.CacheTokens = None
    max_forward_tokens: models.ForwardTokens = None
    quantization: Quantization = None
    gguf_file: models.GgufFile = None
    device_map: models.DeviceMap = None
    key_file: remote.KeyFile = None
    timeout: remote.Timeout = None
    beta: guidance.Beta = None
    top_k: guidance.TopK = None
    top_p: guidance.TopP = None
    rule: guidance.Rule = None
    margin: guidance.Margin = None
    tail: guidance.Tail = None
    gate: guidance.Gate = None
    baseline: guidance.Baseline = None
    kl_coef: guidance.KlCoef = None
    value_gate: guidance.ValueGate = None
    value_gate_fall: guidance.ValueGateFall = None
    abstain: guidance.Abstain = None
    abstain_after: guidance.AbstainAfter = None
    guide_by_default: ByDefault = False
    max_top_k: MaxTopK = None
    max_beta: MaxBeta = None
    max_group_size: MaxGroup = None
    on_error: OnError = None
    value_log: ValueLog = None
    value_log_every: ValueLogEvery = None
    log_every: LogEvery = None

    def given(self) -> dict[str, Any]:
        """Those that were given; what was not is the server's default."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        own["device_map"] = models.read_device_map(self.device_map)
        return {n: value for n, value in own.items() if value is not None and value is not False}
