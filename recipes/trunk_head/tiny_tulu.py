"""The recipe on tiny-tulu: heads on its two policies, beside the critic of its PPO run."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from guided_decode import GuidanceConfig, load_scorer, tiny_tulu
from guided_decode.checkpoints.checkpoint import load_checkpoint
from guided_decode.integrations.transformers import GuidedDecoding, TrunkLookahead
from guided_decode.scorer import Scorer
from guided_decode.scoring.trunk_head import TrunkHead
from recipes.ppo.rollout import pad_left
from recipes.tiny_tulu.decoding import MAX_NEW_TOKENS, decode, prompt_ids
from recipes.tiny_tulu.measure import (
    SAMPLING_SEED,
    Family,
    last_values,
    outcomes,
    partial_responses,
)
from recipes.tiny_tulu.metrics import auc
from recipes.trunk_head.readings import critic_targets
from recipes.trunk_head.rollouts import Rollout

POLICIES = ("sft", "ppo")
BETAS = (5.0, 10.0, 20.0, 40.0)
TOP_K = 4
VALIDATION, GUIDED = 100, 500


def load_family() -> Family:
    """The embedded models, float32."""
    return Family.load(tiny_tulu.model_path("sft").parent)


def sample_rollouts(
    family: Family, policy: PreTrainedModel, count: int, seed: int, batch_size: int = 500
) -> list[Rollout]:
    """Responses at temperature 1 to training prompts; reward 1 for a right sum, 0 for another."""
    messages = tiny_tulu.training_prompts(count, seed=seed + 2_000)
    rollouts = []
    for start in range(0, count, batch_size):
        part = messages[start : start + batch_size]
        decoded = decode(policy, family.tokenizer, part, sample=True, seed=seed + start)
        rows = zip(
            prompt_ids(family.tokenizer, part),
            decoded.responses,
            outcomes(part, decoded).tolist(),
            strict=True,
        )
        rollouts += [Rollout(prompt, response, reward) for prompt, response, reward in rows]
    return rollouts


def critic_values(rollouts: Sequence[Rollout]) -> Tensor:
    """V of the embedded critic along rollouts, float32 [tokens]."""
    return critic_targets(load_checkpoint(tiny_tulu.model_path("value")), rollouts)


def rounded(head: TrunkHead) -> TrunkHead:
    """The head as it is released: its weights in bf16, as those of the models."""
    inner = head.inner
    if inner is not None:
        inner = replace(inner, weight=inner.weight.bfloat16(), bias=_rounded(inner.bias))
    return replace(head, weight=head.weight.bfloat16(), bias=_rounded(head.bias), inner=inner)


def _rounded(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.bfloat16()


def measure(
    family: Family, name: str, heads: dict[str, TrunkHead], log: Callable[[str], None]
) -> dict[str, Any]:
    """AUC of each head and of the critic, and accuracy with their guidance; held-out prompts."""
    policy = getattr(family, name)
    messages = tiny_tulu.held_out_prompts()
    sampled = decode(policy, family.tokenizer, messages, sample=True, seed=SAMPLING_SEED)
    right = outcomes(messages, sampled)
    greedy = decode(policy, family.tokenizer, messages[:GUIDED])
    results: dict[str, Any] = {
        "sampled": right.mean().item(),
        "greedy": outcomes(messages[:GUIDED], greedy).mean().item(),
    }
    log(f"{name}: {results}")
    scorers: dict[str, Scorer] = {"critic": load_scorer(tiny_tulu.model_path("value"))}
    scorers |= {key: load_scorer(policy, "trunk-head", head=head) for key, head in heads.items()}
    for key, scorer in scorers.items():
        figures = {}
        for label, fraction in (("auc_half", 0.5), ("auc_end", 1.0)):
            prefixes = partial_responses(family, messages, sampled, fraction)
            values = (
                last_values(family, prefixes)
                if key == "critic"
                else head_values(policy, heads[key], prefixes)
            )
            figures[label] = auc(values, right)
        figures |= guided(family, policy, scorer)
        log(f"{name} {key}: {figures}")
        results[key] = figures
    return results


@torch.no_grad()
def head_values(
    policy: PreTrainedModel, head: TrunkHead, prefixes: Sequence[list[int]], batch_size: int = 250
) -> Tensor:
    """V of a head at the last token of each prefix, float32 [rows]."""
    values = []
    for start in range(0, len(prefixes), batch_size):
        tokens, mask = pad_left(prefixes[start : start + batch_size], 0)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        output = policy.base_model(input_ids=tokens, attention_mask=mask, position_ids=positions)
        values.append(head(output.last_hidden_state[:, -1]))
    return torch.cat(values)


def guided(family: Family, policy: PreTrainedModel, scorer: Scorer) -> dict[str, float]:
    """Accuracy of greedy guided answers, at the beta that does best on validation prompts."""

    def accuracy(messages: Sequence[str], beta: float) -> float:
        return guided_accuracy(family, policy, scorer, messages, beta)

    validation = tiny_tulu.validation_prompts(VALIDATION)
    beta = max(BETAS, key=lambda each: accuracy(validation, each))
    return {"beta": beta, "guided": accuracy(tiny_tulu.held_out_prompts(GUIDED), beta)}


def guided_accuracy(
    family: Family,
    policy: PreTrainedModel,
    scorer: Scorer,
    messages: Sequence[str],
    beta: float,
    batch_size: int = 100,
) -> float:
    """The share of right sums among greedy guided answers."""
    config = GuidanceConfig(beta=beta, top_k=TOP_K)
    is_trunk = getattr(scorer, "trunk_head", None) is not None
    loop = (TrunkLookahead if is_trunk else GuidedDecoding)(scorer, config)
    right = 0
    for start in range(0, len(messages), batch_size):
        part = messages[start : start + batch_size]
        ids, mask = pad_left(prompt_ids(family.tokenizer, part), family.tokenizer.pad_token_id)
        generator: Any = policy
        output = generator.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            custom_generate=loop,
        )
        texts = family.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        right += sum(map(tiny_tulu.is_correct, part, texts))
    return right / len(messages)
