"""What a run's adapters can do: settings from validation prompts, figures from held-out ones."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from guided_decode import GuidanceConfig, smol
from guided_decode.integrations.transformers import GuidedDecoding
from guided_decode.lab.demo.decoding import Models, answer, draw, pick, prompt_ids
from guided_decode.lab.demo.measure import Outcome
from guided_decode.lab.demo.methods import Method, best_of, reweight
from guided_decode.lab.demo.task import smol_task
from guided_decode.scoring.critic import CriticScorer
from recipes.smol.family import Family
from recipes.smol.metrics import foresight
from recipes.tiny_tulu.metrics import paired_bootstrap

BETAS = (4.0, 10.0, 20.0)  # logits per unit of reward
FRACTIONS = (0.25, 0.5, 0.75, 1.0)
SAMPLES = 4
BATCH = 40
SEED = 17
PLAIN = Method("plain, sampled", "")


def guided(beta: float) -> Method:
    """Eight candidates of the likeliest 95%: a small model's tail at temperature 1 is gibberish."""
    return reweight(GuidanceConfig(beta=beta, top_k=8, top_p=0.95))


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


@torch.no_grad()
def measure(
    family: Family, parts: Parts, *, held_out: int | None = None, validation: int | None = None
) -> dict[str, Any]:
    """Figures by task; of the first so many prompts, where that is given."""
    return {name: _Run(family, parts, name, held_out, validation).figures() for name in smol.TASKS}


class _Run:
    """One task. held_out, validation: how many prompts of each; None: all there are."""

    def __init__(
        self, family: Family, parts: Parts, name: str, held_out: int | None, validation: int | None
    ) -> None:
        self.name, self.family, self.parts = name, family, parts
        self.models = Models(
            family.plain, family.tokenizer, family.critic, GuidedDecoding, smol_task(name),
            family.trunk,
        )  # fmt: skip
        self.held_out = self.prompts("held-out", held_out)
        self.validation = self.prompts("validation", validation)

    def prompts(self, split: smol.Split, n: int | None) -> list[str]:
        every = smol.find_task(self.name).prompts(split)
        # Some of each topic's templates, not the first topics.
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0)).tolist()
        return [every[i] for i in order[: n or len(every)]]

    def figures(self) -> dict[str, Any]:
        beta = max(BETAS, key=lambda each: self.outcome(guided(each), on="validation").score)
        method = guided(beta)
        samples = self.samples()
        plain = self.ranked(samples, best_of(1))
        best = {by: self.ranked(samples, best_of(SAMPLES, by)) for by in ("critic", "judge")}
        ours, trunk = self.outcome(method), self.outcome(replace(method, by="trunk"))
        tuned = self.outcome(PLAIN, policy="ppo")
        return {
            "prompts": len(self.held_out),
            "beta": beta,
            "plain": plain.score,
            "ppo": tuned.score,
            "guided": ours.score,
            "trunk": trunk.score,
            "best_of_4_by_critic": best["critic"].score,
            "best_of_4_by_judge": best["judge"].score,
            "gain": _paired(ours, plain),
            "trunk_gain": _paired(trunk, plain),
            "ppo_gain": _paired(tuned, plain),
            "over_best_by_critic": _paired(ours, best["critic"]),
            "over_best_by_judge": _paired(ours, best["judge"]),
            "kl_per_token": ours.kl_per_token,
            "trunk_kl_per_token": trunk.kl_per_token,
            "tokens": {
                "plain": plain.tokens_per_answer,
                "guided": ours.tokens_per_answer,
                "trunk": trunk.tokens_per_answer,
                "best_of_4_by_critic": best["critic"].tokens_per_answer,
                "best_of_4_by_judge": best["judge"].tokens_per_answer,
            },
            "foresight": self.foresight(samples, self.family.critic, "critic"),
            "trunk_foresight": self.foresight(samples, self.family.trunk[0], "trunk"),
        }

    def outcome(self, method: Method, *, on: str = "held-out", policy: str = "sft") -> Outcome:
        """One answer a prompt; the policy as it was, or the one that PPO made of it."""
        messages = self.held_out if on == "held-out" else self.validation
        config = method.config
        beta = None if config is None else config.beta
        name = f"{self.name} {policy} {method.by} beta {beta}, {len(messages)} of {on}"
        found = self.parts(name, lambda: _fields(self._decode(messages, method, policy)))
        return Outcome(policy, method, messages=list(messages), task=self.models.task, **found)

    def _decode(self, messages: Sequence[str], method: Method, policy: str) -> Outcome:
        torch.manual_seed(SEED)
        outcome = Outcome(policy, method, task=self.models.task)
        # What an earlier call left there would make this one cheaper than it is.
        for scorer in (self.models.critic, self.family.trunk[0]):
            scorer.cache.clear()
        with self.family.policy(policy) as model:
            models = replace(self.models, policy=model)
            for batch in _batches(messages):
                outcome.add(batch, answer(models, batch, method), 0.0)
        return outcome

    def samples(self) -> list[list[list[int]]]:
        """Plain samples of each held-out prompt, token ids."""

        def drawn() -> list[list[list[int]]]:
            torch.manual_seed(SEED)
            return [
                own
                for batch in _batches(self.held_out)
                for own in draw(self.models, batch, SAMPLES)
            ]

        found: list[list[list[int]]] = self.parts(
            f"{self.name} {SAMPLES} samples, {len(self.held_out)} of held-out", drawn
        )
        return found

    def ranked(self, samples: Sequence[list[list[int]]], method: Method) -> Outcome:
        """The best of the first samples of each prompt."""

        def picked() -> Outcome:
            outcome = Outcome("sft", method, task=self.models.task)
            self.models.critic.cache.clear()
            for start in range(0, len(samples), BATCH):
                batch = self.held_out[start : start + BATCH]
                own = [row[: method.best_of] for row in samples[start : start + BATCH]]
                outcome.add(batch, pick(self.models, batch, own, method.by), 0.0)
            return outcome

        found = self.parts(
            f"{self.name} {method.name}, {len(samples)} of held-out", lambda: _fields(picked())
        )
        if method.best_of == 1:  # needs no ranking
            found |= {"scorer_tokens": 0}
        return Outcome("sft", method, messages=list(self.held_out), task=self.models.task, **found)

    def foresight(
        self, samples: Sequence[list[list[int]]], scorer: CriticScorer, by: str
    ) -> dict[str, float]:
        """By the fraction of a plain response that is there, over all samples."""
        messages = [message for message in self.held_out for _ in range(SAMPLES)]
        responses = [response for own in samples for response in own]
        texts = self.models.tokenizer.batch_decode(responses, skip_special_tokens=True)
        rewards = [self.models.task.judge(*pair) for pair in zip(messages, texts, strict=True)]
        prompts = prompt_ids(self.models, messages)

        def read(fraction: float) -> list[float]:
            # EOS never.
            rows = [
                prompt + row[: min(len(row) - 1, int(len(row) * fraction))]
                for prompt, row in zip(prompts, responses, strict=True)
            ]
            values: list[float] = []
            for start in range(0, len(rows), BATCH):
                batch = rows[start : start + BATCH]
                nothing = torch.empty(len(batch), 0, dtype=torch.int64)
                values += scorer.score(batch, nothing).baseline.tolist()
            return values

        return {
            f"{fraction:.2f}": foresight(
                self.name,
                self.parts(
                    f"{self.name} {by} at {fraction}, {len(samples)} of held-out",
                    lambda fraction=fraction: read(fraction),
                ),
                rewards,
            )
            for fraction in FRACTIONS
        }


def _paired(one: Outcome, other: Outcome) -> list[float]:
    """Mean difference over the same prompts, and its 95% interval."""
    return list(paired_bootstrap(one.judgements, other.judgements))


def _fields(outcome: Outcome) -> dict[str, Any]:
    names = ("texts", "responses", "kl", "policy_tokens", "scorer_tokens")
    return {name: getattr(outcome, name) for name in names}


def _batches(messages: Sequence[str]) -> list[list[str]]:
    return [list(messages[start : start + BATCH]) for start in range(0, len(messages), BATCH)]
