"""What a set of models can do: beta and k from the validation set, figures from the held-out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from guided_decode import GuidanceConfig, tiny_tulu
from recipes.ppo.rollout import pad_left
from recipes.tiny_tulu.decoding import Decoded, decode, prompt_ids
from recipes.tiny_tulu.metrics import auc, paired_bootstrap

BETAS = (2.0, 4.0, 6.0, 10.0)  # logits per unit of reward
TOP_KS = (4, 2, 8)  # beta is chosen at the first
VALIDATION = 300
SAMPLING_SEED = 17


@dataclass(frozen=True)
class Family:
    """The released models of one training seed, float32."""

    tokenizer: Any
    sft: Any
    ppo: Any
    value: Any

    @classmethod
    def load(cls, path: Path) -> "Family":
        def policy(name: str) -> Any:
            return AutoModelForCausalLM.from_pretrained(path / name, dtype=torch.float32)

        value = AutoModelForTokenClassification.from_pretrained(path / "value", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path / "sft")
        return cls(tokenizer, policy("sft"), policy("ppo"), value)


def measure(path: Path, log: Callable[[str], None], *, held_out: int = 1_000) -> dict[str, Any]:
    """Figures of the models in `path`; accuracies are fractions of the held-out prompts."""
    family = Family.load(path)
    results: dict[str, Any] = {"held_out": held_out}
    for name in ("sft", "ppo"):
        for sample in (False, True):
            key = f"{name}_{'sampled' if sample else 'greedy'}"
            results[key] = compare(family, name, sample, held_out)
            log(f"{key}: {results[key]}")
    return results


def compare(family: Family, name: str, sample: bool, held_out: int) -> dict[str, Any]:
    """One policy with and without guidance by the value model, greedy or at temperature 1."""
    policy = getattr(family, name)
    config = choose(family, name, sample)
    messages = tiny_tulu.held_out_prompts(held_out)

    def run(guided: GuidanceConfig | None) -> Decoded:
        return decode(
            policy,
            family.tokenizer,
            messages,
            value_model=family.value,
            config=guided,
            sample=sample,
            seed=SAMPLING_SEED,
        )

    plain, guided = run(None), run(config)
    right, right_guided = outcomes(messages, plain), outcomes(messages, guided)
    gain, low, high = paired_bootstrap(right_guided, right)
    results = {
        "beta": config.beta,
        "top_k": config.top_k,
        "accuracy": right.mean().item(),
        "guided": right_guided.mean().item(),
        "gain": gain,
        "gain_low": low,
        "gain_high": high,
        "kl_per_token": guided.kl.sum().item() / sum(map(len, guided.responses)),
    }
    if sample:  # greedy responses are one a prompt: V could tell right from wrong by the prompt
        results["auc_half"] = value_auc(family, messages, plain, right, fraction=0.5)
        results["auc_end"] = value_auc(family, messages, plain, right, fraction=1.0)
    return results


def choose(family: Family, name: str, sample: bool) -> GuidanceConfig:
    """The beta, then the k, with the best accuracy on the validation set; the first of equals."""
    messages = tiny_tulu.validation_prompts(VALIDATION)

    def accuracy(config: GuidanceConfig) -> float:
        decoded = decode(
            getattr(family, name),
            family.tokenizer,
            messages,
            value_model=family.value,
            config=config,
            sample=sample,
            seed=SAMPLING_SEED,
        )
        return outcomes(messages, decoded).mean().item()

    best = max((GuidanceConfig(beta=beta, top_k=TOP_KS[0]) for beta in BETAS), key=accuracy)
    return max((GuidanceConfig(beta=best.beta, top_k=k) for k in TOP_KS), key=accuracy)


def outcomes(messages: Sequence[str], decoded: Decoded) -> Tensor:
    """1.0 where the answer is right, float32 [rows]."""
    pairs = zip(messages, decoded.texts, strict=True)
    return torch.tensor([float(tiny_tulu.is_correct(p, r)) for p, r in pairs])


def value_auc(
    family: Family, messages: Sequence[str], decoded: Decoded, right: Tensor, fraction: float
) -> float:
    """AUC of V, read when `fraction` of a response is there (EOS never is), for its outcome."""
    prefixes = partial_responses(family, messages, decoded, fraction)
    return auc(last_values(family, prefixes), right)


def partial_responses(
    family: Family, messages: Sequence[str], decoded: Decoded, fraction: float
) -> list[list[int]]:
    """Token ids of each prompt and the first `fraction` of its response; EOS never is there."""
    prompts = prompt_ids(family.tokenizer, messages)
    return [
        prompt + response[: min(len(response) - 1, int(len(response) * fraction))]
        for prompt, response in zip(prompts, decoded.responses, strict=True)
    ]


@torch.no_grad()
def last_values(family: Family, prefixes: Sequence[list[int]], batch_size: int = 250) -> Tensor:
    """V at the last token of each prefix, float32 [rows]."""
    values = []
    for start in range(0, len(prefixes), batch_size):
        rows = prefixes[start : start + batch_size]
        tokens, mask = pad_left(rows, family.tokenizer.pad_token_id)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        outputs = family.value(input_ids=tokens, attention_mask=mask, position_ids=positions)
        values.append(outputs.logits[:, -1, 0])
    return torch.cat(values)
