"""The PPO run of tiny-tulu: the recipe in recipes/ppo on the answers' correctness."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from guided_decode import tiny_tulu
from recipes.ppo import PPOConfig, PPOTrainer, new_value_model
from recipes.ppo.trainer import Log
from recipes.tiny_tulu.decoding import prompt_ids

PROMPTS = 20_000


@dataclass(frozen=True)
class Outcome:
    """The reward: 1 where the stated sum is right, 0 where it is not."""

    tokenizer: PreTrainedTokenizerFast

    def __call__(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> Tensor:
        texts = zip(
            self.tokenizer.batch_decode(list(prompts)),
            self.tokenizer.batch_decode(list(responses)),
            strict=True,
        )
        return torch.tensor([float(tiny_tulu.is_correct(p, r)) for p, r in texts])


def ppo_config(seed: int) -> PPOConfig:
    """Few steps at a noticeable KL cost, so that the policy stays near the SFT policy."""
    return PPOConfig(
        steps=15,
        warmup_steps=30,
        rollouts_per_step=256,
        epochs=2,
        max_new_tokens=72,
        temperature=1.0,
        policy_lr=1.5e-5,
        value_lr=5e-4,
        lr_warmup_steps=3,
        kl_coef=0.5,
        vf_coef=0.5,
        seed=seed,
    )


def train_ppo(
    sft: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, config: PPOConfig, log: Log
) -> tuple[LlamaForCausalLM, PreTrainedModel]:
    """A PPO policy and the value model of its run; both start from the SFT policy.

    Prompts carry no BOS, as in EasyLM's PPO.
    """
    policy, value_model = copy.deepcopy(sft), new_value_model(sft)
    messages = tiny_tulu.training_prompts(PROMPTS, seed=config.seed + 1_000)
    trainer = PPOTrainer(
        policy,
        sft,
        value_model,
        Outcome(tokenizer),
        config,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        log=log,
    )
    trainer.train(prompt_ids(tokenizer, messages))
    return policy, value_model
