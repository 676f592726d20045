"""What is trained: a copy of the policy with a head, adapters and a head, or a head alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, PreTrainedModel

from guided_decode.checkpoints.adapter_layers import has_adapters
from guided_decode.critics.config import CriticConfig
from guided_decode.critics.features import Features, last_hidden_states
from guided_decode.critics.rollout import Rollout

_HEAD = "score"


@dataclass(frozen=True, slots=True)
class Network:
    """A critic in training.

    model: a token-classification model, with adapters in it or not; None for a head alone. trunk:
    what reads token ids. head: from its hidden states to outputs. adapters: the PeftModel around
    the model, where there is one. features: the frozen trunk's hidden states, where they are kept.
    """

    trunk: Any
    head: nn.Module
    at_end: bool
    model: PreTrainedModel | None = None
    adapters: Any = None
    features: Features | None = None

    def outputs(self, rollouts: Sequence[Rollout], indices: Sequence[int]) -> Tensor:
        """The head's outputs at each prefix of some rollouts, float32 [rows, width, labels].

        rollouts: all of them. indices: the rows' own. A row begins with its prompt's value; what is
        behind its last prefix means nothing.
        """
        rows = [rollouts[i] for i in indices]
        if self.features is not None:
            hidden = self.features.rows(indices)
        elif self.model is None:
            with torch.no_grad():
                hidden = last_hidden_states(self.trunk, rows, at_end=self.at_end)
        else:
            hidden = last_hidden_states(self.trunk, rows, at_end=self.at_end)
        weight = next(self.head.parameters())
        outputs: Tensor = self.head(hidden.to(weight.device, weight.dtype))
        return outputs.float()

    def trainable(self) -> dict[str, nn.Parameter]:
        """What changes, by name."""
        whole = self.head if self.model is None else self.model
        return {name: each for name, each in whole.named_parameters() if each.requires_grad}

    def train(self, training: bool) -> None:
        """Switches dropout on or off, of what is trained."""
        (self.head if self.model is None else self.model).train(training)


def build(policy: PreTrainedModel, config: CriticConfig, mean: Tensor, name: str) -> Network:
    """A critic that says `mean` of every prefix.

    Args:
        policy: a causal LM; it is not changed, and with mode "head" its trunk is read.
        config: mode, labels, width and the rest.
        mean: of the targets, float32 [labels].
        name: the policy's, for errors.

    Raises ValueError: there is no class of token classifiers with a head called `score` for it, or
        it has adapters that are not merged and not "head" is asked for. ImportError: "lora"
        without peft.
    """
    generator = torch.Generator().manual_seed(config.seed)
    if config.mode == "head":
        size = int(policy.config.get_text_config().hidden_size)
        head = _new_head(size, config, generator).to(policy.device)
        policy.base_model.requires_grad_(False)
        _start_at(head, mean, config)
        return Network(policy.base_model, head, config.at_end)
    model = _token_classifier(policy, config, name)
    _start_at(model.get_submodule(_HEAD), mean, config)
    if config.mode == "full":
        return Network(model.base_model, model.get_submodule(_HEAD), config.at_end, model)
    trunk = model.base_model
    adapters = _with_adapters(model, config)
    return Network(trunk, model.get_submodule(_HEAD), config.at_end, model, adapters)


def _token_classifier(policy: PreTrainedModel, config: CriticConfig, name: str) -> PreTrainedModel:
    if has_adapters(policy):
        raise ValueError(
            f"{name} has a PEFT adapter in its layers that cannot be merged: expected whole "
            'weights, of which the critic is a copy; merge it, or pass mode="head"'
        )
    settings = copy.deepcopy(policy.config)
    settings.num_labels = config.labels
    settings.classifier_dropout = 0.0
    try:
        with torch.random.fork_rng(devices=[]):
            model = AutoModelForTokenClassification.from_config(settings, dtype=policy.dtype)
    except ValueError as error:
        raise ValueError(
            f"{name} is a {type(policy).__name__}, of which transformers has no token classifier "
            f'({str(error).splitlines()[0][:120]}): pass mode="head"'
        ) from error
    if not isinstance(getattr(model, _HEAD, None), nn.Linear):
        raise ValueError(
            f"{name} becomes a {type(model).__name__}, whose head is not called {_HEAD}: expected "
            'one that critics are read by; pass mode="head"'
        )
    model.base_model.load_state_dict(policy.base_model.state_dict())
    return model.to(policy.device)


def _new_head(size: int, config: CriticConfig, generator: torch.Generator) -> nn.Module:
    last = nn.Linear(config.width or size, config.labels)
    if not config.width:
        return last
    first = nn.Linear(size, config.width)
    nn.init.normal_(first.weight, std=size**-0.5, generator=generator)
    nn.init.zeros_(first.bias)
    return nn.Sequential(first, nn.GELU(), last)


def _start_at(head: nn.Module, mean: Tensor, config: CriticConfig) -> None:
    """Sets the head's last layer so that every prefix is worth the same."""
    last = head[-1] if isinstance(head, nn.Sequential) else head
    assert isinstance(last, nn.Linear)
    if last.bias is None:
        last.bias = nn.Parameter(torch.zeros_like(last.weight[:, 0]))
    with torch.no_grad():
        last.weight.zero_()
        # A class that never comes has some probability still.
        start = mean if config.loss == "squared" else mean.clamp(min=1e-3).log()
        last.bias.copy_(start)


def _with_adapters(model: PreTrainedModel, config: CriticConfig) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f'mode="lora" needs peft, which cannot be imported ({error}): '
            "pip install 'guided-decode[peft]'"
        ) from error
    settings = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules="all-linear",
        exclude_modules=[_HEAD],
        modules_to_save=[_HEAD],
        task_type="TOKEN_CLS",
    )
    # Matrices A are drawn.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return peft.get_peft_model(model, settings)
