"""What a response costs at most, before anything is run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from guided_decode.lab.ablate.grid import GUIDE, PLAIN

# The methods whose responses side by side are the settings that are multiplied.
_SIDE_BY_SIDE = {
    "best-of-n": ("n",),
    "vote": ("n",),
    "weighted-vote": ("n",),
    "prune-and-refill": ("n",),
    "smc": ("particles",),
    **dict.fromkeys(("block", "cd", "vgs", "dvts", "chunk-beam", "value-beam"),
                    ("width", "branches", "trees")),
}  # fmt: skip


def most_tokens(
    method: str, settings: Mapping[str, Any], prompt: float, response: int, *, scored: bool
) -> tuple[float, float]:
    """The most tokens that the policy, and the scorer, read or write for a response.

    Args:
        method: its name. settings: all of them.
        prompt, response: tokens of a prompt, and of the longest response.
        scored: whether a scorer is asked.
    """
    if method == PLAIN:
        return prompt + response, 0.0
    if method == GUIDE:
        k = settings.get("top_k")
        # A whole vocabulary comes with its prefix; a reference counts with the policy.
        readers = 2 if settings.get("kl_coef") else 1
        return readers * (prompt + response), prompt + response * (1 if k is None else k)
    lanes = 1
    for name in _SIDE_BY_SIDE.get(method, ()):
        lanes *= settings[name]
    if method == "cards":
        lanes = settings["retries"] + 1
    elif method not in _SIDE_BY_SIDE:
        lanes = settings["simulations"] + 1
    written = prompt + lanes * response
    policy = _limited(written, settings.get("max_policy_tokens"))
    scorer = _limited(written, settings.get("max_scorer_tokens")) if scored else 0.0
    return policy, scorer


def _limited(tokens: float, limit: int | None) -> float:
    return tokens if limit is None else min(tokens, float(limit))
