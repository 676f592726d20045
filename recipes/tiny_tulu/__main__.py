"""`python -m recipes.tiny_tulu`: train tiny-tulu from nothing, then measure it."""

import argparse
import json
import logging
import sys
import time
from pathlib import Path

import torch
import transformers
from rich.console import Console
from transformers import LlamaForCausalLM

from recipes.tiny_tulu.measure import measure
from recipes.tiny_tulu.ppo import ppo_config, train_ppo
from recipes.tiny_tulu.release import CRITIC, POLICY, release
from recipes.tiny_tulu.report import WIDTH, table
from recipes.tiny_tulu.sft import SFTConfig, train_sft
from recipes.tiny_tulu.tokenizer import build_tokenizer

log = logging.getLogger("tiny_tulu")


def main() -> None:
    """Train and measure each seed, and print the table."""
    arguments = parse_arguments()
    for seed in arguments.seeds:
        out = arguments.out / f"seed{seed}"
        out.mkdir(parents=True, exist_ok=True)
        log_to(out / "log.txt", append=arguments.resume)
        train(seed, out, resume=arguments.resume)
        started = time.perf_counter()
        results = {"seed": seed} | measure(out, log.info)
        log.info("measured in %.0f s", time.perf_counter() - started)
        (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    runs = [
        json.loads((arguments.out / f"seed{s}/results.json").read_text()) for s in arguments.seeds
    ]
    Console(width=max(WIDTH, Console().width)).print(table(runs))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m recipes.tiny_tulu", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="training seeds")
    parser.add_argument("--out", type=Path, default=Path("out/tiny_tulu"), help="output folder")
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads; 1 repeats to the bit"
    )
    parser.add_argument("--resume", action="store_true", help="keep models that are there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def train(seed: int, out: Path, *, resume: bool) -> None:
    """SFT, then PPO; writes `out`/sft, `out`/ppo and `out`/value."""
    started = time.perf_counter()
    tokenizer = build_tokenizer()

    def log_step(stats: dict[str, float]) -> None:
        figures = "  ".join(f"{name} {value:.4g}" for name, value in stats.items())
        log.info("%5.0f s  %s", time.perf_counter() - started, figures)

    if not (resume and (out / "sft/config.json").is_file()):
        policy = train_sft(tokenizer, SFTConfig(seed=seed), out, log_step)
        release(policy, tokenizer, out / "sft", POLICY)
    # PPO starts from what was released, rounding included: it is the reference, too.
    sft = LlamaForCausalLM.from_pretrained(out / "sft", dtype=torch.float32)
    if not (resume and (out / "value/config.json").is_file()):
        policy, value_model = train_ppo(sft, tokenizer, ppo_config(seed), log_step)
        release(policy, tokenizer, out / "ppo", POLICY)
        release(value_model, tokenizer, out / "value", CRITIC)
    log.info("trained in %.0f s", time.perf_counter() - started)


def log_to(path: Path, *, append: bool) -> None:
    """The log goes to the console and to one file a seed."""
    transformers.utils.logging.disable_progress_bar()
    log.setLevel(logging.INFO)
    file = logging.FileHandler(path, mode="a" if append else "w")
    log.handlers = [logging.StreamHandler(sys.stdout), file]


if __name__ == "__main__":
    main()
