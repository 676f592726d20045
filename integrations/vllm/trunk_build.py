"""Guidance by the policy's own trunk from vLLM's configuration: where it can be had, and how."""

import logging
from typing import TYPE_CHECKING

import torch

from guided_decode.checkpoints.trunk_head_loading import read_trunk_head
from guided_decode.integrations.vllm.held_step import HeldStep
from guided_decode.integrations.vllm.own_forward import OwnForward
from guided_decode.integrations.vllm.own_trunk import Broadcast, OwnTrunk
from guided_decode.integrations.vllm.runner_seat import take_seat
from guided_decode.integrations.vllm.server_config import ServerConfig, head_options
from guided_decode.integrations.vllm.trunk_tap import TrunkTap, check_fits

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("guided_decode")

# Of the KV cache, for looking ahead: more candidates than that are forwarded in parts.
_BLOCKS = 256


def trunk_tap(config: ServerConfig, vllm_config: "VllmConfig", device: torch.device) -> TrunkTap:
    """The head on the policy's own hidden states.

    Raises ValueError: the head does not fit this policy, or the engine serves LoRA adapters.
    """
    from vllm.model_executor.model_loader.utils import get_model_architecture

    if vllm_config.lora_config is not None:
        raise ValueError(
            "kind=trunk-head reads the policy's own hidden states, which a LoRA adapter "
            "changes: start the server without --enable-lora, or with a critic of its own"
        )
    model = vllm_config.model_config
    head = read_trunk_head(config.scorer, **head_options(config))
    check_fits(head, config.scorer, model.hf_text_config, model.model)
    tap = TrunkTap(head.to(device))
    tap.watch(get_model_architecture(model)[0])
    return tap


def own_trunk(
    config: ServerConfig, vllm_config: "VllmConfig", tap: TrunkTap, broadcast: Broadcast | None
) -> OwnTrunk | None:
    """Guidance by the policy's own trunk; None where this engine's model cannot look ahead."""
    model = vllm_config.model_config
    try:
        refuse_look_ahead(vllm_config)
        seat = take_seat(vllm_config, config.max_forward_tokens or _BLOCKS)
    except (ValueError, RuntimeError) as error:
        logger.warning(
            "the head %s on the policy's own trunk compares siblings, and guides no one: %s",
            config.scorer, error,
        )  # fmt: skip
        return None
    logger.info("the head %s on the policy's own trunk scores the candidates", config.scorer)
    eos = model.hf_text_config.eos_token_id
    forward = OwnForward(vllm_config, seat)
    return OwnTrunk(
        tap,
        forward,
        vocab_size=model.get_vocab_size(),
        max_length=model.max_model_len,
        eos_token_id=eos[0] if isinstance(eos, list) else eos,
        terminal=config.terminal or "baseline",
        held=HeldStep(forward),
        broadcast=broadcast,
    )


def refuse_look_ahead(vllm_config: "VllmConfig") -> None:
    """Raises ValueError: what keeps the policy from looking ahead in its own KV blocks."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    several = {
        "pipeline parallelism": parallel.pipeline_parallel_size,
        "data parallelism": parallel.data_parallel_size,
        "decode context parallelism": getattr(parallel, "decode_context_parallel_size", 1),
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1),
    }
    found = [name for name, size in several.items() if size > 1]
    if getattr(model, "uses_mrope", False):
        found.append("positions of several dimensions")
    if getattr(model, "is_hybrid", False) or getattr(model, "is_attention_free", False):
        found.append("layers with a state in place of keys and values")
    if getattr(model, "is_encoder_decoder", False):
        found.append("an encoder")
    if getattr(model, "rswa_window", None) is not None:
        found.append("windows that leave the prompt visible")
    attention = getattr(vllm_config, "attention_config", None)
    if getattr(attention, "hisparse_config", None) is not None:
        found.append("a KV cache on the host")
    if getattr(vllm_config, "kv_transfer_config", None) is not None:
        found.append("a KV connector, which every forward would tell of tokens that nobody wrote")
    if found:
        raise ValueError(f"this engine has {' and '.join(found)}")
