"""The model families that `guided-decode demo` shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guided_decode.cli.checkpoints import load_policy, open_scorer
from guided_decode.cli.model_options import ScorerOptions

if TYPE_CHECKING:
    from guided_decode.lab.demo.decoding import Models
    from guided_decode.lab.demo.methods import Plan
    from guided_decode.scoring.critic import CriticScorer

POLICIES = {"SFT": "tiny-tulu-sft", "PPO": "tiny-tulu-ppo"}


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the demo's table: models, the methods that decode with them, and on what."""

    models: Models
    plan: Plan


@dataclass(frozen=True, slots=True)
class Family:
    """A family and how much of it is shown.

    title: over the table. prompts, batch_size: where the command gives none. threads: of torch;
    None leaves them. load: its sections by name.
    """

    title: str
    prompts: int
    batch_size: int
    threads: int | None
    plot: Path
    load: Callable[[], dict[str, Section]]


def _tiny_tulu() -> dict[str, Section]:
    from guided_decode.integrations.transformers import GuidedDecoding
    from guided_decode.lab.demo.decoding import Models
    from guided_decode.lab.demo.methods import SUMS

    policies = {name: load_policy(path, "cpu", "float32") for name, path in POLICIES.items()}
    critic = _critic("tiny-tulu-value", next(iter(policies.values())))
    return {
        name: Section(Models(own.model, own.tokenizer, critic, GuidedDecoding), SUMS)
        for name, own in policies.items()
    }


def _smol() -> dict[str, Section]:
    from guided_decode import smol
    from guided_decode.integrations.transformers import GuidedDecoding, TrunkLookahead
    from guided_decode.lab.demo.chosen import SMOL
    from guided_decode.lab.demo.decoding import Models
    from guided_decode.lab.demo.methods import smol_plan
    from guided_decode.lab.demo.task import smol_task

    policy = load_policy("smol-sft", "cpu", "float32")
    critic = _critic("smol-value", policy)
    head = ScorerOptions(head=str(smol.trunk_head_path()))
    trunk = _critic(policy.name, policy, head), TrunkLookahead
    return {
        name: Section(
            Models(policy.model, policy.tokenizer, critic, GuidedDecoding, smol_task(name), trunk),
            smol_plan(SMOL[name]),
        )
        for name in smol.TASKS
    }


def _critic(name: str, policy: Any, options: ScorerOptions | None = None) -> CriticScorer:
    from guided_decode.scoring.critic import CriticScorer

    scorer = open_scorer(name, options or ScorerOptions(), device="cpu", dtype="float32",
                         policy=policy)  # fmt: skip
    assert isinstance(scorer, CriticScorer)
    return scorer


FAMILIES = {
    "tiny-tulu": Family(
        "tiny-tulu: {} held-out sums, guided by the value model of its PPO run",
        # The models are so small that a second thread waits more than it works.
        100, 50, 1, Path("guided-decode-demo.png"), _tiny_tulu,
    ),
    "smol": Family(
        "smol: SmolLM2-135M-Instruct on {} held-out prompts a task, guided by the value model of "
        "its PPO run",
        20, 20, None, Path("guided-decode-demo-smol.png"), _smol,
    ),
}  # fmt: skip
