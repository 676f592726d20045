"""`python -m recipes.trunk_head`: train a value head on a frozen policy's own hidden states.

Of your own policy, from rollouts with rewards or with an existing critic's values as targets, which
is `guided-decode train-critic --mode head --raw` with the same settings:

    python -m recipes.trunk_head --policy POLICY --rollouts FILE.jsonl [--critic CRITIC] --out DIR

Of tiny-tulu, whose rollouts it samples itself, with figures beside the critic's:

    python -m recipes.trunk_head --tiny-tulu ppo sft --out DIR
"""

import argparse
import json
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from guided_decode.checkpoints.trunk_head_identity import record_trunk
from guided_decode.scoring.trunk_head import TrunkHead, save_trunk_head
from recipes.trunk_head import tiny_tulu
from recipes.trunk_head.config import TrunkHeadConfig
from recipes.trunk_head.readings import read_rollouts, reward_targets
from recipes.trunk_head.training import train_head


def main() -> None:
    """Train, save, and for tiny-tulu measure."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    transformers_logging.disable_progress_bar()
    config = TrunkHeadConfig(
        **{field.name: getattr(arguments, field.name) for field in fields(TrunkHeadConfig)}
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.tiny_tulu:
        results = {name: _on_tiny_tulu(name, arguments, config) for name in arguments.tiny_tulu}
        (arguments.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        return
    _by_command(arguments, config)


def _by_command(arguments: argparse.Namespace, config: TrunkHeadConfig) -> None:
    """`guided-decode train-critic`, whose steps are of rollouts and not of tokens."""
    from guided_decode.cli.app import app

    words = ["train-critic", str(arguments.rollouts), "--mode", "head", "--raw"]
    for name in ("policy", "out", "device"):
        words += [f"--{name}", str(getattr(arguments, name))]
    for name in ("width", "epochs", "lr", "weight_decay", "validation", "seed"):
        words += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    if arguments.critic is not None:
        words += ["--target", "scores", "--reward-model", arguments.critic]
        words += ["--kind", arguments.kind]
    try:
        app(words, prog_name="guided-decode")
    except SystemExit as end:
        if end.code:
            raise


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.trunk_head",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--policy", help="path or name")
    parser.add_argument("--rollouts", type=Path, help="JSONL: prompt, response, reward")
    parser.add_argument("--critic", help="regress on its values instead of the rewards")
    parser.add_argument("--kind", default="auto", help="the critic's")
    parser.add_argument("--tiny-tulu", nargs="+", choices=tiny_tulu.POLICIES, help="its policies")
    parser.add_argument("--count", type=int, default=6_000, help="tiny-tulu's rollouts")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    for field in fields(TrunkHeadConfig):
        kind: Any = type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    arguments = parser.parse_args()
    if not arguments.tiny_tulu and not (arguments.policy and arguments.rollouts):
        parser.error("pass --policy and --rollouts, or --tiny-tulu")
    return arguments


def _on_tiny_tulu(
    name: str, arguments: argparse.Namespace, config: TrunkHeadConfig
) -> dict[str, Any]:
    """Heads of one layer and two, by rewards and by the critic's values; the best is saved."""
    begun = time.perf_counter()
    family = tiny_tulu.load_family()
    policy = getattr(family, name)
    rollouts = tiny_tulu.sample_rollouts(family, policy, arguments.count, config.seed)
    print(f"{name}: {len(rollouts)} rollouts in {time.perf_counter() - begun:.0f} s", flush=True)
    readings = read_rollouts(policy, rollouts)
    targets = {"reward": reward_targets(rollouts), "critic": tiny_tulu.critic_values(rollouts)}
    heads = {}
    for width in (0, config.width):
        for target, wanted in targets.items():
            key = f"{'two layers' if width else 'linear'}, {target}"
            head = train_head(readings, wanted, replace(config, width=width), _log)
            heads[key] = tiny_tulu.rounded(head)
            print(f"{name}: {key} after {time.perf_counter() - begun:.0f} s", flush=True)
    results = tiny_tulu.measure(family, name, heads, print)
    best = max(heads, key=lambda key: results[key]["auc_half"])
    _save(heads[best], policy, f"tiny-tulu/{name}", arguments.out / name)
    return results | {"saved": best}


def _save(head: TrunkHead, policy: PreTrainedModel, name: str, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_trunk_head(out, replace(head, trunk=record_trunk(policy.base_model, name)))


def _log(stats: dict[str, float]) -> None:
    print("  ".join(f"{name} {value:.4g}" for name, value in stats.items()), flush=True)


if __name__ == "__main__":
    main()
