"""The released layout of a model: bf16 weights, the tokenizer beside them, and our metadata."""

import json
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

FAMILY = "tiny-tulu"
POLICY = {"kind": "policy", "family": FAMILY}
CRITIC = {"kind": "ppo-critic", "family": FAMILY, "bos": "drop", "terminal": "baseline"}


def release(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    path: Path,
    metadata: dict[str, str],
) -> None:
    """Write a Hugging Face folder.

    Weights are stored in bf16 and the config names float32, so that they load as float32, in
    which the policy's and the critic's decisions are reproducible on a CPU.
    """
    stored = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    model.config.guided_decode = metadata
    model.config.use_cache = True
    model.save_pretrained(path, state_dict=stored)
    tokenizer.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    config["dtype"] = "float32"
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
