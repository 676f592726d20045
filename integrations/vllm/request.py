"""What a request asks for: flat keys in `vllm_xargs`, checked by the front end and the worker."""

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple, Protocol, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError

from guided_decode.guidance.config import GuidanceConfig, Rule, Tail
from guided_decode.integrations.vllm.server_config import (
    ServerConfig,
    sentence,
    shown,
    unknown_keys,
)

# The keys that change a setting of GuidanceConfig; each of them asks for guidance.
_SETTINGS = (
    "beta", "top_k", "top_p", "rule", "margin", "tail", "gate", "value_gate", "value_gate_fall",
)  # fmt: skip
_GROUP = ("group", "group_size", "keep", "every")
# True and false are as good as 1 and 0.
_Flag = Annotated[int, BeforeValidator(lambda v: int(v) if isinstance(v, bool) else v)]
# stop_token_ids of a guided request; each is looked for among its candidates at every step. What
# ends any request of the policy comes on top.
MOST_STOP_IDS = 128
# Leaves every row's logits as they are, and scores nothing.
UNGUIDED = GuidanceConfig(beta=0.0, tail="keep")


class SamplingParams(Protocol):
    """What is read of vLLM's SamplingParams."""

    extra_args: dict[str, Any] | None
    stop_token_ids: list[int] | None
    ignore_eos: bool
    min_tokens: int
    structured_outputs: Any


@dataclass(frozen=True, slots=True)
class Pruning:
    """Siblings: which group, how many there are and survive, how often they are compared.

    token: the id that ends a pruned sibling; one of its stop_token_ids.
    """

    group: str
    size: int
    keep: int
    every: int
    token: int


@functools.lru_cache(maxsize=1024)
def _shared(config: GuidanceConfig) -> GuidanceConfig:
    """One object of all that are equal."""
    return config


@dataclass(frozen=True, slots=True)
class Request:
    """What one request gets: its guidance, what ends it, and its group.

    end_token: ends it where its config abstains; one of its stop_token_ids. None: it does not.
    is_guided: whether guidance can change a logit; a request may only be in a group. is_watched:
    whether its value may end it. Requests that ask for the same share one config.
    """

    config: GuidanceConfig
    terminals: tuple[int, ...]
    pruning: Pruning | None = None
    end_token: int | None = None
    is_guided: bool = field(init=False, compare=False, repr=False)
    is_watched: bool = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", _shared(self.config))
        object.__setattr__(self, "is_guided", self.config.guides)
        watched = self.pruning is not None or self.end_token is not None
        object.__setattr__(self, "is_watched", watched)

    def abstains_at(self, tokens: int) -> bool:
        """Whether the value of a response of so many tokens may end it."""
        return self.end_token is not None and self.config.abstains_at(tokens)


class Keys(BaseModel):
    """The keys of `vllm_xargs` that begin with `guide`, without that prefix; types and ranges.

    guide: 1 asks for guidance, 0 refuses it.
    beta, top_k, top_p, rule, margin, tail, gate, value_gate, value_gate_fall: as in
        `GuidanceConfig`; each asks for guidance.
    abstain, abstain_after: as there; by themselves they guide nothing.
    group: an unguessable value that the samples of one prompt share; these are then compared.
    group_size, keep, every: how many siblings there are, how many survive, and after how many
        tokens they are compared, again and again.
    prune_token: which of stop_token_ids ends a pruned sibling, or a response that abstains; needed
        where there are several.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    guide: _Flag | None = Field(default=None, ge=0, le=1)
    beta: FiniteFloat | None = Field(default=None, alias="guide_beta")
    top_k: int | None = Field(default=None, ge=1, alias="guide_top_k")
    top_p: FiniteFloat | None = Field(default=None, gt=0, le=1, alias="guide_top_p")
    rule: Rule | None = Field(default=None, alias="guide_rule")
    margin: FiniteFloat | None = Field(default=None, ge=0, alias="guide_margin")
    tail: Tail | None = Field(default=None, alias="guide_tail")
    gate: FiniteFloat | None = Field(default=None, gt=0, le=1, alias="guide_gate")
    value_gate: FiniteFloat | None = Field(default=None, alias="guide_value_gate")
    value_gate_fall: FiniteFloat | None = Field(default=None, ge=0, alias="guide_value_gate_fall")
    abstain: FiniteFloat | None = Field(default=None, alias="guide_abstain")
    abstain_after: int | None = Field(default=None, ge=1, alias="guide_abstain_after")
    group: str | None = Field(default=None, min_length=8, max_length=128, alias="guide_group")
    group_size: int | None = Field(default=None, ge=2, alias="guide_group_size")
    keep: int | None = Field(default=None, ge=1, alias="guide_keep")
    every: int | None = Field(default=None, ge=1, alias="guide_every")
    prune_token: int | None = Field(default=None, ge=0, alias="guide_prune_token")

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of GuidanceConfig that the request names."""
        given = {name: getattr(self, name) for name in _SETTINGS}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def abstention(self) -> dict[str, Any]:
        """What the request says of abstention, as fields of GuidanceConfig; nothing: empty."""
        if self.abstain is None:
            return {}
        return {"abstain": self.abstain, "abstain_after": self.abstain_after}

    @property
    def needs_values(self) -> str | None:
        """The first key that reads values of prefixes, or None."""
        names = ("group", "abstain", "value_gate", "value_gate_fall")
        return next((f"guide_{n}" for n in names if getattr(self, n) is not None), None)


_KNOWN = tuple(field.alias or name for name, field in Keys.model_fields.items())


class Admitted(NamedTuple):
    """request: what the worker does for it, None for nothing; clamps: what it did not grant."""

    request: Request | None
    clamps: list[str]


def check_request(params: SamplingParams, config: ServerConfig | None) -> None:
    """What the front end refuses.

    config: the server's, or None where the front end was not told: then what depends on its
    defaults and limits is left to the worker, which clamps.

    Raises ValueError: the reason, for HTTP 400.
    """
    keys = _keys(params.extra_args)
    if keys is None:
        return
    _check_combination(keys)
    listed = len(params.stop_token_ids or ())
    if listed > MOST_STOP_IDS:
        raise ValueError(
            f"{listed} stop_token_ids came with a guided request: expected at most {MOST_STOP_IDS}"
        )
    if keys.group is not None:
        _pruning(keys, params, ())
        _check_ends_with(params, "guide_group")
    if keys.abstain is not None:
        _end_token(keys, params, (), "guide_abstain")
        _check_ends_with(params, "guide_abstain")
    if config is not None:
        _check_with_defaults(keys, config)
        _check_limits(keys, config)
        if config.kind == "implicit" and keys.needs_values is not None:
            unasked = "no groups" if keys.group is not None else "a request without it"
            raise ValueError(
                f"{keys.needs_values} was given, but the server's scorer is an implicit reward, "
                f"which has no value of a prefix: expected {unasked}"
            )


def admit(
    params: SamplingParams,
    config: ServerConfig,
    end_ids: Collection[int],
    *,
    groups: bool,
    guides: bool = True,
    values: bool = True,
) -> Admitted:
    """What the worker does for a request: within the limits, and never an error.

    Args:
        params: of the request.
        config: of the server.
        end_ids: what ends any request of this policy, besides its EOS.
        groups: whether this engine can compare siblings.
        guides: whether it can look ahead.
        values: whether its scorer has values of prefixes.
    """
    clamps: list[str] = []
    try:
        keys = _keys(params.extra_args) or Keys.model_validate({})
        _check_combination(keys)
        keys = _clamped(keys, config, clamps)
        if not values:
            keys = _without_values(keys, clamps)
    except ValueError as error:
        return Admitted(None, [str(error)])
    guidance = pruning = None
    try:
        guidance = _guidance(keys, config)
        if guidance is not None and not guides:
            # With a value log, guide=1 asks to be written there.
            if config.value_log is None or keys.settings:
                clamps.append(
                    "guidance by the policy's own trunk is not to be had here (the log of the "
                    "server's start has the reason): the head compares siblings only"
                )
            guidance = None if config.value_log is None else UNGUIDED
    except ValueError as error:
        clamps.append(str(error))
    if keys.group is not None:
        pruning = _granted_group(keys, params, config, end_ids, clamps, groups=groups)
    asked = guidance or UNGUIDED
    asked, end_token = _granted_abstention(keys, params, asked, end_ids, clamps)
    if guidance is None and pruning is None and end_token is None:
        return Admitted(None, clamps)
    terminals = _terminals(params)
    if len(set(params.stop_token_ids or ()).difference(end_ids)) > MOST_STOP_IDS:
        clamps.append(f"{len(terminals)} stop tokens became {MOST_STOP_IDS}")
        terminals = terminals[:MOST_STOP_IDS]
    return Admitted(Request(asked, terminals, pruning, end_token), clamps)


def is_own_key(name: str) -> bool:
    """Whether a key of `vllm_xargs` is ours."""
    return name == "guide" or name.startswith("guide_")


def _keys(extra_args: Mapping[str, Any] | None) -> Keys | None:
    """The request's own keys; None where it has none."""
    given = {name: value for name, value in (extra_args or {}).items() if is_own_key(name)}
    if not given:
        return None
    unknown = [name for name in given if name not in _KNOWN]
    if unknown:
        # Before anything looks at each of them: there may be a million.
        raise ValueError(unknown_keys(unknown, _KNOWN))
    try:
        return Keys.model_validate(given)
    except ValidationError as error:
        raise ValueError(sentence(error, _KNOWN)) from None


def _guidance(keys: Keys, config: ServerConfig) -> GuidanceConfig | None:
    """The settings that the request gets, or None where it is not guided."""
    settings = keys.settings
    asked = bool(settings) if keys.guide is None else bool(keys.guide)
    if not (asked or (keys.guide is None and config.guide_by_default)):
        return None
    return config.guidance.changed(**settings, **keys.abstention)


def _check_combination(keys: Keys) -> None:
    if keys.guide is not None and not keys.guide and keys.settings:
        raise ValueError(
            f"guide=0 was given together with guide_{next(iter(keys.settings))}: expected guide=1, "
            "or no settings"
        )
    stray = [f"guide_{name}" for name in _GROUP[1:] if getattr(keys, name) is not None]
    if keys.group is None and stray:
        raise ValueError(f"{', '.join(stray)} came without guide_group: pass both, or neither")
    if keys.prune_token is not None and keys.group is None and keys.abstain is None:
        raise ValueError(
            "guide_prune_token came without guide_group or guide_abstain: pass both, or neither"
        )
    if keys.abstain_after is not None and keys.abstain is None:
        raise ValueError("guide_abstain_after came without guide_abstain: pass both, or neither")
    if keys.rule == "reweight" and keys.margin is not None:
        raise ValueError(
            f"guide_margin={keys.margin:g} was given with guide_rule='reweight', which has no "
            "margin: drop it, or pass guide_rule='prune'"
        )


def _check_with_defaults(keys: Keys, config: ServerConfig) -> None:
    try:
        _guidance(keys, config)
    except ValueError as error:
        raise ValueError(f"with the server's defaults this request has {error}") from None


def _check_limits(keys: Keys, config: ServerConfig) -> None:
    if keys.top_k is not None and keys.top_k > config.max_top_k:
        raise ValueError(
            f"guide_top_k={shown(keys.top_k)} is above the server's limit {config.max_top_k}"
        )
    if keys.beta is not None and config.max_beta is not None and abs(keys.beta) > config.max_beta:
        raise ValueError(f"guide_beta={keys.beta:g} is above the server's limit {config.max_beta}")
    if keys.group is not None and not config.max_group_size:
        raise ValueError("guide_group was given, but this server compares no siblings")
    if keys.group_size is not None and keys.group_size > config.max_group_size:
        raise ValueError(
            f"guide_group_size={shown(keys.group_size)} is above the server's limit "
            f"{config.max_group_size}"
        )


def _clamped(keys: Keys, config: ServerConfig, clamps: list[str]) -> Keys:
    changed: dict[str, Any] = {}
    if keys.top_k is not None and keys.top_k > config.max_top_k:
        changed["top_k"] = config.max_top_k
        clamps.append(f"guide_top_k={shown(keys.top_k)} became {config.max_top_k}")
    if keys.beta is not None and config.max_beta is not None and abs(keys.beta) > config.max_beta:
        changed["beta"] = config.max_beta if keys.beta > 0 else -config.max_beta
        clamps.append(f"guide_beta={keys.beta:g} became {changed['beta']:g}")
    return keys.model_copy(update=changed) if changed else keys


def _pruning(keys: Keys, params: SamplingParams, end_ids: Collection[int]) -> Pruning:
    """The group that the request asks for.

    Raises ValueError: a part is missing, or no one knows which token ends a pruned sibling.
    """
    missing = [f"guide_{n}" for n in ("group_size", "keep", "every") if getattr(keys, n) is None]
    if missing:
        raise ValueError(f"guide_group came without {', '.join(missing)}: pass all of them")
    size, keep, every = (cast(int, n) for n in (keys.group_size, keys.keep, keys.every))
    if keep >= size:
        raise ValueError(
            f"guide_keep={shown(keep)} with guide_group_size={shown(size)} prunes nobody: "
            "expected fewer"
        )
    token = _end_token(keys, params, end_ids, "guide_group")
    return Pruning(cast(str, keys.group), size, keep, every, token)


def _end_token(keys: Keys, params: SamplingParams, end_ids: Collection[int], asked_by: str) -> int:
    """The id that ends a pruned sibling, or a response that abstains.

    Raises ValueError: no one knows which it is, or it would end nothing, or nobody could tell.
    """
    who = "a pruned sibling" if asked_by == "guide_group" else "a response that abstains"
    listed = list(params.stop_token_ids or ())
    eos = _eos(params)
    token = keys.prune_token
    if token is None:
        # vLLM adds the policy's other end tokens to the client's own list.
        own = [i for i in listed if i not in end_ids and i != eos]
        asks = keys.group is not None or keys.abstain is not None
        if asks and len(listed) == 1:
            own = listed
        if len(own) != 1:
            raise ValueError(
                f"{asked_by} came with stop_token_ids={shown(listed)}: expected the one id that "
                f"ends {who}, or guide_prune_token to say which of them does"
            )
        token = own[0]
    if token not in listed:
        raise ValueError(
            f"guide_prune_token={shown(token)} is not among stop_token_ids={shown(listed)}: "
            f"{who} would go on; list it there"
        )
    if token == eos:
        # vLLM looks for it before the stop tokens.
        raise ValueError(
            f"{asked_by} came with token {token} to end {who}, the policy's own EOS, which leaves "
            "no stop_reason: expected an id that the policy does not write by itself, or ignore_eos"
        )
    return token


def _check_ends_with(params: SamplingParams, asked_by: str) -> None:
    who = "a pruned sibling" if asked_by == "guide_group" else "a response that abstains"
    for name, given in (
        ("structured_outputs", params.structured_outputs),
        ("min_tokens", params.min_tokens),
    ):
        if given:
            raise ValueError(
                f"{asked_by} was given together with {name}, which may forbid the token that "
                f"ends {who}: drop one of them"
            )


def _granted_group(
    keys: Keys,
    params: SamplingParams,
    config: ServerConfig,
    end_ids: Collection[int],
    clamps: list[str],
    *,
    groups: bool,
) -> Pruning | None:
    try:
        pruning = _pruning(keys, params, end_ids)
        _check_ends_with(params, "guide_group")
    except ValueError as error:
        clamps.append(str(error))
        return None
    if not groups or pruning.size > config.max_group_size:
        clamps.append(
            f"guide_group with {shown(pruning.size)} siblings is not compared by this server"
        )
        return None
    return pruning


def _granted_abstention(
    keys: Keys,
    params: SamplingParams,
    guidance: GuidanceConfig,
    end_ids: Collection[int],
    clamps: list[str],
) -> tuple[GuidanceConfig, int | None]:
    """The settings with the abstention that is granted, and the token that ends the request.

    The server's default is for requests that have such a token; only one that asks itself is told
    that it has none.
    """
    config = guidance.changed(**keys.abstention)
    if config.abstain is None:
        return config, None
    try:
        token = _end_token(keys, params, end_ids, "guide_abstain")
        _check_ends_with(params, "guide_abstain")
    except ValueError as error:
        if keys.abstain is not None:
            clamps.append(str(error))
        return config.changed(abstain=None), None
    return config, token


def _without_values(keys: Keys, clamps: list[str]) -> Keys:
    """What a scorer without values of prefixes can grant; groups are looked at elsewhere."""
    names = ("abstain", "abstain_after", "value_gate", "value_gate_fall")
    given = [name for name in names if getattr(keys, name) is not None]
    if not given:
        return keys
    named = ", ".join(f"guide_{name}" for name in given)
    clamps.append(f"{named} came, but this scorer has no value of a prefix")
    return keys.model_copy(update=dict.fromkeys(given))


def _terminals(params: SamplingParams) -> tuple[int, ...]:
    """Token ids that end this request."""
    eos = _eos(params)
    return tuple(dict.fromkeys([*(() if eos is None else (eos,)), *(params.stop_token_ids or ())]))


def _eos(params: SamplingParams) -> int | None:
    """The policy's own EOS; under ignore_eos it is an ordinary token, and None."""
    return None if params.ignore_eos else getattr(params, "eos_token_id", None)
