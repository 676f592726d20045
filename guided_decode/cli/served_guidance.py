"""What a served scorer and its guidance are set to, from options, JSON and what was chosen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from guided_decode.cli.checkpoints import DEFAULT_POLICY, DEFAULT_SCORER, location, pair
from guided_decode.cli.errors import Refusal
from guided_decode.cli.guidance_options import chosen_for
from guided_decode.guidance.config import GuidanceConfig
from guided_decode.integrations.vllm.server_config import parse_config, shown


def paired(policy: str | None, scorer: object) -> tuple[str, str]:
    """Policy and scorer, each found through the registry where only the other is given.

    A scorer that is a file is a head on the policy's own hidden states.

    Raises Refusal: no model is called so, or the registry knows no partner of it.
    """
    if scorer is not None and not isinstance(scorer, str):
        raise Refusal(f"scorer={shown(scorer)}: expected a name, in quotes")
    if scorer is not None and Path(scorer).is_file():
        location(policy or DEFAULT_POLICY)
        return policy or DEFAULT_POLICY, scorer
    try:
        return pair(policy, scorer)
    except Refusal as error:
        # Here the policy is an argument, not an option.
        raise Refusal(str(error).replace("--policy", "POLICY")) from None


def guided_config(
    scorer: str, in_json: Mapping[str, Any], options: Mapping[str, Any], *, groups: bool
) -> dict[str, Any]:
    """The value of additional_config["guided_decode"], checked as the server checks it.

    Args:
        scorer: the scorer's name.
        in_json: the user's own value of it.
        options: what was given on the command line, which wins; None was not given.
        groups: whether siblings can be compared; else groups are refused.

    Raises Refusal: a model that is not there. ValueError: a setting that is wrong.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if given.get("top_k") == 0:
        given["top_k"] = None
    given = {**in_json, **given, "scorer": scorer}
    config = chosen_settings(scorer, given.get("rule")) | given
    if not groups:
        config["max_group_size"] = 0
    for name in ("reward", "reference"):
        if isinstance(config.get(name), str):
            location(config[name])
    parse_config(config, "the configuration")
    return config


def example_request(config: Mapping[str, Any], model: str) -> str:
    """The body of a chat request that is guided, as JSON."""
    is_tiny = config["scorer"] == DEFAULT_SCORER
    question = "What is 4785 + 5426?" if is_tiny else "Why is the sky blue?"
    return json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 100,
            "vllm_xargs": {"guide": 1},
        }
    )


def chosen_settings(scorer: str, rule: object) -> dict[str, Any]:
    """The settings that were chosen for a scorer of that name, where some were."""
    picked, usual = asdict(chosen_for(scorer, rule)), asdict(GuidanceConfig())
    return {name: value for name, value in picked.items() if value != usual[name]}
