"""A value head on the frozen trunk, from the responses that the value model warmed up on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from guided_decode.checkpoints.trunk_head_identity import record_trunk
from guided_decode.scoring.trunk_head import save_trunk_head
from recipes.trunk_head.config import TrunkHeadConfig
from recipes.trunk_head.readings import read_rollouts, reward_targets
from recipes.trunk_head.rollouts import load_rollouts
from recipes.trunk_head.tiny_tulu import rounded
from recipes.trunk_head.training import train_head

# So few rollouts are learnt by heart at the rate of a larger set.
SETTINGS = TrunkHeadConfig(width=256, lr=1e-3, epochs=20, weight_decay=0.1)


def save_head(
    base: Any,
    tokenizer: Any,
    rollouts: Path,
    name: str,
    out: Path,
    log: Callable[[dict[str, float]], None],
) -> None:
    """Trains on every file of `rollouts` and writes the folder `out`, weights in bfloat16.

    Args:
        base: the causal LM that drew them.
        name: of that model, by which the head's folder finds it.
        log: gets each epoch's figures on the rollouts that choose the epoch.
    """
    paths = sorted(rollouts.glob("*.jsonl"))
    rows = [row for path in paths for row in load_rollouts(path, tokenizer)]
    head = train_head(read_rollouts(base, rows), reward_targets(rows), SETTINGS, log)
    partial = out.with_suffix(".partial")
    partial.mkdir(parents=True, exist_ok=True)
    save_trunk_head(partial, replace(rounded(head), trunk=record_trunk(base.base_model, name)))
    partial.replace(out)
