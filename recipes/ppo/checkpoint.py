"""Saving a run: its two models in Hugging Face layout, or its whole state to go on from."""

from pathlib import Path

import torch
from torch import Tensor, nn

from recipes.ppo.trainer import PPOTrainer, learned

STATE = "trainer.pt"


def save_models(trainer: PPOTrainer, out: Path) -> None:
    """`out`/policy and `out`/value, Hugging Face layout; the tokenizer is the caller's to add."""
    trainer.policy.save_pretrained(out / "policy")
    trainer.value_model.save_pretrained(out / "value")


def save_checkpoint(trainer: PPOTrainer, out: Path) -> None:
    """All that `load_checkpoint` needs to go on as if nothing had happened, in one file."""
    out.mkdir(parents=True, exist_ok=True)
    state = {
        "step": trainer.step,
        "policy": learned(trainer.policy),
        "value_model": learned(trainer.value_model),
        "policy_optimizer": trainer.policy_optimizer.state_dict(),
        "value_optimizer": trainer.value_optimizer.state_dict(),
        "generator": trainer.generator.get_state(),
        "torch_rng": torch.get_rng_state(),
        "queue": trainer.queue,
    }
    partial = out / f"{STATE}.partial"
    torch.save(state, partial)
    partial.replace(out / STATE)


def load_checkpoint(trainer: PPOTrainer, out: Path) -> None:
    """Put a trainer that was built for the same run where `save_checkpoint` left it."""
    if not (out / STATE).is_file():
        raise FileNotFoundError(f"{out} holds no {STATE}; write it with save_checkpoint.")
    state = torch.load(out / STATE, weights_only=True)
    for network, weights in (
        (trainer.policy, state["policy"]),
        (trainer.value_model, state["value_model"]),
    ):
        _load_learned(network, weights)
    trainer.step, trainer.queue = state["step"], state["queue"]
    trainer.policy_optimizer.load_state_dict(state["policy_optimizer"])
    trainer.value_optimizer.load_state_dict(state["value_optimizer"])
    trainer.generator.set_state(state["generator"])
    torch.set_rng_state(state["torch_rng"])


def _load_learned(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """What is frozen is as it was built. Raises ValueError: other parameters learn here."""
    own = learned(network)
    if own.keys() != weights.keys():
        raise ValueError(
            f"the checkpoint has {len(weights)} weights that learn, the network {len(own)}; only "
            f"one has {sorted(own.keys() ^ weights.keys())[:3]}; build it for the same run."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
