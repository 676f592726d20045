"""Policy, PPO policy and critic of one run: one trunk in memory, and adapters on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from guided_decode import load_scorer
from guided_decode.scoring.critic import CriticScorer

POLICIES = ("sft", "ppo")
_CRITIC, _HEAD = "critic", "base_model.model.score.weight"
# Prompts and answers of a batch, with room for what comes again.
_CACHE_TOKENS = 16_384


@dataclass(frozen=True)
class Family:
    """model: with the adapters of both in it. critic: keeps to its own, whichever is active."""

    model: Any
    tokenizer: Any
    critic: CriticScorer

    @contextmanager
    def policy(self, name: str) -> Iterator[Any]:
        """The model as the policy "sft", without adapters, or "ppo"."""
        if name not in POLICIES:
            raise ValueError(f"policy {name!r}: expected one of {', '.join(POLICIES)}")
        self.model.set_adapter("ppo")
        if name == "ppo":
            yield self.model
        else:
            with self.model.disable_adapter():
                yield self.model


def load_family(base: Any, tokenizer: Any, folder: Path) -> Family:
    """The released adapters of `folder` on `base`, a causal LM in memory, which gets them."""
    model = peft.PeftModel.from_pretrained(base, folder / "ppo", adapter_name="ppo").eval()
    config = peft.PeftConfig.from_pretrained(folder / "value")
    # The head is no module of a causal LM.
    config.modules_to_save, config.task_type = None, peft.TaskType.CAUSAL_LM
    config.inference_mode = True
    model.add_adapter(_CRITIC, config)
    weights = load_file(folder / "value" / "adapter_model.safetensors")
    row = weights[_HEAD].float()
    lora = {name: one.float() for name, one in weights.items() if ".score." not in name}
    set_peft_model_state_dict(model, lora, adapter_name=_CRITIC)
    head = nn.Linear(row.shape[1], 1)
    head.weight.data.copy_(row)
    head.bias.data.zero_()
    critic = load_scorer(
        model, kind="trunk-head", head=head, adapter=_CRITIC, policy_tokenizer=tokenizer,
        cache_tokens=_CACHE_TOKENS,
    )  # fmt: skip
    return Family(model, tokenizer, critic)
