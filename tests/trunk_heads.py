"""Heads on the trunks of `models.tiny(arch, "lm")`, and their values by brute force."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from guided_decode import load_scorer
from guided_decode.integrations.transformers import TrunkLookahead
from tests import models, oracle

POLICY_SEED = 1


def linear(size: int = 48, seed: int = 3) -> nn.Linear:
    """A linear head whose values vary by a few units."""
    return _random(nn.Linear(size, 1), seed)


def two_layers(size: int = 48, width: int = 20, seed: int = 4) -> nn.Sequential:
    """A head of two layers."""
    return _random(nn.Sequential(nn.Linear(size, width), nn.GELU(), nn.Linear(width, 1)), seed)


def _random(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.requires_grad_(False)


@dataclass
class TrunkValues(oracle.Values):
    """V of whole sequences: the head, as torch runs it, on one stock forward of the policy."""

    head: nn.Module = field(default_factory=linear)

    def forward(self, wanted):
        for ids in dict.fromkeys(wanted):
            if ids not in self.known:
                hidden = self.model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
                self.known[ids] = self.head(hidden).item()
        return [self.known[ids] for ids in wanted]


def policy(arch: str = "llama", **overrides):
    """The policy that the tests decode."""
    return models.tiny(arch, "lm", seed=POLICY_SEED, **overrides)


def scorer(arch: str = "llama", head: nn.Module | None = None, **options):
    """Its scorer of kind trunk-head."""
    return load_scorer(
        policy(arch), kind="trunk-head", head=linear() if head is None else head, **options
    )


def brute_force(arch: str = "llama", head: nn.Module | None = None, **rules) -> oracle.Oracle:
    """The guidance of a head on the policy's trunk, from its definition."""
    values = TrunkValues(policy(arch), head=linear() if head is None else head)
    return oracle.Oracle(values, **rules)


def padded(prompts, pad=models.PAD):
    """input_ids and attention_mask of left-padded prompts."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def generate(model, prompts, scorer, config, loop=TrunkLookahead, **options):
    """`generate` by a loop, with everything it can report."""
    ids, mask = padded(prompts)
    defaults = {
        "eos_token_id": [models.EOS],
        "pad_token_id": models.PAD,
        "max_new_tokens": 12,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    options = defaults | options
    return model.generate(ids, attention_mask=mask, custom_generate=loop(scorer, config), **options)


def responses(out, width, ends):
    """Each row's tokens up to its end."""
    rows = []
    for sequence in out.sequences[:, width:].tolist():
        stop = next((n + 1 for n, token in enumerate(sequence) if token in ends), len(sequence))
        rows.append(sequence[:stop])
    return rows
