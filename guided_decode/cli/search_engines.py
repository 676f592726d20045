"""Policies of `search` that vLLM decodes, in this process or on servers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from guided_decode.cli.checkpoints import load_tokenizer, location
from guided_decode.cli.engine_options import EngineOptions
from guided_decode.cli.errors import Refusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from guided_decode.integrations.vllm import VllmGenerator
    from guided_decode.search.servers.generator import ServerGenerator


def policy_tokenizer(policy: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a policy whose weights are not needed here. Raises Refusal: it has none."""
    return load_tokenizer(policy, f"policy {policy}", trust_remote_code=trust_remote_code)


def connect(
    options: EngineOptions, policy: str, *, trust_remote_code: bool
) -> ServerGenerator | None:
    """The policy on its servers, once they have shown what they can; None where it is on none.

    Raises Refusal or ValueError: one serves another model, or is not exact. EndpointError: one
    does not answer.
    """
    if not options.on_servers:
        return None
    from guided_decode.search.http_access import api_key_of
    from guided_decode.search.servers import connect_generator

    tokenizer = policy_tokenizer(policy, trust_remote_code=trust_remote_code)
    try:
        return connect_generator(
            options.endpoint or (),
            tokenizer=tokenizer,
            model=options.served_model,
            eos_token_ids=ends_of(policy, tokenizer, trust_remote_code=trust_remote_code),
            api_key=api_key_of(options.api_key_env),
            **options.limits(),
        )
    except ValueError as error:
        raise Refusal(str(error).replace("model=", "--served-model")) from error


def start_vllm(
    options: EngineOptions, policy: str, tokenizer: PreTrainedTokenizerBase, dtype: str,
    *, trust_remote_code: bool,
) -> VllmGenerator:  # fmt: skip
    """The policy on a vLLM engine of its own. Raises Refusal: vLLM is not there, or cannot."""
    settings: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    settings |= options.arguments()
    # stdout may be where the lines go; these are read when vLLM is imported.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        from guided_decode.integrations.vllm import load_vllm_generator
    except ImportError as error:
        raise Refusal(f"--engine vllm: {error}; pip install 'guided-decode[vllm]'") from error
    ends = ends_of(policy, tokenizer, trust_remote_code=trust_remote_code)
    try:
        return load_vllm_generator(
            location(policy), tokenizer=tokenizer, eos_token_ids=ends, **settings
        )
    except (TypeError, RuntimeError) as error:
        raise Refusal(f"--engine vllm does not start with {settings}: {error}") from error


def ends_of(
    policy: str, tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool
) -> set[int]:
    """What ends a policy's response: its generation config's ids, and its tokenizer's."""
    from transformers import AutoConfig, GenerationConfig

    where = location(policy)
    found: Any = None
    for read in (
        lambda: GenerationConfig.from_pretrained(where),
        lambda: AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code),
    ):
        try:
            found = read().eos_token_id
        except (OSError, ValueError):
            # A folder may hold a tokenizer alone.
            continue
        break
    ids = [*(found if isinstance(found, list) else [found]), tokenizer.eos_token_id]
    return {each for each in ids if each is not None}
