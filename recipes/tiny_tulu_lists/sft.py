"""The policy of the lists: a 3-layer Llama taught on careless answers."""

import random
from pathlib import Path

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from guided_decode.tiny_tulu import lists
from recipes.tiny_tulu.sft import AnsweredChats, Log, SFTConfig, fit, new_policy

CONFIG = SFTConfig(steps=300, batch_size=64, lr=3e-3)


def train_sft(
    tokenizer: PreTrainedTokenizerFast, config: SFTConfig, scratch: Path, log: Log
) -> LlamaForCausalLM:
    """The policy, from nothing; the Trainer may write to `scratch`."""
    rng = random.Random(f"lists-careless-{config.seed}")
    prompts = lists.training_prompts(config.steps * config.batch_size, config.seed)
    answers = [lists.careless_answer(prompt, rng) for prompt in prompts]
    set_seed(config.seed)
    policy = new_policy(tokenizer, layers=3, heads=3, inner=256)
    return fit(policy, AnsweredChats(tokenizer, prompts, answers), config, scratch, log)
