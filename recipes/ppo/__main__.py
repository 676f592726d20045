"""`python -m recipes.ppo`: PPO on your own models, with a reward model as the judge.

Prompts are a JSONL file with one {"messages": [...]} or {"prompt": "..."} a line; messages go
through the policy's chat template. Prompts carry no BOS unless --bos is given. A callable reward
takes a script of a few lines: see recipes/tiny_tulu/ppo.py.
"""

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from recipes.ppo import PPOConfig, PPOTrainer, new_value_model
from recipes.ppo.checkpoint import STATE, load_checkpoint, save_checkpoint, save_models
from recipes.ppo.rewards import RewardModel


def main() -> None:
    """Train, resuming from `--out` where a checkpoint is; leaves `--out`/policy and /value."""
    arguments = parse_arguments()
    config = PPOConfig(**{f.name: getattr(arguments, f.name) for f in fields(PPOConfig)})
    tokenizer = AutoTokenizer.from_pretrained(arguments.policy)
    prompts = read_prompts(arguments.prompts, tokenizer, bos=arguments.bos)
    trainer = build_trainer(arguments, config, tokenizer)
    if (arguments.out / STATE).is_file():
        load_checkpoint(trainer, arguments.out)
    trainer.train(prompts, save=lambda state: save_checkpoint(state, arguments.out))
    save_models(trainer, arguments.out)
    for name in ("policy", "value"):
        tokenizer.save_pretrained(arguments.out / name)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m recipes.ppo", description=__doc__)
    parser.add_argument("--policy", required=True, help="SFT policy: path or name")
    parser.add_argument("--reference", help="reference policy (default: the policy)")
    parser.add_argument("--reward-model", required=True, help="*ForSequenceClassification, 1 label")
    parser.add_argument("--reward-bos", action="store_true", help="the reward model wants BOS")
    parser.add_argument("--value-init", choices=("reward", "policy"), default="reward")
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL")
    parser.add_argument("--bos", action="store_true", help="prompts begin with BOS")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", help="of reference and reward model")
    for field in fields(PPOConfig):
        kind = type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    return parser.parse_args()


def build_trainer(arguments: argparse.Namespace, config: PPOConfig, tokenizer: Any) -> PPOTrainer:
    """Policy and value model are trained in float32; the others are only read."""
    frozen = getattr(torch, arguments.dtype)

    def causal(path: str, dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(arguments.device)

    policy = causal(arguments.policy, torch.float32)
    reference = causal(arguments.reference or arguments.policy, frozen)
    reward_model = AutoModelForSequenceClassification.from_pretrained(
        arguments.reward_model, dtype=torch.float32
    ).to(arguments.device)
    value_model = new_value_model(policy if arguments.value_init == "policy" else reward_model)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    reward = RewardModel(
        reward_model.eval().to(frozen),
        pad_id=pad_id,
        bos_id=tokenizer.bos_token_id if arguments.reward_bos else None,
    )
    return PPOTrainer(
        policy,
        reference,
        value_model,
        reward,
        config,
        eos_id=tokenizer.eos_token_id,
        pad_id=pad_id,
        log=lambda stats: print(json.dumps(stats), flush=True),
    )


def read_prompts(path: Path, tokenizer: Any, *, bos: bool) -> list[list[int]]:
    """Token ids of each line's prompt; the error for a bad line names its number."""
    prompts = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            text = row.get("prompt") or tokenizer.apply_chat_template(
                row["messages"], tokenize=False, add_generation_prompt=True
            )
        except (json.JSONDecodeError, AttributeError, KeyError) as error:
            raise ValueError(
                f'{path}:{number}: expected {{"messages": [...]}} or {{"prompt": "..."}}, '
                f"got {line[:80]!r}."
            ) from error
        lead = [tokenizer.bos_token_id] if bos else []
        prompts.append(lead + tokenizer(text, add_special_tokens=False).input_ids)
    return prompts


if __name__ == "__main__":
    main()
