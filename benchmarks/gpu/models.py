"""Random policies and critics of real shapes, made where they run."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel

from benchmarks.gpu.floors import Size
from guided_decode.checkpoints.source import open_source
from guided_decode.checkpoints.trunk import load_trunk
from guided_decode.scoring.critic import ValueHead

_STD = 0.02
# Beyond the checkpoints' own: prefixes of 4096 tokens are decoded from.
_POSITIONS = 8192


def config_of(size: Size) -> LlamaConfig:
    """The size's config, without special tokens: no row ends while it is timed."""
    return LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=_POSITIONS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def random_model(model_class: Any, size: Size, device: str, dtype: torch.dtype, seed: int) -> Any:
    """A model of normal weights; nothing of it is ever on another device."""
    with torch.device("meta"):
        model: PreTrainedModel = model_class(config_of(size))
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, weight in model.named_parameters():
        weight.requires_grad_(False)
        if "norm" in name:
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, _STD, generator=generator)
    # Its frequencies are no parameters, and float32 whatever the weights are.
    trunk: Any = model.base_model
    trunk.rotary_emb = type(trunk.rotary_emb)(config=model.config).to(device)
    return model.eval()


@dataclass(frozen=True)
class Models:
    """A policy and a critic with transformers' own attention, and the critic's head."""

    size: Size
    policy: LlamaForCausalLM
    critic: LlamaModel
    head: ValueHead

    @classmethod
    def random(cls, size: Size, device: str, dtype: torch.dtype, seed: int = 0) -> "Models":
        policy = random_model(LlamaForCausalLM, size, device, dtype, seed)
        critic = random_model(LlamaModel, size, device, dtype, seed + 1)
        return cls(size, policy, critic, ValueHead(head_weight(size, device), None, first_label))

    @property
    def device(self) -> torch.device:
        return self.policy.device

    def policy_trunk(self) -> PreTrainedModel:
        """The policy's decoder on a config of its own, sharing its weights."""
        return load_trunk(open_source(self.policy), None, None)

    def critic_trunk(self) -> PreTrainedModel:
        """The critic on a config of its own, sharing its weights, which its scorer may move: as
        one that was read from its checkpoint."""
        kept = [*self.critic.parameters(), *self.critic.buffers()]
        trunk: PreTrainedModel = copy.deepcopy(self.critic, {id(each): each for each in kept})
        return trunk


def head_weight(size: Size, device: str) -> Tensor:
    """float32 [1, hidden]."""
    generator = torch.Generator(device).manual_seed(7)
    return torch.randn(1, size.hidden, device=device, generator=generator) / size.hidden**0.5


def first_label(output: Tensor) -> Tensor:
    return output[:, 0]
