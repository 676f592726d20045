"""The folder of a trained critic, which `load_scorer(folder)` reads by what stands in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from guided_decode.checkpoints.source import METADATA_FIELD
from guided_decode.checkpoints.trunk_head_identity import record_trunk
from guided_decode.checkpoints.trunk_policy import NAME_FILE, write_policy_name
from guided_decode.critics.config import CriticConfig
from guided_decode.critics.network import Network
from guided_decode.scoring.transforms import Identity, SoftmaxClass
from guided_decode.scoring.trunk_head import FILE_NAME, head_of_module, save_trunk_head

# What was trained, from what, and how it went; the last file to be written.
RECORD = "critic.json"
_PARTIAL = ".partial"


def save_critic(
    folder: Path,
    network: Network,
    config: CriticConfig,
    tokenizer: Any,
    *,
    policy: str,
    trained: Mapping[str, Any],
) -> None:
    """Writes a critic's folder; what it held of the same names is replaced.

    Args:
        folder: made where there is none.
        policy: what the trunk, or the base of adapters, is loaded by.
        trained: what was trained, for the metadata; JSON.

    Raises OSError: it cannot be written.
    """
    partial = folder / _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer.save_pretrained(partial)
    metadata = {
        "kind": config.kind,
        "bos": "keep",
        "terminal": "critic" if config.at_end else "baseline",
        "trained": dict(trained),
    }
    if config.mode == "head":
        _save_head(partial, network, config, policy)
    elif config.mode == "lora":
        _save_adapters(partial, network, metadata, policy)
    else:
        assert network.model is not None
        setattr(network.model.config, METADATA_FIELD, metadata)
        network.model.save_pretrained(partial)
    (partial / RECORD).write_text(json.dumps(metadata, indent=2, sort_keys=True) + "\n")
    # What says that the folder is whole comes last.
    written = sorted(partial.iterdir(), key=lambda path: (path.name == RECORD, path.name))
    for path in written:
        path.replace(folder / path.name)
    partial.rmdir()


def _save_head(folder: Path, network: Network, config: CriticConfig, policy: str) -> None:
    head = head_of_module(network.head)
    transform = Identity() if config.loss == "squared" else SoftmaxClass(1)
    trunk = record_trunk(network.trunk, policy)
    save_trunk_head(folder / FILE_NAME, replace(head, transform=transform, trunk=trunk))
    write_policy_name(folder / NAME_FILE, policy)


def _save_adapters(
    folder: Path, network: Network, metadata: Mapping[str, Any], policy: str
) -> None:
    adapters, model = network.adapters, network.model
    assert model is not None
    adapters.peft_config["default"].base_model_name_or_path = policy
    # Embeddings are not trained; PEFT would look for the base to find out.
    adapters.save_pretrained(folder, save_embedding_layers=False)
    # PEFT's model card, which says nothing.
    (folder / "README.md").unlink(missing_ok=True)
    setattr(model.config, METADATA_FIELD, {**metadata, "adapter": True})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
