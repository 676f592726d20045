"""Small random checkpoints with the real classes: two layers, awkward sizes, weights that vary."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import torch
import transformers as tf
from safetensors.torch import save_file

PAD, BOS, EOS = 0, 1, 2
VOCAB = 101
POSITIONS = 512
WINDOW = 9  # shorter than most prompts of the tests

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
_ALTERNATE = ["sliding_attention", "full_attention"]

# name: (class stem, config class, what differs from the sizes above)
ARCHITECTURES = {
    "llama": ("Llama", tf.LlamaConfig, {}),
    "mistral": ("Mistral", tf.MistralConfig, {"sliding_window": None}),
    "mistral-sliding": ("Mistral", tf.MistralConfig, {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2", tf.Qwen2Config, {}),
    "qwen2-sliding": (
        "Qwen2",
        tf.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _ALTERNATE},
    ),
    "qwen3": ("Qwen3", tf.Qwen3Config, {"head_dim": 16}),
    "gemma": ("Gemma", tf.GemmaConfig, {"head_dim": 16}),
    "gemma2": (
        "Gemma2",
        tf.Gemma2Config,
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATE,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 15.0,
            "query_pre_attn_scalar": 16,
        },
    ),
    "gemma3": (
        "Gemma3",
        tf.Gemma3TextConfig,
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATE,
            "query_pre_attn_scalar": 16,
        },
    ),
}
HEADS = {
    "lm": "ForCausalLM",
    "token": "ForTokenClassification",
    "sequence": "ForSequenceClassification",
}


def model_class(arch: str, head: str) -> type:
    """The transformers class of an architecture and a head."""
    stem = ARCHITECTURES[arch][0]
    if stem == "Gemma3" and head == "token":
        raise LookupError("transformers has no Gemma3 token classifier")
    text = "Text" if stem == "Gemma3" and head == "sequence" else ""
    return getattr(tf, stem + text + HEADS[head])


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights with which each token, position and layer matters to the output."""
    generator = torch.Generator().manual_seed(seed)

    def noise(parameter: torch.Tensor, std: float) -> torch.Tensor:
        return torch.randn(parameter.shape, generator=generator) * std

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # around their own start, which is 0 in Gemma and 1 elsewhere
                parameter.add_(noise(parameter, 0.1))
            elif name == "score.bias":
                parameter.zero_()
            elif name in ("score.weight", "lm_head.weight"):
                parameter.copy_(noise(parameter, 0.3))
            elif "embed_tokens" in name:
                parameter.copy_(noise(parameter, 0.5))
            else:
                parameter.copy_(noise(parameter, 0.25))


@functools.cache
def tiny(arch: str, head: str, seed: int = 0, labels: int = 1, **overrides) -> tf.PreTrainedModel:
    """One random model in float32, made once; nobody writes to it."""
    _, config_class, own = ARCHITECTURES[arch]
    config = config_class(**{**_SIZES, **own, **overrides}, attn_implementation="eager")
    if head != "lm":
        config.num_labels = labels
    model = model_class(arch, head)(config).eval()
    randomise(model, seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


@functools.cache
def scratch() -> Path:
    """A folder that lives as long as the test run."""
    folder = Path(tempfile.mkdtemp(prefix="guided-decode-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def saved(arch: str, head: str, seed: int = 0, labels: int = 1, **overrides) -> str:
    """The path of `tiny(...)` in the Hugging Face layout, as safetensors."""
    folder = Path(tempfile.mkdtemp(dir=scratch(), prefix=f"{arch}-{head}-{seed}-"))
    tiny(arch, head, seed, labels, **overrides).save_pretrained(folder)
    return str(folder)


@functools.cache
def saved_value_head(style: str, arch: str = "llama", seed: int = 0) -> str:
    """The critic of `tiny(arch, "token", seed)`, with a head under the names of its trainer.

    `trl` keeps the causal LM and adds `v_head.summary.*`; `openrlhf` has the trunk and
    `value_head.weight`.
    """
    critic = tiny(arch, "token", seed)
    lm = tiny(arch, "lm", seed)
    folder = Path(tempfile.mkdtemp(dir=scratch(), prefix=f"{arch}-{style}-"))
    weights = {f"model.{name}": value for name, value in critic.model.state_dict().items()}
    config = lm.config.to_dict() | {"architectures": [type(lm).__name__]}
    if style == "trl":
        weights["lm_head.weight"] = lm.lm_head.weight
        weights["v_head.summary.weight"] = critic.score.weight
        weights["v_head.summary.bias"] = torch.full((1,), 0.75)
    elif style == "openrlhf":
        weights["value_head.weight"] = critic.score.weight
    else:
        raise LookupError(style)
    (folder / "config.json").write_text(json.dumps(config, default=str))
    save_file(
        {name: value.contiguous() for name, value in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return str(folder)


def prompts(lengths: list[int], seed: int = 0, bos: bool = False) -> list[list[int]]:
    """Random prompts without special tokens, but for a leading BOS where it is asked for."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return [[BOS, *row[1:]] for row in rows] if bos else rows
