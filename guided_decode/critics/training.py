"""The training loop: steps over rollouts, the best epoch by others, and a state to go on from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from guided_decode.critics.config import CriticConfig
from guided_decode.critics.network import Network
from guided_decode.critics.rollout import Rollout
from guided_decode.critics.state import StateFiles
from guided_decode.critics.targets import lambda_returns, losses_of, values_of


class Progress(Protocol):
    """Is told how far a training is."""

    def __call__(self, step: int, steps: int, loss: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Examples:
    """What is trained on.

    rollouts: all. outcomes: float32 [rollouts, labels]. training, validation: indices of them.
    scores: of each rollout's prefixes by a reward model, float32 [prefixes], where that is the
    target.
    """

    rollouts: Sequence[Rollout]
    outcomes: Tensor
    training: Sequence[int]
    validation: Sequence[int]
    scores: Sequence[Tensor] | None = None


@dataclass(slots=True)
class Trained:
    """How a training went. epochs: a record an epoch, of training and validation loss."""

    best_epoch: int = 0
    best_loss: float = math.inf
    epochs: list[dict[str, float]] = field(default_factory=list)


class Training:
    """One critic's training: `run` goes on from where the files left it, and ends with the weights
    of the epoch that has the least loss on the validation rollouts.

    The order of rollouts follows from the seed, so that a run that was killed ends, on the same
    machine, with the weights of one that was not.
    """

    def __init__(
        self,
        network: Network,
        examples: Examples,
        config: CriticConfig,
        files: StateFiles,
        *,
        save_every: int,
        progress: Progress = lambda step, steps, loss: None,
        log: Callable[[dict[str, float]], None] = lambda epoch: None,
    ) -> None:
        """
        Args:
            network: what is trained, in place.
            config: settled.
            files: where the state lies.
            save_every: steps between two states.
            progress: told of each step. log: told of each epoch.
        """
        self.network, self.examples, self.config = network, examples, config
        self._files, self._save_every = files, save_every
        self._progress, self._log = progress, log
        self._parameters = network.trainable()
        assert config.lr is not None
        assert config.epochs is not None
        assert config.batch_size is not None
        self._epochs, self._batch, self._lr = config.epochs, config.batch_size, config.lr
        self._optimizer = torch.optim.AdamW(
            list(self._parameters.values()), lr=config.lr, weight_decay=config.weight_decay
        )
        self._generator = torch.Generator().manual_seed(config.seed)
        self._order: list[int] = []
        self._epoch = self._step = 0
        self._loss_sum = 0.0
        self.trained = Trained()

    @property
    def steps_an_epoch(self) -> int:
        """Optimizer steps of one pass over the training rollouts."""
        return -(-len(self.examples.training) // self._batch)

    @property
    def steps(self) -> int:
        """All optimizer steps."""
        return self.steps_an_epoch * self._epochs

    def run(self) -> Trained:
        """Trains to the end. Raises FloatingPointError: the loss is no number any more."""
        self._take_up()
        self.network.train(True)
        while self._epoch < self._epochs:
            if not self._order:
                drawn = torch.randperm(len(self.examples.training), generator=self._generator)
                self._order = [self.examples.training[i] for i in drawn.tolist()]
            while (begin := self._step * self._batch) < len(self._order):
                self._one_step(self._order[begin : begin + self._batch])
            self._end_epoch()
        best = self._files.load_best()
        assert best is not None
        self._put(best["weights"])
        self.network.train(False)
        return self.trained

    def _one_step(self, indices: list[int]) -> None:
        done = self._epoch * self.steps_an_epoch + self._step
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * _schedule(done, self.steps, self.config.warmup)
        with torch.enable_grad():
            losses, mask = self._losses(indices, self.config.target != "outcome")
            loss = (losses * mask).sum() / mask.sum()
            self._optimizer.zero_grad()
            loss.backward()
        parameters = list(self._parameters.values())
        torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        if not math.isfinite(value := float(loss.detach())):
            raise FloatingPointError(
                f"the loss is {value} at step {done + 1}: expected a number; pass a smaller lr= "
                f"than {self._lr:g}, or another dtype"
            )
        self._optimizer.step()
        self._step += 1
        self._loss_sum += value
        self._progress(done + 1, self.steps, self._loss_sum / self._step)
        if self._step % self._save_every == 0:
            self._save()

    def _losses(self, indices: Sequence[int], own_targets: bool) -> tuple[Tensor, Tensor]:
        """The loss of each prefix of some rollouts and which there are, [rows, width] each.

        own_targets: by the config's target; else by what each rollout came to.
        """
        examples, loss = self.examples, self.config.loss
        outputs = self.network.outputs(examples.rollouts, indices)
        rows = [examples.rollouts[i] for i in indices]
        lengths = torch.tensor([row.prefixes(at_end=self.network.at_end) for row in rows])
        lengths = lengths.to(outputs.device)
        mask = torch.arange(outputs.shape[1], device=outputs.device) < lengths[:, None]
        outcomes = examples.outcomes[list(indices)].to(outputs.device)
        if examples.scores is not None:
            own = [examples.scores[i] for i in indices]
            padded = torch.nn.utils.rnn.pad_sequence(own, batch_first=True)
            targets = padded.to(outputs.device)[..., None]
        elif own_targets:
            values = values_of(outputs.detach(), loss)
            targets = lambda_returns(values, outcomes, lengths, self.config.lam)
        else:
            targets = outcomes[:, None].expand_as(outputs)
        return losses_of(outputs, targets, loss), mask

    def _end_epoch(self) -> None:
        held = self._validation_loss()
        self.trained.epochs.append(
            {"epoch": self._epoch + 1, "loss": self._loss_sum / self._step, "validation_loss": held}
        )
        if held < self.trained.best_loss or not self.trained.best_epoch:
            self.trained.best_loss, self.trained.best_epoch = held, self._epoch + 1
            self._files.save_best({"weights": self._weights()})
        self._epoch, self._step, self._loss_sum, self._order = self._epoch + 1, 0, 0.0, []
        self._save()
        self._log(self.trained.epochs[-1])

    @torch.no_grad()
    def _validation_loss(self) -> float:
        self.network.train(False)
        total, count = 0.0, 0
        for start in range(0, len(self.examples.validation), self._batch):
            indices = self.examples.validation[start : start + self._batch]
            losses, mask = self._losses(indices, False)
            total += float((losses * mask).sum())
            count += int(mask.sum())
        self.network.train(True)
        return total / count

    def _weights(self) -> dict[str, Tensor]:
        return {name: each.detach().cpu().clone() for name, each in self._parameters.items()}

    def _put(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, each in self._parameters.items():
                each.copy_(weights[name])

    def _save(self) -> None:
        state: dict[str, Any] = {
            "epoch": self._epoch,
            "step": self._step,
            "order": self._order,
            "loss_sum": self._loss_sum,
            "generator": self._generator.get_state(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "weights": self._weights(),
            "optimizer": self._optimizer.state_dict(),
            "best_epoch": self.trained.best_epoch,
            "best_loss": self.trained.best_loss,
            "epochs": self.trained.epochs,
        }
        self._files.save(state)

    def _take_up(self) -> None:
        """Goes to where the files say that the training was; else to its beginning."""
        state = self._files.load()
        if state is None:
            torch.manual_seed(self.config.seed)
            return
        self._epoch, self._step = state["epoch"], state["step"]
        self._order, self._loss_sum = state["order"], state["loss_sum"]
        self._generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])
        if state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        self._put(state["weights"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.trained = Trained(state["best_epoch"], state["best_loss"], state["epochs"])


def _schedule(step: int, steps: int, warmup: float) -> float:
    """The share of the learning rate at a step: a rise, then a cosine down to 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1.0 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
