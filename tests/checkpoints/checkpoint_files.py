"""Writing a small checkpoint with its quirks: weights left out or added, config fields set."""

import json

import torch
from safetensors.torch import load_file, save_file


def write(path, model, *, drop=(), add=None, **fields):
    """Saves a model to a folder, less the weights of `drop`, with those of `add`."""
    model.save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    weights = {name: w for name, w in weights.items() if name not in drop} | (add or {})
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text()) | fields
    (path / "config.json").write_text(json.dumps(config))
    return path


def outputs(checkpoint, ids):
    """Head outputs of a loaded checkpoint at every token, float32 [tokens, labels]."""
    hidden = checkpoint.trunk(ids).last_hidden_state[0]
    bias = 0.0 if checkpoint.head_bias is None else checkpoint.head_bias
    return hidden @ checkpoint.head_weight.T + bias


def stock(model, ids: torch.Tensor):
    """The class's own head on its own trunk, at every token."""
    return model.score(getattr(model, model.base_model_prefix)(ids).last_hidden_state)[0]
