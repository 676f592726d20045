"""What the server's owner sets: the scorer, the defaults of guidance, and the limits."""

import json
import os
import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from guided_decode.guidance.config import Baseline, GuidanceConfig, OnError, Rule, Tail
from guided_decode.scoring.remote.address import is_address

# The key of vLLM's additional_config, and the variable in which the front end finds the same.
CONFIG_KEY = "guided_decode"
CONFIG_VARIABLE = "GUIDED_DECODE_CONFIG"

# What errors repeat of what came.
_SHOWN_KEYS = 3
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 60

# What a scorer server was given, and takes from no client.
_THE_SERVERS = (
    "adapter", "reward", "reference", "revision", "device", "rope_theta", "allow_pickle",
    "trust_remote_code", "cache_tokens", "max_forward_tokens", "quantization", "gguf_file",
    "device_map",
)  # fmt: skip
# Options of a scorer that a head on the policy's own trunk has no use for.
_NOT_A_HEADS = ("adapter", "reward", "reference", "device", "dtype", "rope_theta", "cache_tokens",
                "quantization", "gguf_file", "device_map")  # fmt: skip
_GUIDANCE = tuple(field.name for field in fields(GuidanceConfig))
_DEFAULTS = GuidanceConfig()


class ServerConfig(BaseModel):
    """The value of `additional_config["guided_decode"]`.

    scorer: the critic; where kind is "trunk-head", the head on the policy's own hidden states,
        whose look ahead is a forward of the policy itself; or the address of a scorer server,
        tcp://HOST:PORT or ipc://PATH, which was given the options of loading itself.
    key_file, timeout: of a scorer server, as in `load_scorer`.
    kind, adapter, reward, reference, revision, device, dtype, bos, terminal, transform, rope_theta,
    allow_pickle, trust_remote_code, cache_tokens, max_forward_tokens, quantization, gguf_file,
    device_map: as in `load_scorer`; device None is the policy's, cache_tokens None what
    max_num_seqs and max_model_len need, bounded.
    beta to abstain_after: the defaults of `GuidanceConfig` for requests that are guided; abstain
        for those of them that say which token ends them.
    guide_by_default: guides every request that does not say `guide: 0`; else those that ask.
    max_top_k, max_beta: what a request may ask for; None for max_beta sets no limit.
    max_group_size: siblings of one group; 0 refuses groups.
    value_log, value_log_every: a file that gets one JSON line for V(prefix) of each request that
        asked for anything, after so many tokens, again and again.
    on_error: what a scorer that fails does: "passthrough" or "raise", which ends the engine; a row
        that the scorer refuses goes on unguided in any case.
    log_every: seconds between log lines with the counters; 0 logs none.

    Raises pydantic's ValidationError; `parse_config` turns it into one sentence.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    scorer: str
    kind: str = "auto"
    adapter: str | None = None
    reward: str | None = None
    reference: str | None = None
    revision: str | None = None
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    bos: Literal["keep", "drop"] | None = None
    terminal: Literal["baseline", "reward", "critic"] | None = None
    transform: str | None = None
    rope_theta: FiniteFloat | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False
    cache_tokens: int | None = Field(default=None, ge=1)
    max_forward_tokens: int | None = Field(default=None, ge=1)
    quantization: str | None = None
    gguf_file: str | None = None
    device_map: str | dict[str, str | int] | None = None
    key_file: str | None = None
    timeout: FiniteFloat | None = Field(default=None, gt=0)

    beta: FiniteFloat = _DEFAULTS.beta
    top_k: int | None = _DEFAULTS.top_k
    top_p: FiniteFloat = _DEFAULTS.top_p
    rule: Rule = _DEFAULTS.rule
    margin: FiniteFloat | None = _DEFAULTS.margin
    tail: Tail = _DEFAULTS.tail
    baseline: Baseline = _DEFAULTS.baseline
    gate: FiniteFloat | None = _DEFAULTS.gate
    kl_coef: FiniteFloat = _DEFAULTS.kl_coef
    value_gate: FiniteFloat | None = _DEFAULTS.value_gate
    value_gate_fall: FiniteFloat | None = _DEFAULTS.value_gate_fall
    abstain: FiniteFloat | None = _DEFAULTS.abstain
    abstain_after: int | None = _DEFAULTS.abstain_after

    guide_by_default: bool = False
    max_top_k: int = Field(default=64, ge=1)
    max_beta: FiniteFloat | None = Field(default=None, ge=0)
    max_group_size: int = Field(default=64, ge=0)
    on_error: OnError = "passthrough"
    log_every: FiniteFloat = Field(default=10.0, ge=0)
    value_log: str | None = None
    value_log_every: int = Field(default=16, ge=1)

    @model_validator(mode="after")
    def _check_defaults(self) -> "ServerConfig":
        guidance = self.guidance
        if guidance.top_k is not None and guidance.top_k > self.max_top_k:
            raise ValueError(
                f"top_k={guidance.top_k} is above max_top_k={self.max_top_k}: lower the one, or "
                "raise the other"
            )
        if self.max_beta is not None and abs(guidance.beta) > self.max_beta:
            raise ValueError(
                f"beta={guidance.beta:g} is above max_beta={self.max_beta:g}: lower the one, or "
                "raise the other"
            )
        if self.on_error == "raise" and self.max_beta is None:
            raise ValueError(
                'on_error="raise" was given without max_beta: a request could end the server with '
                "a beta whose logits overflow; set max_beta"
            )
        self._check_remote()
        self._check_trunk_head()
        if self.is_remote:
            # Its server knows whether there is one.
            return self
        if self.device is not None and self.device_map is not None:
            raise ValueError(
                f"device={self.device!r} and device_map were both given: expected one of the two"
            )
        if guidance.kl_coef and self.reference is None:
            raise ValueError("kl_coef was given without a reference model: set reference")
        if self.terminal == "reward" and self.reward is None:
            raise ValueError('terminal="reward" was given without a reward model: set reward')
        return self

    def _check_remote(self) -> None:
        """Raises ValueError: an option that is a scorer server's own, or one for such a server."""
        if not self.is_remote:
            given = [name for name in ("key_file", "timeout") if getattr(self, name) is not None]
            if given:
                raise ValueError(
                    f"{' and '.join(given)} came with scorer={self.scorer!r}, which is no scorer "
                    "server's address: expected tcp://HOST:PORT or ipc://PATH; drop it"
                )
            return
        given = [name for name in _THE_SERVERS if getattr(self, name)]
        if given:
            raise ValueError(
                f"{' and '.join(given)} came with scorer={self.scorer!r}, whose server loaded its "
                "scorer itself, on its own device: give that to guided-decode scorer, and drop it"
            )
        if self.is_trunk_head:
            raise ValueError(
                f'kind="trunk-head" came with scorer={self.scorer!r}: a head on the policy\'s own '
                "hidden states is a file; set scorer to it, or drop kind"
            )

    @property
    def is_remote(self) -> bool:
        """Whether the scorer is on a scorer server."""
        return is_address(self.scorer)

    @property
    def is_trunk_head(self) -> bool:
        """Whether the scorer is a head on the policy's own hidden states."""
        return self.kind == "trunk-head"

    def _check_trunk_head(self) -> None:
        """Raises ValueError: what a head on the policy's own trunk has no use for."""
        given = [name for name in _NOT_A_HEADS if getattr(self, name)]
        if self.is_trunk_head and given:
            raise ValueError(
                f'{" and ".join(given)} came with kind="trunk-head", a head that reads the '
                "policy's own hidden states, in vLLM's own forwards: drop it"
            )
        if self.is_trunk_head and self.guidance.top_k is None:
            raise ValueError(
                'top_k=null came with kind="trunk-head", which forwards every candidate: set top_k'
            )

    @property
    def guidance(self) -> GuidanceConfig:
        """The defaults of requests that are guided."""
        return GuidanceConfig(**{name: getattr(self, name) for name in _GUIDANCE})


def head_options(config: ServerConfig) -> dict[str, Any]:
    """How a head on the policy's trunk is read, as `read_trunk_head` takes it."""
    names = ("transform", "revision", "allow_pickle", "trust_remote_code")
    return {name: getattr(config, name) for name in names}


def parse_config(given: object, where: str) -> ServerConfig:
    """The configuration; `where` it was found goes into errors.

    Raises ValueError: one sentence that names the key, what was given and what was expected.
    """
    if not isinstance(given, Mapping):
        raise ValueError(
            f'{where} holds {shown(given)}: expected an object such as {{"scorer": "CRITIC", '
            '"kind": "ppo-critic"}'
        )
    if given.get("tp_plan") is not None:
        raise ValueError(
            f"{where} holds tp_plan={shown(given['tp_plan'])}: vLLM's workers are no shards of the "
            "scorer; serve it sharded by itself (torchrun --nproc-per-node SHARDS -m guided_decode "
            'scorer MODEL --tp-plan auto --listen tcp://HOST:PORT) and set "scorer" to that address'
        )
    try:
        return ServerConfig.model_validate(dict(given))
    except ValidationError as error:
        raise ValueError(f"{where}: {sentence(error, ServerConfig.model_fields)}") from None


def config_of(additional_config: object) -> ServerConfig:
    """The configuration in vLLM's additional_config.

    Raises ValueError: there is none, it is wrong, or the front end was told another one.
    """
    given = additional_config.get(CONFIG_KEY) if isinstance(additional_config, Mapping) else None
    if given is None:
        raise ValueError(
            f"the guided-decode processor was loaded, but additional_config has no {CONFIG_KEY!r}: "
            f'pass --additional-config \'{{"{CONFIG_KEY}": {{"scorer": "CRITIC"}}}}\''
        )
    config = parse_config(given, f"additional_config[{CONFIG_KEY!r}]")
    told = front_end_config()
    if told is not None and told != config:
        raise ValueError(
            f"{CONFIG_VARIABLE} and additional_config[{CONFIG_KEY!r}] differ: requests would be "
            f"checked against other limits than they are held to; set {CONFIG_VARIABLE} to "
            f"{json.dumps(dict(given))} or unset it"
        )
    return config


def front_end_config() -> ServerConfig | None:
    """The configuration that the environment tells the front end, or None.

    Raises ValueError: it is not JSON, or wrong.
    """
    text = os.environ.get(CONFIG_VARIABLE)
    if not text:
        return None
    try:
        given: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{CONFIG_VARIABLE} holds no JSON ({error}): {text[:80]!r}") from None
    return parse_config(given, CONFIG_VARIABLE)


def sentence(error: ValidationError, known: Collection[str]) -> str:
    """What pydantic found wrong, in one line: key, value, what was expected."""
    problems = error.errors(include_url=False)
    unknown = [str(p["loc"][-1]) for p in problems if p["type"] == "extra_forbidden"]
    parts = [unknown_keys(unknown, known)] if unknown else []
    for problem in problems:
        name = ".".join(str(part) for part in problem["loc"] if isinstance(part, str))
        if problem["type"] == "missing":
            parts.append(f"{name} is missing")
        elif problem["type"] == "value_error":
            parts.append(str(problem["ctx"]["error"]))
        elif problem["type"] != "extra_forbidden":
            parts.append(f"{name}={shown(problem['input'])}: {problem['msg'].lower()}")
    return "; ".join(dict.fromkeys(parts))


def unknown_keys(given: Sequence[str], known: Collection[str]) -> str:
    """The first keys that nobody knows, and those that there are."""
    some = ", ".join(map(shown, given[:_SHOWN_KEYS]))
    more = f" and {len(given) - _SHOWN_KEYS} more" if len(given) > _SHOWN_KEYS else ""
    return f"unknown key {some}{more}; known are {', '.join(known)}"


def shown(value: object) -> str:
    """What came, cut short: an error does not hand back a client's megabytes."""
    return _SHORT.repr(value)
