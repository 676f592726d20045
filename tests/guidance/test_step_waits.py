"""How often a steady step waits for the device: once before the critic, once after it."""

import importlib

import pytest
import torch
from torch.overrides import TorchFunctionMode

from guided_decode import GuidanceConfig, PrefixHandle
from guided_decode.guidance.step import guide_rows
from tests import models
from tests.forward.test_graphs import scorer_like_a_gpus

# What the host learns a tensor's numbers by. Their own device is the CPU here, where numpy() is
# no such thing: elsewhere it raises.
WAITS = {"cpu", "tolist", "item", "__bool__", "__int__", "__float__", "nonzero"}


class Waits(TorchFunctionMode):
    """Notes when the host would wait, outside of the kernels and the forward."""

    def __init__(self):
        super().__init__()
        self.begin()
        self.inside = False

    def begin(self):
        self.seen = []
        # What is on the host; kept, so that nothing else comes to lie there.
        self.on_host = []

    def __torch_function__(self, function, types, arguments=(), options=None):
        name = getattr(function, "__name__", "")
        result = function(*arguments, **(options or {}))
        first = arguments[0] if arguments else None
        if self.inside or not isinstance(first, torch.Tensor):
            return result
        here = {each.untyped_storage().data_ptr() for each in self.on_host}
        known = first.untyped_storage().data_ptr() in here
        if name in WAITS and not known:
            self.seen.append(name)
        if isinstance(result, torch.Tensor) and (known or name == "cpu"):
            self.on_host.append(result)
        return result

    def skip(self, monkeypatch, place, name):
        """Of what runs in `place.name` nothing is noted but its name."""
        original = getattr(place, name)

        def skipped(*arguments, **options):
            outside, self.inside = self.inside, True
            self.seen.append(name)
            try:
                return original(*arguments, **options)
            finally:
                self.inside = outside

        monkeypatch.setattr(place, name, skipped)


CONFIGS = {
    "reweight": GuidanceConfig(top_k=5),
    "prune": GuidanceConfig(top_k=5, top_p=0.9, rule="prune", margin=0.5),
    "gate": GuidanceConfig(top_k=5, gate=0.999),
}


@pytest.mark.parametrize("padded", [0, 3])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_steady_step_waits_once_before_the_critic_and_once_after(config, padded, monkeypatch):
    scorer, waits = scorer_like_a_gpus(), Waits()
    for name in ("top_candidates", "guide_logits"):
        module = importlib.import_module(f"guided_decode.kernels.{name}")
        waits.skip(monkeypatch, module, f"{name}_reference")
    waits.skip(monkeypatch, scorer._graphs, "_forward")
    handles = [PrefixHandle(prompt) for prompt in models.prompts([12, 20, 9])]
    noise = torch.Generator().manual_seed(0)
    for _ in range(6):
        # A policy's vocabulary may be padded beyond the scorer's.
        logits = torch.randn(3, models.VOCAB + padded, generator=noise)
        logits[:, models.VOCAB :] = -9.0
        waits.begin()
        with waits:
            guided = guide_rows(scorer, logits, handles, config, terminals=[models.EOS])
        for handle, token in zip(handles, guided.argmax(-1).tolist(), strict=True):
            handle.append(token)
    assert waits.seen == ["top_candidates_reference", "cpu", "_forward", "guide_logits_reference",
                          "tolist"]  # fmt: skip
    assert scorer.cache.ridden > 0
