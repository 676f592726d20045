"""The PPO run: that of `recipes.ppo` on both tasks at once, with figures of each in its log."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from guided_decode import smol
from recipes.ppo.rollout import Rollout
from recipes.ppo.trainer import Experience, Log, PPOTrainer
from recipes.smol.judge import Judge, prompt_ids
from recipes.smol.metrics import foresight
from recipes.smol.networks import build_networks
from recipes.smol.settings import Settings


class SmolTrainer(PPOTrainer):
    """Logs by task the mean reward, and how well V orders responses when half of each is there.

    V is read before it learns from the responses, so that both are figures of unseen ones.

    rollouts: a folder that gets the responses of the warm-up, which are those of the policy as it
    was, with their rewards, a file a step.
    """

    rollouts: Path | None = None

    def collect(
        self, prompts: Sequence[Sequence[int]], *, warming: bool
    ) -> tuple[Experience, dict[str, float]]:
        experience, stats = super().collect(prompts, warming=warming)
        judge: Any = self.reward
        half = experience.rollout.response_mask.sum(-1).long() // 2
        values = experience.values.gather(1, half[:, None])[:, 0]
        for task in sorted(set(judge.tasks)):
            rows = torch.tensor([i for i, own in enumerate(judge.tasks) if own == task])
            rewards = judge.rewards[rows]
            stats[task] = rewards.mean().item()
            stats[f"{task}_half"] = foresight(task, values[rows], rewards)
        if warming and self.rollouts is not None:
            self._keep(experience.rollout, self.rollouts)
        return experience, {name: value for name, value in stats.items() if not np.isnan(value)}

    def _keep(self, rollout: Rollout, folder: Path) -> None:
        """As `recipes.trunk_head.rollouts` reads them; a step done again writes them again."""
        judge: Any = self.reward
        rows = (
            {"prompt": rollout.prompt_ids(i), "response": rollout.response_ids(i), "reward": reward}
            for i, reward in enumerate(judge.rewards.tolist())
        )
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.step + 1:03}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def new_trainer(base: Any, tokenizer: Any, settings: Settings, log: Log) -> SmolTrainer:
    """A trainer on the trunk of `base`, a causal LM that is the reference; the seed draws all."""
    torch.manual_seed(settings.ppo.seed)
    networks = build_networks(base, settings)
    return SmolTrainer(
        networks.policy,  # type: ignore[arg-type]
        networks.reference,  # type: ignore[arg-type]
        networks.value,  # type: ignore[arg-type]
        Judge(tokenizer, training_messages(settings)),
        settings.ppo,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        log=log,
    )


def training_messages(settings: Settings) -> dict[str, str]:
    """The user messages with the task of each."""
    return {
        message: name
        for name in settings.tasks
        for message in smol.find_task(name).prompts("training")
    }


def training_prompts(tokenizer: Any, settings: Settings) -> list[list[int]]:
    """Their token ids, as PPO takes them."""
    return [prompt_ids(tokenizer, message) for message in training_messages(settings)]
