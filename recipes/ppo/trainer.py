"""The PPO loop: roll out, score, estimate advantages, update policy and value model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Adam
from transformers import PreTrainedModel

from recipes.ppo import losses
from recipes.ppo.advantages import (
    final_scores,
    generalized_advantages,
    masked_mean,
    token_rewards,
    whiten,
)
from recipes.ppo.config import PPOConfig
from recipes.ppo.readings import in_batches, token_logps, token_values
from recipes.ppo.rewards import RewardFunction
from recipes.ppo.rollout import Rollout, sample
from recipes.ppo.value_model import freeze_bias

Log = Callable[[dict[str, float]], None]
Save = Callable[["PPOTrainer"], None]


@dataclass(frozen=True)
class Experience:
    """A rollout with what the updates need; tensors are float32 [rows, response width]."""

    rollout: Rollout
    logps: Tensor
    values: Tensor
    advantages: Tensor  # whitened
    returns: Tensor

    def rows(self, index: Tensor) -> "Experience":
        return Experience(
            self.rollout.rows(index),
            self.logps[index],
            self.values[index],
            self.advantages[index],
            self.returns[index],
        )


class PPOTrainer:
    """Trains `policy` and `value_model` in place; `reference` is only read.

    The three networks share one tokenizer, and maybe what of them is frozen. Prompts are token ids,
    used as they are: whether they begin with BOS is the caller's convention (EasyLM's PPO: they do
    not).
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        reference: PreTrainedModel,
        value_model: PreTrainedModel,
        reward: RewardFunction,
        config: PPOConfig,
        *,
        eos_id: int,
        pad_id: int,
        log: Log = lambda stats: None,
    ) -> None:
        self.policy, self.reference, self.value_model = policy, reference.eval(), value_model
        self.reward, self.config, self.log = reward, config, log
        self.eos_id, self.pad_id = eos_id, pad_id
        freeze_bias(value_model)
        self.policy_optimizer = Adam(learned(policy).values(), lr=config.policy_lr)
        self.value_optimizer = Adam(learned(value_model).values(), lr=config.value_lr)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step = 0  # finished steps, warm-up included
        self.queue: list[int] = []  # rows of the current pass over the prompts
        policy.eval()  # dropout would make old and new log-probabilities disagree
        value_model.eval()

    @property
    def total_steps(self) -> int:
        return self.config.warmup_steps + self.config.steps

    def train(self, prompts: Sequence[Sequence[int]], save: Save | None = None) -> None:
        """Run the remaining steps over shuffled passes through `prompts`.

        Every `save_every` steps `save(trainer)` is called, for example to write a checkpoint.
        """
        if self.step == 0:
            torch.manual_seed(self.config.seed)
        while self.step < self.total_steps:
            self.log(self.train_step([prompts[row] for row in self._next_rows(len(prompts))]))
            if save and self.config.save_every and self.step % self.config.save_every == 0:
                save(self)

    def train_step(self, prompts: Sequence[Sequence[int]]) -> dict[str, float]:
        """One batch of rollouts and the updates on it; returns what is worth logging."""
        warming = self.step < self.config.warmup_steps
        self._set_learning_rates()
        experience, stats = self.collect(prompts, warming=warming)
        totals: dict[str, float] = {}
        updates = 0
        for _ in range(self.config.epochs):
            order = torch.randperm(len(prompts), generator=self.generator)
            for index in order.split(self.config.minibatch_size):
                minibatch = experience.rows(index.to(experience.logps.device))
                for name, value in self._update(minibatch, warming=warming).items():
                    totals[name] = totals.get(name, 0.0) + value
                updates += 1
        self.step += 1
        means = {name: total / updates for name, total in totals.items()}
        return {"step": float(self.step), "warming": float(warming)} | stats | means

    def collect(
        self, prompts: Sequence[Sequence[int]], *, warming: bool
    ) -> tuple[Experience, dict[str, float]]:
        """Sample responses and turn their scores into advantages and returns."""
        config = self.config
        rollout = sample(
            self.policy,
            prompts,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            eos_id=self.eos_id,
            pad_id=self.pad_id,
            batch_size=config.generation_batch_size,
        )
        size, mask = config.minibatch_size, rollout.response_mask
        logps = in_batches(token_logps, self.policy, rollout, size) * mask
        reference_logps = in_batches(token_logps, self.reference, rollout, size) * mask
        values = in_batches(token_values, self.value_model, rollout, size) * mask
        scores = self._scores(rollout)
        rewards = token_rewards(logps, reference_logps, scores, mask, config.kl_coef)
        lam = config.warmup_lam if warming else config.lam
        advantages, returns = generalized_advantages(
            values, rewards, mask, gamma=config.gamma, lam=lam
        )
        stats = {
            "score": scores.mean().item(),
            "kl": ((logps - reference_logps) * mask).sum(-1).mean().item(),
            "finished": rollout.finished.float().mean().item(),
            "tokens": mask.sum(-1).mean().item(),
            "value": masked_mean(values, mask).item(),
            "error": masked_mean((values - returns) ** 2, mask).item(),
        }
        return Experience(rollout, logps, values, whiten(advantages, mask), returns), stats

    def _scores(self, rollout: Rollout) -> Tensor:
        """What each response earns at its last token, float32 [rows]."""
        rows = range(len(rollout.tokens))
        prompts = [rollout.prompt_ids(row) for row in rows]
        responses = [rollout.response_ids(row) for row in rows]
        scores = self.reward(prompts, responses).to(rollout.response_mask)
        return final_scores(scores, rollout.finished, self.config)

    def _update(self, batch: Experience, *, warming: bool) -> dict[str, float]:
        """One optimizer step on each network (on the value model alone while warming up)."""
        config, mask = self.config, batch.rollout.response_mask
        values = token_values(self.value_model, batch.rollout)
        value_loss = losses.value_loss(
            values, batch.values, batch.returns, mask, config.value_clip_range
        )
        self._descend(self.value_optimizer, config.vf_coef * value_loss)
        stats = {"value_loss": value_loss.item()}
        if not warming:
            logps = token_logps(self.policy, batch.rollout)
            loss, clipped = losses.policy_loss(
                logps, batch.logps, batch.advantages, mask, config.clip_range
            )
            self._descend(self.policy_optimizer, loss)
            stats |= {"policy_loss": loss.item(), "clipped": clipped.item()}
        return stats

    def _descend(self, optimizer: Adam, loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        optimizer.step()

    def _set_learning_rates(self) -> None:
        """Linear warm-up and linear decay, for each network over the steps in which it learns."""
        config = self.config
        pairs = (
            (self.value_optimizer, config.value_lr, self.step, self.total_steps),
            (
                self.policy_optimizer,
                config.policy_lr,
                self.step - config.warmup_steps,
                config.steps,
            ),
        )
        for optimizer, lr, step, total in pairs:
            for group in optimizer.param_groups:
                group["lr"] = lr * learning_rate_factor(step, total, config.lr_warmup_steps)

    def _next_rows(self, available: int) -> list[int]:
        """The next `rollouts_per_step` prompts of endless shuffled passes."""
        wanted = self.config.rollouts_per_step
        while len(self.queue) < wanted:
            self.queue += torch.randperm(available, generator=self.generator).tolist()
        rows, self.queue = self.queue[:wanted], self.queue[wanted:]
        return rows


def learned(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name: of a network with adapters these alone."""
    return {name: one for name, one in network.named_parameters() if one.requires_grad}


def learning_rate_factor(step: int, total: int, warmup: int) -> float:
    """In [0, 1]: rises over `warmup` steps, falls linearly to 0 at `total`."""
    if step < 0:
        return 0.0
    rise = (step + 1) / warmup if warmup else 1.0
    return min(1.0, rise, (total - step) / max(1, total - warmup))
