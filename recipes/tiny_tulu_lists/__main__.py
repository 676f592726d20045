"""`python -m recipes.tiny_tulu_lists`: train the second family from nothing, then measure it."""

import argparse
import json
import logging
import time
from dataclasses import asdict
from pathlib import Path

import datasets
import torch
import transformers
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from guided_decode.tiny_tulu import lists
from recipes.tiny_tulu.release import POLICY, release
from recipes.tiny_tulu.tokenizer import build_tokenizer
from recipes.tiny_tulu_lists.judge import RewardJudge
from recipes.tiny_tulu_lists.measure import measure
from recipes.tiny_tulu_lists.samples import draw, exact, extremes
from recipes.tiny_tulu_lists.sft import CONFIG, train_sft

REWARD = {"kind": "reward-model", "family": "tiny-tulu-lists", "bos": "keep", "terminal": "critic"}
# Messages whose samples are compared for the reward model and DPO.
PAIR_PROMPTS = 4_000
SEED = 0

log = logging.getLogger("tiny_tulu_lists")


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)  # repeats to the bit
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    arguments.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    begun = time.perf_counter()
    train(arguments.out, resume=arguments.resume)
    log.info("trained in %.0f s", time.perf_counter() - begun)
    results = measure(arguments.out)
    (arguments.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    log.info(json.dumps(results, indent=2))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m recipes.tiny_tulu_lists", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/tiny_tulu_lists"), help="folder")
    parser.add_argument("--resume", action="store_true", help="keep models that are there")
    return parser.parse_args()


def train(out: Path, *, resume: bool) -> None:
    """Writes `out`/sft, reward, dpo, kto and held_out_pairs.jsonl; each starts from what was
    released, rounding included."""
    # TRL takes seconds to import, and is not everybody's: --help does without.
    from recipes.tiny_tulu_lists.preferences import iterate_kto, train_dpo, train_reward

    tokenizer = build_tokenizer()
    policy_card = POLICY | {"family": "tiny-tulu-lists"}

    def missing(name: str) -> bool:
        return not (resume and (out / name / "config.json").is_file())

    if missing("sft"):
        release(train_sft(tokenizer, CONFIG, out, _log), tokenizer, out / "sft", policy_card)
    sft = LlamaForCausalLM.from_pretrained(out / "sft", dtype=torch.float32).eval()
    if missing("reward") or missing("dpo"):
        prompts = lists.training_prompts(PAIR_PROMPTS, seed=1)
        pairs = extremes(prompts, draw(sft, tokenizer, prompts, 2, seed=1_000), exact)
        log.info("%d pairs of %d messages", len(pairs), len(prompts))
    if missing("reward"):
        made = train_reward(sft, tokenizer, pairs, SEED, out, _log)
        release(made, tokenizer, out / "reward", REWARD)
    if missing("dpo"):
        made = train_dpo(sft, tokenizer, pairs, SEED, out, _log)
        release(made, tokenizer, out / "dpo", policy_card)
    if missing("kto"):
        model = LlamaForSequenceClassification.from_pretrained(out / "reward", dtype=torch.float32)
        made = iterate_kto(sft, RewardJudge(model, tokenizer), tokenizer, SEED, out, _log)
        release(made, tokenizer, out / "kto", policy_card)
    prompts = lists.held_out_prompts()
    held_out = extremes(prompts, draw(sft, tokenizer, prompts, 2, seed=2_000), exact)
    lines = [json.dumps(asdict(pair)) for pair in held_out]
    (out / "held_out_pairs.jsonl").write_text("\n".join(lines) + "\n")


def _log(stats: dict[str, float]) -> None:
    log.info("  ".join(f"{name} {value:.4g}" for name, value in stats.items()))


if __name__ == "__main__":
    main()
