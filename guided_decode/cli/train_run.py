"""A training of `train-critic`: from rollouts to a folder with a critic and its report card."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from guided_decode.cli.checkpoints import open_scorer
from guided_decode.cli.errors import INTERRUPTED, Refusal, warn
from guided_decode.cli.model_options import ScorerOptions
from guided_decode.cli.report_files import NAME, bar, read_values, write_card
from guided_decode.cli.rollout_rows import RolloutRow
from guided_decode.cli.run_identity import digest, fingerprint
from guided_decode.cli.scored_file import as_line
from guided_decode.cli.train_models import TrainModels
from guided_decode.cli.train_options import RewardOptions
from guided_decode.critics.config import CriticConfig
from guided_decode.critics.rollout import Rollout, split_by_prompt
from guided_decode.serving.file_lock import FileLock

if TYPE_CHECKING:
    from torch import Tensor

    from guided_decode.critics.network import Network
    from guided_decode.critics.training import Trained

STATE, CARD, HELD_OUT = "training", "report_card", "held_out.jsonl"
_TOP_K = 16


@dataclass(slots=True)
class TrainRun:
    """What a critic is trained from. rows, rollouts: the same, as lines and as token ids."""

    models: TrainModels
    config: CriticConfig
    rewards: RewardOptions
    held_out: float
    rows: list[RolloutRow]
    rollouts: list[Rollout]
    out: Path
    save_every: int

    @property
    def identity(self) -> str:
        """What the critic follows from, by name."""
        given = [[r.prompt, r.response, r.reward, r.finished] for r in self.rollouts]
        scores = None
        if self.config.target == "scores":
            scores = self.models.judge_identity(self.rewards)
        return digest([fingerprint(self.models.policy), self.models.dtype, asdict(self.config),
                       self.held_out, scores, given])  # fmt: skip

    def is_done(self, *, overwrite: bool) -> bool:
        """Whether the folder has this critic already.

        Raises Refusal: it has another, or part of another's training.
        """
        from guided_decode.critics.saving import RECORD
        from guided_decode.critics.state import StateFiles

        path, run = self.out / RECORD, self.identity
        files = StateFiles(self.out / STATE, run)
        if overwrite:
            files.remove()
            for each in (path, self._card):
                each.unlink(missing_ok=True)
            return False
        known = _recorded(path) if path.is_file() else None
        if (path.is_file() and known != run) or files.of_another():
            raise Refusal(f"{self.out} has a critic of other rollouts or settings: pass another "
                          "--out, or --overwrite")  # fmt: skip
        return path.is_file()

    def train(self) -> None:
        """Trains and saves; goes on where an earlier run was."""
        import torch

        from guided_decode.critics.saving import save_critic
        from guided_decode.critics.state import StateFiles
        from guided_decode.critics.targets import outcome_targets

        training, held_out = self._split
        own = [self.rollouts[i] for i in training]
        outcomes = outcome_targets(own, self.config.loss)
        fitted, validation = split_by_prompt(own, self.config.validation, self.config.seed + 1)
        scores = self._scores(own) if self.config.target == "scores" else None
        mean = outcomes[fitted].mean(0)
        if scores is not None:
            mean = torch.cat([scores[i] for i in fitted]).mean()[None]
        network = self._network(own, mean)
        files = StateFiles(self.out / STATE, self.identity)
        trained = self._fit(network, own, outcomes, fitted, validation, scores, files)
        lines = b"".join(as_line(dict(self.rows[i].given)) for i in held_out)
        (self.out / HELD_OUT).write_bytes(lines)
        save_critic(
            self.out, network, self.config, self.models.tokenizer, policy=self.models.known_as,
            trained=self._metadata(trained, own, [self.rollouts[i] for i in held_out]),
        )  # fmt: skip
        self._card.unlink(missing_ok=True)

    def finish(self) -> None:
        """Takes the training's state away, and writes the report card where there is none yet."""
        from guided_decode.critics.state import StateFiles

        StateFiles(self.out / STATE, self.identity).remove()
        with contextlib.suppress(OSError):
            (self.out / STATE).rmdir()
        if not self._card.is_file():
            self._write_card([self.rollouts[i] for i in self._split[1]])

    @property
    def _split(self) -> tuple[list[int], list[int]]:
        return split_by_prompt(self.rollouts, self.held_out, self.config.seed)

    @property
    def _card(self) -> Path:
        return self.out / CARD / f"{NAME}.json"

    def _network(self, own: list[Rollout], mean: Tensor) -> Network:
        from guided_decode.critics.features import Features, fits
        from guided_decode.critics.network import build

        network = build(self.models.loaded.model, self.config, mean, self.models.policy)
        at_end = network.at_end
        if self.config.mode == "head" and fits(network.trunk, own, at_end=at_end):
            network = replace(network, features=Features(network.trunk, own, at_end=at_end))
        return network

    def _fit(
        self, network: Network, own: list[Rollout], outcomes: Tensor, fitted: list[int],
        validation: list[int], scores: list[Tensor] | None, files: Any,
    ) -> Trained:  # fmt: skip
        from guided_decode.critics.training import Examples, Training

        with bar("training") as progress:
            task = progress.add_task("", total=None)

            def told(step: int, steps: int, loss: float) -> None:
                progress.update(task, completed=step, total=steps, description=f"loss {loss:.4f}")

            def log(epoch: dict[str, float]) -> None:
                done = f"epoch {epoch['epoch']:.0f} of {self.config.epochs}"
                figures = f"loss {epoch['loss']:.4f}, validation {epoch['validation_loss']:.4f}"
                progress.console.print(f"{done}: {figures}", highlight=False)

            examples = Examples(own, outcomes, fitted, validation, scores)
            training = Training(
                network, examples, self.config, files, save_every=self.save_every, progress=told,
                log=log,
            )  # fmt: skip
            try:
                return training.run()
            except FloatingPointError as error:
                raise Refusal(str(error)) from error
            except KeyboardInterrupt:
                progress.stop()
                print(f"interrupted in {self.out}; the same command goes on from its last state",
                      file=sys.stderr)  # fmt: skip
                raise typer.Exit(INTERRUPTED) from None

    def _scores(self, own: list[Rollout]) -> list[Tensor]:
        from guided_decode.critics.values import values_along

        scorer = self.models.reward_scorer(self.rewards)
        with bar("scoring") as progress:
            task = progress.add_task("rollouts", total=len(own))
            return values_along(
                scorer, own, at_end=self.config.at_end,
                done=lambda n: progress.update(task, completed=n),
            )  # fmt: skip

    def _metadata(
        self, trained: Trained, own: list[Rollout], held_out: list[Rollout]
    ) -> dict[str, Any]:
        given = asdict(self.config)
        return {
            "policy": self.models.known_as,
            "rewards": " ".join(self.rewards.given()) or "of the lines",
            "rollouts": len(own),
            "prompts": len({each.prompt for each in own}),
            "held_out_prompts": len({each.prompt for each in held_out}),
            "read": "at each token of a response from the one before it on, "
            + ("its EOS included" if self.config.at_end else "but for its last"),
            "best_epoch": trained.best_epoch,
            "validation_loss": trained.best_loss,
            "epochs": trained.epochs,
            "settings": given,
            "run": self.identity,
        }

    def _write_card(self, held_out: list[Rollout]) -> None:
        from guided_decode.guidance.config import GuidanceConfig
        from guided_decode.lab.demo.plot import require_matplotlib
        from guided_decode.lab.report_card.card import Guided, make_card

        policy = self.models.loaded
        name, reading = str(self.out), ScorerOptions()
        if self.config.mode == "head":
            # On the weights that are here already.
            name, reading = policy.name, ScorerOptions(head=str(self.out))
        critic = open_scorer(
            name, reading, device=self.models.device, dtype=self.models.dtype, policy=policy
        )
        top_k = min(_TOP_K, int(policy.model.config.get_text_config().vocab_size))
        guided = Guided(
            policy.model, self.models.terminals, GuidanceConfig(beta=0.0, top_k=top_k),
            seed=self.config.seed,
        )  # fmt: skip
        card = make_card(
            read_values(critic, held_out), held_out, scorer=str(self.out),
            policy=self.models.known_as, scored_by=critic, guided=guided,
        )  # fmt: skip
        plot = True
        try:
            require_matplotlib()
        except ImportError as error:
            plot = False
            warn(f"no picture of the report card: {error}")
        write_card(card, self.out / CARD, plot=plot)
        print(card.markdown(), end="")


def _recorded(path: Path) -> str | None:
    """The run that a folder's critic is of."""
    try:
        return str(json.loads(path.read_text())["trained"]["run"])
    except (ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps a folder for one run. Raises Refusal: another is at work in it; it is a file."""
    if folder.exists() and not folder.is_dir():
        raise Refusal(f"--out {folder} is a file: expected a folder, made where there is none")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock()
    if not lock.take(folder / ".lock"):
        raise Refusal(f"another run trains in {folder}: let it end, or pass another --out")
    try:
        yield
    finally:
        lock.release()
