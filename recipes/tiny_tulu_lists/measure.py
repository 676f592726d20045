"""How well the released models judge and guide, through the package's own scorers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from guided_decode import GuidanceConfig, load_scorer
from guided_decode.integrations.transformers import GuidedDecoding
from guided_decode.lab.intervals import wilson
from guided_decode.scorer import Scorer
from guided_decode.search import Judged, ScorerJudge
from guided_decode.tiny_tulu import lists, render
from recipes.tiny_tulu.metrics import paired_bootstrap
from recipes.tiny_tulu_lists.samples import exact

MAX_NEW_TOKENS = 48
BATCH, SEED = 300, 5
# Tried on the validation prompts; the first of equals. Logits a unit of the score.
VALIDATION, HELD_OUT = 100, 300
BETAS = {"reward": (2.0, 4.0), "dpo": (0.5, 1.0), "kto": (0.5, 1.0)}


class Family:
    """The models of a folder and the scorers that they make."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path / "sft")

    def policy(self, name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.path / name, dtype=torch.float32).eval()

    def scorer(self, name: str) -> Scorer:
        """The reward model, or the implicit reward of "dpo" or "kto" against the SFT policy."""
        if name == "reward":
            return load_scorer(self.path / name, policy_tokenizer=self.tokenizer)
        return load_scorer(
            self.path / name, "implicit", reference=self.path / "sft",
            policy_tokenizer=self.tokenizer,
        )  # fmt: skip

    def pair_scores(self, name: str, pairs: Sequence[lists.Pair]) -> list[tuple[float, float]]:
        """What a scorer says of both answers of each pair."""
        eos = self.tokenizer.eos_token_id
        judge = ScorerJudge(self.scorer(name), terminals=[eos])
        texts = [
            Judged(self._ids(render(pair.prompt)), (*self._ids(text), eos), True)
            for pair in pairs
            for text in (pair.chosen, pair.rejected)
        ]
        values = judge.judge(texts)
        return list(zip(values[::2], values[1::2], strict=True))

    def rewards(
        self, policy: Any, prompts: Sequence[str], scorer: Scorer | None = None,
        config: GuidanceConfig | None = None,
    ) -> list[float]:  # fmt: skip
        """The exact reward of a sample for each message, guided where a scorer is given."""
        more = {}
        if scorer is not None and config is not None:
            more["custom_generate"] = GuidedDecoding(scorer, config)
        tokenizer = self.tokenizer
        settings = GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        responses: list[str] = []
        torch.manual_seed(SEED)
        for begin in range(0, len(prompts), BATCH):
            chats = [render(prompt) for prompt in prompts[begin : begin + BATCH]]
            inputs = tokenizer(
                chats, add_special_tokens=False, padding=True, padding_side="left",
                return_tensors="pt",
            )  # fmt: skip
            output = policy.generate(**inputs, generation_config=settings, **more)
            answers = output[:, inputs["input_ids"].shape[1] :]
            responses += tokenizer.batch_decode(answers, skip_special_tokens=True)
        return exact(prompts, responses)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))


def config_of(name: str, beta: float) -> GuidanceConfig:
    """Guidance by a scorer: implicit rewards see the whole vocabulary, others four candidates."""
    return GuidanceConfig(beta=beta, top_k=4 if name == "reward" else None)


def measure(path: Path) -> dict[str, Any]:
    """Accuracy on held-out pairs, and mean exact rewards on held-out prompts."""
    family, pairs, prompts = Family(path), read_pairs(path), lists.held_out_prompts(HELD_OUT)
    sft = family.policy("sft")
    plain = family.rewards(sft, prompts)
    tuned = {name: family.rewards(family.policy(name), prompts) for name in ("dpo", "kto")}
    results: dict[str, Any] = {
        "pairs": len(pairs),
        "prompts": len(prompts),
        "best_possible": _mean(exact(prompts, [lists.best_answer(each) for each in prompts])),
        "sft": _mean(plain),
    }
    for name, rewards in tuned.items():
        results[name] = _gain(rewards, plain)
    for name in ("reward", "dpo", "kto"):
        won = sum(chosen > rejected for chosen, rejected in family.pair_scores(name, pairs))
        low, high = wilson(won, len(pairs))
        scorer = family.scorer(name)
        beta = choose_beta(family, sft, name, scorer)
        guided = family.rewards(sft, prompts, scorer, config_of(name, beta))
        results[f"by_{name}"] = {
            "pairs_ranked_right": won / len(pairs), "pairs_low": low, "pairs_high": high,
            "beta": beta, **_gain(guided, plain),
        }  # fmt: skip
    return results


def choose_beta(family: Family, policy: Any, name: str, scorer: Scorer) -> float:
    prompts = lists.validation_prompts(VALIDATION)

    def mean(beta: float) -> float:
        return _mean(family.rewards(policy, prompts, scorer, config_of(name, beta)))

    return max(BETAS[name], key=mean)


def read_pairs(path: Path) -> list[lists.Pair]:
    return lists.read_pairs(path / "held_out_pairs.jsonl")


def _gain(rewards: Sequence[float], plain: Sequence[float]) -> dict[str, float]:
    gain, low, high = paired_bootstrap(rewards, plain)
    return {"mean": _mean(rewards), "gain": gain, "gain_low": low, "gain_high": high}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
