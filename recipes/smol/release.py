"""The released adapters: half-precision PEFT folders on the registered policy."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from recipes.smol.ppo import SmolTrainer

# The registered name is the same on every machine.
BASE = "smol-sft"
FOLDERS = ("ppo", "value")
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def release(trainer: SmolTrainer, base: str, out: Path) -> None:
    """`out`/ppo and `out`/value, adapters and the value head in float16.

    bfloat16 is as short and has eight times the rounding; adapters need no wide range.

    Args:
        trainer: after its run.
        base: the name or folder of the policy that they are put on.
        out: gets the two folders.
    """
    for name, network in zip(FOLDERS, (trainer.policy, trainer.value_model), strict=True):
        _save(network.model, base, out / name)


def _save(model: Any, base: str, folder: Path) -> None:
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    weights = {name: one.to(torch.float16) for name, one in load_file(folder / _WEIGHTS).items()}
    save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / _CONFIG).read_text())
    config["base_model_name_or_path"] = base
    (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
