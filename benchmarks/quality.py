"""What guidance buys and costs on tiny-tulu's 1,000 held-out prompts, beside best-of-n.

    python -m benchmarks.quality [--models DIR ...] [--prompts N] [--out FILE]

Every method of the demo, for the SFT and the PPO policy, with tokens and FLOPs an answer, and the
paired bootstrap of guided against plain. A folder holds sft/, ppo/ and value/ of one training
seed; without --models it is the released family. beta, k and the rest were chosen on the
validation prompts (guided_decode/lab/demo/chosen.py).
"""

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from guided_decode import load_scorer, tiny_tulu
from guided_decode.integrations.transformers import GuidedDecoding
from guided_decode.lab.demo.decoding import Models
from guided_decode.lab.demo.measure import Outcome, compare, steps
from guided_decode.lab.demo.report import as_dict, table
from recipes.tiny_tulu.metrics import paired_bootstrap

BATCH = 100


@dataclass(frozen=True)
class Measured:
    """An outcome, and the FLOPs of one token through its policy and its critic."""

    outcome: Outcome
    policy_flops: int
    critic_flops: int

    def as_dict(self) -> dict[str, Any]:
        row = as_dict(self.outcome)
        flops = (
            self.outcome.policy_tokens * self.policy_flops
            + self.outcome.scorer_tokens * self.critic_flops
        )
        return row | {"mflops": flops / len(self.outcome.messages) / 1e6}


def main() -> None:
    arguments = parse_arguments()
    transformers.utils.logging.disable_progress_bar()
    messages = tiny_tulu.held_out_prompts(arguments.prompts)
    console, results = Console(), []
    folders = arguments.models or [tiny_tulu.model_path("sft").parent]
    with Progress(console=console) as progress:
        total = 2 * steps(len(messages), BATCH) * len(folders)
        task = progress.add_task("decoding", total=total)
        for folder in folders:
            measured = measure(folder, messages, lambda: progress.advance(task))
            outcomes = [each.outcome for each in measured]
            methods = [each.as_dict() for each in measured]
            family = {"family": folder.name, "methods": methods, "gains": gains(outcomes)}
            progress.console.print(table(outcomes))
            print_gains(progress.console, family)
            results.append(family)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(header() | {"families": results}, indent=2) + "\n")
    console.print(f"written to {arguments.out}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, nargs="+", help="folders with sft/, ppo/, value/")
    parser.add_argument("--prompts", type=int, default=tiny_tulu.HELD_OUT)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality.json"))
    return parser.parse_args()


def measure(folder: Path, messages: list[str], advance: Callable[[], None]) -> list[Measured]:
    measured = []
    for name in ("sft", "ppo"):
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        policy = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
        critic = load_scorer(folder / "value", "ppo-critic", policy_tokenizer=tokenizer)
        models = Models(policy, tokenizer, critic, GuidedDecoding)
        outcomes = compare(
            name.upper(), models, messages, batch_size=BATCH, seed=0, advance=advance
        )
        cost = (flops_a_token(policy), flops_a_token(critic.model.model))
        measured += [Measured(outcome, *cost) for outcome in outcomes]
    return measured


def flops_a_token(model: PreTrainedModel) -> int:
    """Two for each weight of a matrix product; attention to the cache, a few percent, left out."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2 and p is not embedding)
    tied = head is not None and head.weight is embedding
    return 2 * (matrices + (embedding.numel() if tied else 0))


def gains(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """Guided minus another method over the same prompts: mean and 95% paired bootstrap."""
    rows = []
    for policy in dict.fromkeys(outcome.policy for outcome in outcomes):
        by_name = {o.method.name: o for o in outcomes if o.policy == policy and o.method.shown}
        for guided in (o for o in by_name.values() if o.method.config is not None):
            for other in (o for o in by_name.values() if o.method.config is None):
                if other.method.best_of == 1 and other.method.sample != guided.method.sample:
                    continue
                mean, low, high = paired_bootstrap(np.array(guided.right), np.array(other.right))
                rows.append(
                    {
                        "policy": policy,
                        "guided": guided.method.name,
                        "over": other.method.name,
                        "gain": mean,
                        "low": low,
                        "high": high,
                        "tokens_ratio": guided.tokens_per_answer / other.tokens_per_answer,
                    }
                )
    return rows


def print_gains(console: Console, family: dict[str, Any]) -> None:
    for row in family["gains"]:
        console.print(
            f"{row['policy']}: {row['guided']} over {row['over']}: {row['gain']:+.1%} "
            f"(95% {row['low']:+.1%} to {row['high']:+.1%}) at {row['tokens_ratio']:.2f} of its "
            "tokens"
        )


def header() -> dict[str, Any]:
    return {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
