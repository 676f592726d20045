"""What two engines beside each other are built from: arguments and models, for a CPU or a GPU."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.floors import LLAMA3_8B, Size
from guided_decode.scoring.trunk_head import FILE_NAME, TrunkHead, save_trunk_head
from guided_decode.tiny_tulu import model_path

TOKENS = 64
SMOLLM2_135M = Size("135M", 30, 576, 1536, 9, 3, 49_152, itemsize=4)
# What the policy can be; of a shape the weights are random, and drawn by vLLM.
SHAPES: dict[str, Size | None] = {"tiny-tulu": None, "135M": SMOLLM2_135M, "8B": LLAMA3_8B}
# Of these the scorer is tiny-tulu's, and of others a critic of the policy's shape.
_TINY_SCORER = ("tiny-tulu", "8B")
FLAG = "guided_decode.integrations.vllm:ValueGuidedLogitsProcessor"
_CPU: dict[str, Any] = {"dtype": "float32", "enforce_eager": True}
# With kv_cache_memory_bytes vLLM claims no share of the GPU; the blocks are what it allocates.
_GPU: dict[str, Any] = {
    "dtype": "bfloat16",
    "enforce_eager": False,
    "async_scheduling": True,
    "gpu_memory_utilization": 0.05,
    "kv_cache_memory_bytes": 8 << 30,
}
# Tokens: vLLM's attention takes this many on either device.
_BLOCK = 32
# bfloat16's, whose logits are 0.06 to 0.125 apart at 8 to 32.
_NEAR_TIE = 0.5
# Positions of a request beyond its tokens.
_SPARE = 32


@dataclass(frozen=True)
class Plan:
    """What both engines are built for.

    prompt, requests: tokens of the longest prompt, and the most requests at once.
    held: how many such requests the KV cache holds; None for what kv_gib holds, on a CPU.
    trunk: whether a third engine guides by a head on the policy's own trunk.
    """

    gpu: bool
    prompt: int
    requests: int
    held: int | None = None
    kv_gib: int = 2
    policy: str = "tiny-tulu"
    trunk: bool = False

    def __post_init__(self) -> None:
        if self.gpu and self.held is None:
            raise ValueError("two engines share one GPU: held must bound the KV cache of each")
        if self.policy == "8B" and not self.gpu:
            raise ValueError(f"a policy of {self.policy}'s shape needs a GPU")

    @property
    def longest(self) -> int:
        return self.prompt + TOKENS + _SPARE

    @property
    def near_tie(self) -> float:
        """In nats: between tokens as near as this the shape of the batch may choose.

        float32 leaves it no choice; random weights leave it all of them.
        """
        return math.inf if SHAPES[self.policy] else _NEAR_TIE if self.gpu else 0.0

    @property
    def scorer_tokens(self) -> int:
        """Room in the scorer's cache for all requests, twice."""
        return 2 * self.requests * (self.longest + 64)


def arguments(plan: Plan, model: str) -> dict[str, Any]:
    """Of LLM, for both engines; all of them are in vLLM 0.25 to 0.33."""
    chosen: dict[str, Any] = {
        "model": model,
        "max_model_len": plan.longest,
        "max_num_seqs": plan.requests,
        "max_num_batched_tokens": 4096,
        **(_GPU if plan.gpu else _CPU),
    }
    if plan.held is not None:
        blocks = plan.held * math.ceil((plan.prompt + TOKENS) / _BLOCK)
        # vLLM keeps a block for itself. Its statistics count preemptions.
        chosen |= {
            "block_size": _BLOCK,
            "num_gpu_blocks_override": blocks + 1,
            "disable_log_stats": False,
        }
    if SHAPES[plan.policy]:
        chosen["load_format"] = "dummy"
    return chosen


def guided_arguments(plan: Plan, scorer: str) -> dict[str, Any]:
    """What the engine with the processor gets besides."""
    config = {"scorer": scorer, "beta": 10.0, "cache_tokens": plan.scorer_tokens, "log_every": 0}
    if plan.gpu:
        config["dtype"] = _GPU["dtype"]
    return {"logits_processors": [FLAG], "additional_config": {"guided_decode": config}}


def trunk_arguments(head: str) -> dict[str, Any]:
    """What the engine gets besides that guides by a head on the policy's own trunk."""
    config = {"scorer": head, "kind": "trunk-head", "beta": 10.0, "log_every": 0}
    return {"logits_processors": [FLAG], "additional_config": {"guided_decode": config}}


def head_file(folder: Path) -> str:
    """A head of random weights on the policy that `policy_folder` wrote."""
    import torch

    hidden = json.loads((folder / "sft" / "config.json").read_text())["hidden_size"]
    drawn = torch.randn(1, hidden, generator=torch.Generator().manual_seed(0))
    save_trunk_head(folder / FILE_NAME, TrunkHead(drawn / hidden**0.5))
    return str(folder / FILE_NAME)


def scorer_folder(plan: Plan, folder: Path) -> str:
    """tiny-tulu's critic, or random weights of the policy's shape, as a critic."""
    copy = longer_copy("value", folder, plan.longest)
    size = SHAPES[plan.policy]
    if plan.policy not in _TINY_SCORER and size is not None:
        import torch
        from transformers import AutoConfig, AutoModelForTokenClassification

        _reshape(copy, size)
        torch.manual_seed(0)
        model = AutoModelForTokenClassification.from_config(AutoConfig.from_pretrained(copy))
        model.save_pretrained(copy)
    return str(copy)


def policy_folder(plan: Plan, folder: Path) -> str:
    """tiny-tulu; or with its tokens another shape, of which only the config is written."""
    copy = longer_copy("sft", folder, plan.longest)
    size = SHAPES[plan.policy]
    if size is not None:
        (copy / "model.safetensors").unlink()
        _reshape(copy, size)
    return str(copy)


def _reshape(model: Path, size: Size) -> None:
    _configure(
        model,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
    )


def longer_copy(name: str, folder: Path, positions: int) -> Path:
    """The embedded model with as many positions as the longest prompt needs."""
    copy = folder / name
    shutil.copytree(model_path(name), copy)
    config = json.loads((copy / "config.json").read_text())
    _configure(copy, max_position_embeddings=max(config["max_position_embeddings"], positions))
    return copy


def _configure(model: Path, **keys: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
