"""What a steady guided step launches beside the critic's graph and its kernels: a handful."""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from guided_decode import GuidanceConfig, PrefixHandle
from guided_decode.guidance.step import guide_rows
from tests import models
from tests.forward.test_graphs import scorer_like_a_gpus

# Operations that launch nothing.
VIEWS = {
    "view", "_unsafe_view", "slice", "select", "unsqueeze", "squeeze",
    "expand", "t", "alias", "transpose", "as_strided",
    "detach", "unbind", "lift_fresh", "_local_scalar_dense",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts torch's operations; those inside a kernel's reference or the forward are one."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.inside = False

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        if not self.inside and name not in VIEWS:
            self.names.append(name)
        return function(*arguments, **(options or {}))

    def as_one(self, monkeypatch, place, name):
        """From now on `place.name` counts as one operation of that name."""
        original = getattr(place, name)

        def once(*arguments, **options):
            self.names.append(name)
            outside, self.inside = self.inside, True
            try:
                return original(*arguments, **options)
            finally:
                self.inside = outside

        monkeypatch.setattr(place, name, once)


@pytest.mark.parametrize(
    "config",
    [
        GuidanceConfig(top_k=5),
        GuidanceConfig(top_k=5, top_p=0.9, rule="prune", margin=0.5),
        GuidanceConfig(top_k=5, gate=0.999),
    ],
    ids=["reweight", "prune", "gate"],
)
def test_a_steady_step_launches_little_beside_its_kernels(config, monkeypatch):
    scorer = scorer_like_a_gpus()
    launches = Launches()
    kernels = ("top_candidates", "guide_logits")
    for name in kernels:
        module = importlib.import_module(f"guided_decode.kernels.{name}")
        launches.as_one(monkeypatch, module, f"{name}_reference")
    launches.as_one(monkeypatch, scorer._graphs, "_forward")
    handles = [PrefixHandle(prompt) for prompt in models.prompts([12, 20, 9])]
    noise = torch.Generator().manual_seed(0)
    for _ in range(6):
        logits = torch.randn(3, models.VOCAB, generator=noise)
        launches.names.clear()
        with launches:
            guided = guide_rows(scorer, logits, handles, config, terminals=[models.EOS])
        for handle, token in zip(handles, guided.argmax(-1).tolist(), strict=True):
            handle.append(token)
    ours = [name for name in launches.names if name.endswith("_reference")]
    assert ours == [f"{name}_reference" for name in kernels]
    assert launches.names.count("_forward") == 1
    # Slot tables, the batch into the graph's buffers, values out of their slots, and on the host
    # what is asked about terminals.
    assert len(launches.names) <= 15, launches.names
