"""Policy, PPO policy, critic and trunk head of one run: adapters on one trunk in memory."""

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
from guided_decode.integrations.transformers import TrunkLookahead
from guided_decode.lab.demo.decoding import Loop
from guided_decode.scoring.critic import CriticScorer
from recipes.smol.stack import share

POLICIES = ("sft", "ppo")
_CRITIC, _HEAD = "critic", "base_model.model.score.weight"
# Prompts and answers of a batch, with room for what comes again.
_CACHE_TOKENS = 16_384


@dataclass(frozen=True)
class Family:
    """model: with the adapters of both in it. critic: keeps to its own, whichever is active.
    plain: the policy as it was, without adapters. trunk: the head on its hidden states, with its
    loop; both are on the same weights.
    """

    model: Any
    tokenizer: Any
    critic: CriticScorer
    plain: Any
    trunk: tuple[CriticScorer, Loop]

    @contextmanager
    def policy(self, name: str) -> Iterator[Any]:
        """The policy "sft", which has no adapter, or "ppo"."""
        if name not in POLICIES:
            raise ValueError(f"policy {name!r}: expected one of {', '.join(POLICIES)}")
        self.model.set_adapter("ppo")
        yield self.plain if name == "sft" else self.model


def load_family(base: Any, tokenizer: Any, folder: Path) -> Family:
    """The released adapters and head of `folder` on `base`, a causal LM in memory.

    Adapters go into a copy of its modules that has the same weights.
    """
    plain, base = base, share(base)
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
    trunk = load_scorer(
        plain, kind="trunk-head", head=folder / "trunk_head", policy_tokenizer=tokenizer,
        cache_tokens=_CACHE_TOKENS,
    )  # fmt: skip
    return Family(model, tokenizer, critic, plain, (trunk, TrunkLookahead))
