"""The SFT policy: a 4-layer Llama taught on worked answers, with carries dropped."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from guided_decode import tiny_tulu

Log = Callable[[dict[str, float]], None]
IGNORED = -100  # transformers' label for tokens without a loss


@dataclass(frozen=True)
class SFTConfig:
    """Sizes and rates of the SFT run."""

    steps: int = 600
    batch_size: int = 64
    lr: float = 2e-3
    warmup_steps: int = 50
    carry_drop_rate: float = 0.65
    seed: int = 0


class AnsweredChats(Dataset[dict[str, list[int]]]):
    """Token ids of a chat with its answer; the loss covers the answer and its EOS.

    Every other example begins with BOS, so that the policy answers alike with and without.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], answers: Sequence[str]
    ) -> None:
        chats = [tiny_tulu.render(p) for p in prompts]
        self.prompts = tokenizer(chats, add_special_tokens=False).input_ids
        self.answers = tokenizer(list(answers), add_special_tokens=False).input_ids
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        prompt = [self.bos] * (index % 2) + self.prompts[index]
        answer = self.answers[index] + [self.eos]
        return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


class WorkedAnswers(AnsweredChats):
    """Sums with their worked answers, carries dropped as the config says."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, config: SFTConfig) -> None:
        drop = random.Random(f"drop-{config.seed}")
        prompts = tiny_tulu.training_prompts(config.steps * config.batch_size, config.seed)
        answers = [
            tiny_tulu.worked_answer(*tiny_tulu.operands(p), drop, config.carry_drop_rate)
            for p in prompts
        ]
        super().__init__(tokenizer, prompts, answers)


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Pad on the right: input_ids, labels, attention_mask, each int64 [rows, longest]."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, fill: int) -> Tensor:
        return torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORED)} | {
        "attention_mask": mask
    }


def new_policy(
    tokenizer: PreTrainedTokenizerFast, *, layers: int = 4, heads: int = 4, inner: int = 344
) -> LlamaForCausalLM:
    """A fresh Llama with heads of 32 and the tokenizer's vocabulary and special tokens."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32 * heads,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


class LogLines(TrainerCallback):
    """Hands the Trainer's figures to `log`."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        figures = {name: float(value) for name, value in (logs or {}).items()}
        self.log({"sft_step": float(state.global_step)} | figures)


def train_sft(
    tokenizer: PreTrainedTokenizerFast, config: SFTConfig, scratch: Path, log: Log
) -> LlamaForCausalLM:
    """The policy of the sums, from nothing; the Trainer may write to `scratch`."""
    set_seed(config.seed)
    return fit(new_policy(tokenizer), WorkedAnswers(tokenizer, config), config, scratch, log)


def fit(
    policy: LlamaForCausalLM, chats: AnsweredChats, config: SFTConfig, scratch: Path, log: Log
) -> LlamaForCausalLM:
    """Trains a policy on chats with transformers' Trainer, and returns it."""
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_steps,
        weight_decay=0.01,
        adam_beta2=0.98,
        logging_steps=25,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=config.seed,
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model=policy,
        args=arguments,
        train_dataset=chats,
        data_collator=collate,
        callbacks=[LogLines(log)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return policy.eval()
