"""What a run's adapters can do: settings from validation prompts, figures from held-out ones."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from guided_decode import GuidanceConfig, smol
from recipes.smol.decoding import Answers, answer, values
from recipes.smol.family import POLICIES, Family
from recipes.smol.metrics import foresight
from recipes.tiny_tulu.metrics import paired_bootstrap

BETAS = (4.0, 10.0, 20.0)  # logits per unit of reward
FRACTIONS = (0.25, 0.5, 0.75, 1.0)
SAMPLES = 4
SEED = 17


def guidance(beta: float) -> GuidanceConfig:
    """Eight candidates of the likeliest 95%: a small model's tail at temperature 1 is gibberish."""
    return GuidanceConfig(beta=beta, top_k=8, top_p=0.95)


class Parts:
    """Results that were computed before are read from a file and not computed again."""

    def __init__(self, path: Path, log: Callable[[str], None]) -> None:
        self._path, self._log = path, log
        self._known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def __call__(self, name: str, compute: Callable[[], Any]) -> Any:
        if name not in self._known:
            self._known[name] = compute()
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(self._known))
            partial.replace(self._path)
            self._log(f"measured {name}")
        return self._known[name]


def measure(
    family: Family, parts: Parts, *, held_out: int | None = None, validation: int | None = None
) -> dict[str, Any]:
    """Figures by "policy_task"; of the first so many prompts, where that is given."""
    results = {}
    for policy in POLICIES:
        for task in smol.TASKS:
            run = _Run(family, parts, policy, task)
            results[f"{policy}_{task}"] = run.figures(
                run.prompts("held-out", held_out), run.prompts("validation", validation)
            )
    return results


class _Run:
    def __init__(self, family: Family, parts: Parts, policy: str, task: str) -> None:
        self.family, self.parts, self.policy, self.task = family, parts, policy, task

    def prompts(self, split: smol.Split, n: int | None) -> list[str]:
        every = smol.find_task(self.task).prompts(split)
        # Some of each topic's templates, not the first topics.
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0)).tolist()
        return [every[i] for i in order[: n or len(every)]]

    def figures(self, held_out: Sequence[str], validation: Sequence[str]) -> dict[str, Any]:
        beta = max(BETAS, key=lambda each: _mean(self.answers("validation", validation, each)))
        samples = [self.answers("held-out", held_out, None, draw=i) for i in range(SAMPLES)]
        guided = self.answers("held-out", held_out, beta)
        plain, earned = samples[0], guided.rewards
        gain, low, high = paired_bootstrap(earned, plain.rewards)
        best = [max(row) for row in zip(*(each.rewards for each in samples), strict=True)]
        by_critic = self.by_critic(held_out, samples)
        ahead = paired_bootstrap(earned, best)
        return {
            "prompts": len(held_out),
            "plain": _mean(plain),
            "guided": _mean(guided),
            "gain": gain,
            "gain_low": low,
            "gain_high": high,
            "beta": beta,
            "kl_per_token": guided.kl_per_token,
            "best_of_4_by_judge": sum(best) / len(best),
            "best_of_4_by_critic": sum(by_critic) / len(by_critic),
            "over_best_by_judge": ahead,
            "tokens_plain": plain.policy_tokens / len(held_out),
            "tokens_guided": (guided.policy_tokens + guided.scorer_tokens) / len(held_out),
            "tokens_best": sum(each.policy_tokens for each in samples) / len(held_out),
            "foresight": self.foresight(held_out, samples),
        }

    def answers(
        self, split: str, messages: Sequence[str], beta: float | None, draw: int = 0
    ) -> Answers:
        guided = None if beta is None else guidance(beta)
        name = f"{self.policy} {self.task} {split} {len(messages)} beta {beta} draw {draw}"
        found = self.parts(
            name,
            lambda: asdict(
                answer(
                    self.family, self.policy, self.task, messages, guided=guided, seed=SEED + draw
                )
            ),
        )
        return Answers(**found)

    def by_critic(self, messages: Sequence[str], samples: Sequence[Answers]) -> list[float]:
        """The rewards of the samples that the critic values most, read before EOS."""
        name = f"{self.policy} {self.task} held-out {len(messages)} ranks"
        ranked = self.parts(
            name,
            lambda: [
                values(self.family, messages, each.responses, 1.0).tolist() for each in samples
            ],
        )
        best = torch.tensor(ranked).argmax(0).tolist()
        return [samples[i].rewards[row] for row, i in enumerate(best)]

    def foresight(self, messages: Sequence[str], samples: Sequence[Answers]) -> dict[str, float]:
        """By the fraction of a plain response that is there, over all samples."""
        every = [reward for each in samples for reward in each.rewards]
        found = {}
        for fraction in FRACTIONS:
            name = f"{self.policy} {self.task} held-out {len(messages)} values at {fraction}"
            read = self.parts(
                name,
                lambda fraction=fraction: [
                    value
                    for each in samples
                    for value in values(self.family, messages, each.responses, fraction).tolist()
                ],
            )
            found[f"{fraction:.2f}"] = foresight(self.task, read, every)
        return found


def _mean(answers: Answers) -> float:
    return sum(answers.rewards) / len(answers.rewards)
