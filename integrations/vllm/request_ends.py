"""What ends a request before the policy does: its siblings, or a value that fell too low.

Both end it by a token of its own stop_token_ids, which the policy does not write by itself.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol, cast

from guided_decode.guidance.config import GuidanceConfig
from guided_decode.integrations.vllm.request_keys import Keys
from guided_decode.integrations.vllm.server_config import ServerConfig, shown


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


def check_ends(keys: Keys, params: SamplingParams) -> None:
    """Raises ValueError: nothing could end the request as its keys ask."""
    if keys.group is not None:
        _pruning(keys, params, ())
        _check_ends_with(params, "guide_group")
    if keys.abstain is not None:
        _end_token(keys, params, (), "guide_abstain")
        _check_ends_with(params, "guide_abstain")


def granted_group(
    keys: Keys,
    params: SamplingParams,
    config: ServerConfig,
    end_ids: Collection[int],
    clamps: list[str],
    *,
    groups: bool,
) -> Pruning | None:
    """The group that is granted, or None; `clamps` gets the reason."""
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


def granted_abstention(
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


def terminals_of(params: SamplingParams) -> tuple[int, ...]:
    """Token ids that end this request."""
    eos = _eos(params)
    return tuple(dict.fromkeys([*(() if eos is None else (eos,)), *(params.stop_token_ids or ())]))


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


def _eos(params: SamplingParams) -> int | None:
    """The policy's own EOS; under ignore_eos it is an ordinary token, and None."""
    return None if params.ignore_eos else getattr(params, "eos_token_id", None)
