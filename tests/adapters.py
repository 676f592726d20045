"""Small PEFT adapters with weights that matter, in memory and in folders, and their brute force."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor

from tests import models

peft = pytest.importorskip("peft", reason="peft is not installed")

TARGETS = ["q_proj", "v_proj", "down_proj"]
AUTO = {
    "CAUSAL_LM": tf.AutoModelForCausalLM,
    "TOKEN_CLS": tf.AutoModelForTokenClassification,
    "SEQ_CLS": tf.AutoModelForSequenceClassification,
}
# The kind that reads what was trained as that task.
KINDS = {"TOKEN_CLS": "verl-critic", "SEQ_CLS": "reward-model", "CAUSAL_LM": "implicit"}


def base_of(task: str, base: str, **fields) -> torch.nn.Module:
    """The model that an adapter is put on: of a language model's weights, its head drawn anew."""
    fields |= {} if task == "CAUSAL_LM" else {"num_labels": fields.get("num_labels", 1)}
    torch.manual_seed(0)
    model = AUTO[task].from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager", **fields
    )
    return model.eval()


def lora(**fields):
    """The config of an adapter, LoRA on some layers unless told otherwise."""
    return peft.LoraConfig(**({"r": 4, "target_modules": TARGETS} | fields))


def randomise(model: torch.nn.Module, seed: int, of: str = "") -> None:
    """Draws the weights of all adapters, or of those whose name has `of`."""
    generator = torch.Generator().manual_seed(seed)
    marks = (
        "lora_",
        "modules_to_save",
        "ia3_",
        "hada_",
        "vera_lambda",
        "lokr_",
        "oft_",
        "trainable",
    )
    for name, weight in model.named_parameters():
        if any(mark in name for mark in marks) and of in name:
            drawn = torch.randn(weight.shape, generator=generator) * 0.3
            weight.data = (drawn + ("ia3" in name)).to(weight.dtype)


def adapted(task: str, base: str | None = None, config=None, seed: int = 1, **fields):
    """A PeftModel on a base, in eval mode."""
    on = base_of(task, base or models.saved("llama", "lm"), **fields)
    config = config or lora(task_type=task)
    if config.task_type is None:
        config.task_type = task
    model = peft.get_peft_model(on, config)
    randomise(model, seed)
    return model.eval()


def folder() -> Path:
    """A new folder that lives as long as the test run."""
    return Path(tempfile.mkdtemp(dir=models.scratch(), prefix="adapter-"))


def saved(model) -> str:
    """The folder that PEFT writes of a PeftModel."""
    path = folder()
    model.save_pretrained(path)
    return str(path)


def outputs(model, ids: Sequence[int]) -> Tensor:
    """What the model's own class answers at the last token of a text."""
    logits = model(input_ids=torch.tensor([list(ids)])).logits
    return logits[0] if logits.ndim == 2 else logits[0, -1]


def values(model) -> Callable[[Sequence[int]], float]:
    """V of a text by the stock forward of a PeftModel."""
    return lambda ids: float(outputs(model, ids)[0])


def log_probs(model) -> Callable[[Sequence[int]], Tensor]:
    """log π of each token after a text."""
    return lambda ids: outputs(model, ids).float().log_softmax(-1)


@torch.no_grad()
def check(scorer, value: Callable[[Sequence[int]], float], steps: int = 5, atol=1e-4) -> None:
    """Holds a scorer to brute force over prefixes that grow, fork and are taken back."""
    generator = torch.Generator().manual_seed(0)
    rows = [models.prompts([n])[0] for n in (6, 9)]
    for step in range(steps):
        candidates = torch.randint(3, models.VOCAB, (len(rows), 3), generator=generator)
        scores = scorer.score(rows, candidates)
        wanted = [
            [value([*row, a]) for a in own]
            for row, own in zip(rows, candidates.tolist(), strict=True)
        ]
        torch.testing.assert_close(scores.values, torch.tensor(wanted), atol=atol, rtol=1e-4)
        base = torch.tensor([value(row) for row in rows])
        torch.testing.assert_close(scores.baseline, base, atol=atol, rtol=1e-4)
        grown = [[*row, own[0]] for row, own in zip(rows, candidates.tolist(), strict=True)]
        forks = [[*rows[0], int(candidates[0, 1])]] if step % 2 == 0 else [rows[1][:4]]
        rows = (grown + forks)[-4:]
    scorer.cache.check()


@torch.no_grad()
def check_implicit(scorer, tuned, reference) -> None:
    """Holds an implicit reward to log π* − log π_ref of the stock forwards."""
    for row in models.prompts([6, 9]):
        candidates = torch.tensor([[5, 50, 99]])
        wanted = (log_probs(tuned)(row) - log_probs(reference)(row))[candidates[0]]
        got = scorer.score([row], candidates).values[0]
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
