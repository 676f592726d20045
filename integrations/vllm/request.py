"""What a request asks for: flat keys in `vllm_xargs`, checked by the front end and the worker."""

import functools
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from guided_decode.guidance.config import GuidanceConfig
from guided_decode.integrations.vllm.client_values.names import NAMES
from guided_decode.integrations.vllm.request_ends import (
    Pruning,
    SamplingParams,
    check_ends,
    granted_abstention,
    granted_group,
    terminals_of,
)
from guided_decode.integrations.vllm.request_keys import Keys, check_combination, keys_of
from guided_decode.integrations.vllm.server_config import ServerConfig, shown

# stop_token_ids of a guided request; each is looked for among its candidates at every step. What
# ends any request of the policy comes on top.
MOST_STOP_IDS = 128
# Leaves every row's logits as they are, and scores nothing.
UNGUIDED = GuidanceConfig(beta=0.0, tail="keep")


@functools.lru_cache(maxsize=1024)
def _shared(config: GuidanceConfig) -> GuidanceConfig:
    """One object of all that are equal."""
    return config


@dataclass(frozen=True, slots=True)
class Request:
    """What one request gets: its guidance, what ends it, and its group.

    end_token: ends it where its config abstains; one of its stop_token_ids. None: it does not.
    values_id: the name under which its values are kept for its client. None: nobody asked.
    is_guided: whether guidance can change a logit; a request may only be in a group. is_watched:
    whether its value may end it. Requests that ask for the same share one config.
    """

    config: GuidanceConfig
    terminals: tuple[int, ...]
    pruning: Pruning | None = None
    end_token: int | None = None
    values_id: str | None = None
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
    keys = keys_of(params.extra_args)
    if keys is None:
        return
    check_combination(keys)
    if keys.values_id is not None:
        NAMES.check(keys.values_id)
    listed = len(params.stop_token_ids or ())
    if listed > MOST_STOP_IDS:
        raise ValueError(
            f"{listed} stop_token_ids came with a guided request: expected at most {MOST_STOP_IDS}"
        )
    check_ends(keys, params)
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
    shows: bool = True,
) -> Admitted:
    """What the worker does for a request: within the limits, and never an error.

    Args:
        params: of the request.
        config: of the server.
        end_ids: what ends any request of this policy, besides its EOS.
        groups: whether this engine can compare siblings.
        guides: whether it can look ahead.
        values: whether its scorer has values of prefixes.
        shows: whether clients can be shown them.
    """
    clamps: list[str] = []
    try:
        keys = keys_of(params.extra_args) or Keys.model_validate({})
        check_combination(keys)
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
        pruning = granted_group(keys, params, config, end_ids, clamps, groups=groups)
    asked = guidance or UNGUIDED
    asked, end_token = granted_abstention(keys, params, asked, end_ids, clamps)
    shown_as = _granted_values(keys, clamps, shows=shows)
    if guidance is None and pruning is None and end_token is None and shown_as is None:
        return Admitted(None, clamps)
    terminals = terminals_of(params)
    if len(set(params.stop_token_ids or ()).difference(end_ids)) > MOST_STOP_IDS:
        clamps.append(f"{len(terminals)} stop tokens became {MOST_STOP_IDS}")
        terminals = terminals[:MOST_STOP_IDS]
    return Admitted(Request(asked, terminals, pruning, end_token, shown_as), clamps)


def _guidance(keys: Keys, config: ServerConfig) -> GuidanceConfig | None:
    """The settings that the request gets, or None where it is not guided."""
    settings = keys.settings
    asked = bool(settings) if keys.guide is None else bool(keys.guide)
    if not (asked or (keys.guide is None and config.guide_by_default)):
        return None
    return config.guidance.changed(**settings, **keys.abstention)


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


def _without_values(keys: Keys, clamps: list[str]) -> Keys:
    """What a scorer without values of prefixes can grant; groups are looked at elsewhere."""
    names = ("abstain", "abstain_after", "value_gate", "value_gate_fall", "values", "values_id")
    given = [name for name in names if getattr(keys, name) is not None]
    if not given:
        return keys
    named = ", ".join(f"guide_{name}" for name in given if name != "values_id")
    clamps.append(f"{named} came, but this scorer has no value of a prefix")
    return keys.model_copy(update=dict.fromkeys(given))


def _granted_values(keys: Keys, clamps: list[str], *, shows: bool) -> str | None:
    """The name under which the values are kept, where somebody can fetch them."""
    if not keys.values:
        return None
    if not shows:
        clamps.append("guide_values came, but nobody can fetch values from this engine's workers")
        return None
    return keys.values_id
