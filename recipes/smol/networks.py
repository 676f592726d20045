"""Policy, reference and value model on one frozen trunk, as `recipes.ppo` takes networks."""

from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification
from transformers.modeling_outputs import CausalLMOutput, TokenClassifierOutput

from recipes.smol.sampling import MergedSampler
from recipes.smol.settings import Settings
from recipes.smol.stack import LowerLayers, multiply_in, share, stack

MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Network(nn.Module):
    """A model whose lower layers are read through `LowerLayers`.

    model: the whole of it, with adapters or without; only they and a value head's weight learn.
    """

    def __init__(self, model: Any, lower: LowerLayers, adapted: int) -> None:
        super().__init__()
        self.model = model
        trunk = _plain(model).model
        layers = len(trunk.layers)
        # Not among the parameters once more.
        self._above = (lower, stack(trunk, layers - adapted, layers, trunk.norm))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def hidden(self, tokens: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        """The last hidden states, float32 [rows, width, hidden]."""
        lower, upper = self._above
        with multiply_in(lower.dtype, tokens.device):
            states: Tensor = upper(
                inputs_embeds=lower(tokens, attention, positions),
                attention_mask=attention,
                position_ids=positions,
                use_cache=False,
            ).last_hidden_state
        return states.float()


class PolicyNetwork(Network):
    """A causal LM; `sampler` is what responses are drawn from."""

    def __init__(
        self, model: Any, lower: LowerLayers, adapted: int, sampler: MergedSampler | None = None
    ) -> None:
        super().__init__(model, lower, adapted)
        self._sampler = sampler

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> CausalLMOutput:
        """Logits of the last `logits_to_keep` positions (0: of all), as transformers has it."""
        states = self.hidden(input_ids, attention_mask, position_ids)[:, -logits_to_keep:]
        return CausalLMOutput(logits=_plain(self.model).lm_head(states))

    def generate(self, **how: Any) -> Tensor:
        assert self._sampler is not None
        return self._sampler.generate(self.model, **how)


class ValueNetwork(Network):
    """A token classifier with one label; `score` is its head, without a bias that learns."""

    def __init__(self, model: Any, lower: LowerLayers, adapted: int) -> None:
        super().__init__(model, lower, adapted)
        head = _plain(model).score
        self.score = head.modules_to_save[head.active_adapters[0]]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        use_cache: bool = False,
    ) -> TokenClassifierOutput:
        states = self.hidden(input_ids, attention_mask, position_ids)
        return TokenClassifierOutput(logits=self.score(states))


@dataclass(frozen=True)
class Networks:
    """The three, whose frozen weights are the same in memory."""

    policy: PolicyNetwork
    reference: PolicyNetwork
    value: ValueNetwork
    lower: LowerLayers


def build_networks(base: Any, settings: Settings) -> Networks:
    """Three networks on the trunk of `base`, a causal LM; both adapters start as if not there.

    Torch's global generator draws the adapters' first weights.
    """
    base.requires_grad_(False)
    adapted, layers = settings.adapted_layers, base.config.num_hidden_layers
    if not adapted < layers:
        raise ValueError(f"adapted_layers is {adapted}, but the model has {layers} layers.")
    # Two rollouts' rows: the next one's come while the last one's are there.
    rows, dtype = 2 * settings.ppo.rollouts_per_step, getattr(torch, settings.compute_dtype)
    lower = LowerLayers(base.model, layers - adapted, rows, dtype)
    sampler = MergedSampler(base, dtype)
    return Networks(
        PolicyNetwork(_adapted(share(base), settings, "CAUSAL_LM"), lower, adapted, sampler),
        PolicyNetwork(base, lower, adapted),
        ValueNetwork(_adapted(_value_model(base), settings, "TOKEN_CLS"), lower, adapted),
        lower,
    )


def _adapted(model: Any, settings: Settings, task: str) -> Any:
    layers = model.config.num_hidden_layers
    config = peft.LoraConfig(
        task_type=task,
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=MATRICES,
        layers_to_transform=list(range(layers - settings.adapted_layers, layers)),
        layers_pattern="layers",
    )
    return peft.get_peft_model(model, config).eval()


def _value_model(base: Any) -> Any:
    """A token classifier with one label on the trunk of a causal LM; its head starts at zero."""
    config = type(base.config).from_dict(base.config.to_dict() | {"classifier_dropout": 0.0})
    config.num_labels = 1
    with torch.device("meta"):
        model = AutoModelForTokenClassification.from_config(config)
    model.model = share(base.model)
    model.score = nn.Linear(config.hidden_size, 1)
    with torch.no_grad():
        model.score.weight.zero_()
        model.score.bias.zero_()
    return model


def _plain(model: Any) -> Any:
    """The transformers model in a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model
