"""Preference training with TRL: a reward model, DPO, and KTO in iterations."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

from guided_decode.tiny_tulu import lists
from guided_decode.tiny_tulu.lists import Pair
from recipes.tiny_tulu.sft import Log, LogLines
from recipes.tiny_tulu_lists.samples import (
    Judge,
    draw,
    extremes,
    pair_rows,
    reward_rows,
    verdict_rows,
)

# Contextual_KTO_Mistral_PairRM's card: three iterations, each with the last one as reference.
KTO_ITERATIONS = 3
# Of each iteration, four samples each.
KTO_MESSAGES = 500
# Answers are a few choices long: at the usual 0.1 a loss is content only where the policy is far
# from its reference, and no longer sorts.
BETA = 0.5


def train_reward(
    sft: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair], seed: int,
    scratch: Path, log: Log,
) -> LlamaForSequenceClassification:  # fmt: skip
    """A reward model on the policy's trunk, by the Bradley-Terry loss; read at EOS, and fit to be
    read before it."""
    model = LlamaForSequenceClassification(_one_label(sft))
    model.model.load_state_dict(sft.model.state_dict())
    torch.nn.init.zeros_(model.score.weight)
    arguments = RewardConfig(**_common(scratch, seed), learning_rate=1e-3, num_train_epochs=1,
                             per_device_train_batch_size=32)  # fmt: skip
    rows = reward_rows(tokenizer, pairs, seed)
    return _trained(RewardTrainer, model, arguments, rows, tokenizer, log)


def train_dpo(
    sft: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair], seed: int,
    scratch: Path, log: Log,
) -> LlamaForCausalLM:  # fmt: skip
    """The policy by DPO, with itself as it was for reference."""
    arguments = DPOConfig(**_common(scratch, seed), learning_rate=2e-4, num_train_epochs=1,
                          per_device_train_batch_size=32, beta=BETA)  # fmt: skip
    return _trained(DPOTrainer, copy.deepcopy(sft), arguments, pair_rows(pairs), tokenizer, log,
                    ref_model=copy.deepcopy(sft))  # fmt: skip


def iterate_kto(
    sft: LlamaForCausalLM, judge: Judge, tokenizer: PreTrainedTokenizerFast, seed: int,
    scratch: Path, log: Log, *, messages: int = KTO_MESSAGES,
) -> LlamaForCausalLM:  # fmt: skip
    """KTO on samples of the last policy, which is the reference, ranked by a judge."""
    policy = sft
    for i in range(KTO_ITERATIONS):
        prompts = lists.training_prompts(messages, seed=2 + i)
        samples = draw(policy, tokenizer, prompts, 4, seed=10_000 * (i + 1))
        pairs = extremes(prompts, samples, judge)
        log({"kto_iteration": i + 1, "pairs": len(pairs)})
        policy = train_kto(policy, tokenizer, pairs, seed + i, scratch, log)
    return policy


def train_kto(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair], seed: int,
    scratch: Path, log: Log,
) -> LlamaForCausalLM:  # fmt: skip
    """One iteration of KTO from a policy, which is the reference."""
    arguments = KTOConfig(**_common(scratch, seed), learning_rate=2e-4, num_train_epochs=1,
                          per_device_train_batch_size=32, beta=BETA)  # fmt: skip
    return _trained(KTOTrainer, copy.deepcopy(policy), arguments, verdict_rows(pairs, seed),
                    tokenizer, log, ref_model=copy.deepcopy(policy))  # fmt: skip


def _common(scratch: Path, seed: int) -> dict[str, Any]:
    """What the three trainers share; on a CPU in float32, as everything here."""
    return {
        "output_dir": str(scratch), "seed": seed, "lr_scheduler_type": "cosine",
        "warmup_steps": 5, "logging_steps": 10, "save_strategy": "no", "report_to": [],
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
        "max_length": None,
    }  # fmt: skip


def _one_label(sft: LlamaForCausalLM) -> Any:
    config = copy.deepcopy(sft.config)
    config.num_labels = 1
    return config


def _trained(
    trainer_class: Any, model: Any, arguments: Any, rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerFast, log: Log, **more: Any,
) -> Any:  # fmt: skip
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, callbacks=[LogLines(log)], **more,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    # TRL puts a forward of its own in place of the model's: the weights go back into a plain one.
    plain = type(model)(copy.deepcopy(model.config))
    plain.load_state_dict(model.state_dict())
    return plain.eval()
