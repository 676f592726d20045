"""Four ways to decode the next token: plain, guided by us, and guided as others do it.

All of them forward the policy as `generate` does, one token a row on a DynamicCache, and choose the
largest logit. The guided ones share the choice of candidates and the guidance rule, and differ in
how the critic comes by its values.
"""

import copy
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LlamaModel

from guided_decode import GuidanceConfig, guide
from guided_decode.forward.cache_argument import cache_argument
from guided_decode.forward.packed_model import PackedModel
from guided_decode.guidance.rule import select_candidates
from guided_decode.integrations.transformers import ValueGuidedLogitsProcessor
from guided_decode.scorer import Scores
from guided_decode.scoring.critic import CriticScorer, ValueHead

EOS = 2


@dataclass(frozen=True)
class Shape:
    """The size of policy and critic."""

    layers: int = 12
    hidden: int = 512
    intermediate: int = 1376
    heads: int = 8
    vocab: int = 32_000


@dataclass(frozen=True)
class Models:
    """A random policy and critic in float32; the head reads the critic's last hidden state."""

    policy: LlamaForCausalLM
    critic: LlamaModel
    packed: PackedModel
    head: ValueHead

    @classmethod
    def random(cls, shape: Shape, cache_tokens: int, seed: int = 0) -> "Models":
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            max_position_embeddings=4096,
            eos_token_id=EOS,
        )
        policy = LlamaForCausalLM(copy.deepcopy(config)).eval()
        critic = LlamaModel(copy.deepcopy(config)).eval()
        for parameter in (*policy.parameters(), *critic.parameters()):
            parameter.requires_grad_(False)
        # No row ends while it is timed.
        policy.lm_head.weight[EOS] = 0.0
        # The same weights on a config of their own, which the packed model switches.
        twin = LlamaModel(copy.deepcopy(config)).eval().requires_grad_(False)
        twin.load_state_dict(critic.state_dict(), assign=True)
        packed = PackedModel(twin, "the random critic", cache_tokens=cache_tokens)
        weight = torch.randn(1, shape.hidden) / shape.hidden**0.5
        return cls(policy, critic, packed, ValueHead(weight, None, lambda x: x[:, 0]))


class Way(ABC):
    """One way to decode; its own policy cache, its own critic state."""

    def __init__(self, models: Models, prompts: Tensor) -> None:
        """prompts: int64 [batch, length], all but the last token of which are forwarded."""
        self.models = models
        self.ids = prompts
        self.cache = DynamicCache(config=models.policy.config)
        self._forward(prompts[:, :-1])

    def policy_logits(self) -> Tensor:
        """The policy's next-token logits, float32 [batch, vocab]; one token a row forwarded."""
        return self._forward(self.ids[:, -1:])

    def _forward(self, tokens: Tensor) -> Tensor:
        policy = self.models.policy
        cached = {cache_argument(policy): self.cache}
        return policy(tokens, logits_to_keep=1, **cached).logits[:, -1].float()

    @abstractmethod
    def next_logits(self) -> Tensor:
        """Logits that the next token is chosen by, [batch, vocab]."""

    def accept(self, tokens: Tensor) -> None:
        """Goes on with these tokens, int64 [batch]."""
        self.ids = torch.cat([self.ids, tokens[:, None]], -1)

    def seconds(self, steps: int) -> float:
        """Wall-clock seconds of one step, as the mean over so many."""
        begun = time.perf_counter()
        for _ in range(steps):
            self.accept(self.next_logits().argmax(-1))
        return (time.perf_counter() - begun) / steps


class Plain(Way):
    """The policy alone."""

    def next_logits(self) -> Tensor:
        return self.policy_logits()


class Ours(Way):
    """The package: its logits processor on its packed critic, with an empty cache at the start."""

    def __init__(self, models: Models, prompts: Tensor, config: GuidanceConfig) -> None:
        super().__init__(models, prompts)
        models.packed.cache.clear()
        self.processor = ValueGuidedLogitsProcessor(
            CriticScorer(models.packed, models.head),
            config,
            eos_token_id=EOS,
            attention_mask=torch.ones_like(prompts),
        )

    def next_logits(self) -> Tensor:
        return self.processor(self.ids, self.policy_logits())


class Copied(Way):
    """The critic's cache of each row copied for each candidate, one token forwarded on each copy.

    What ARGS and RAD do; the copy of the chosen candidate is kept for the next step.
    """

    def __init__(self, models: Models, prompts: Tensor, config: GuidanceConfig) -> None:
        super().__init__(models, prompts)
        self.config = config
        self.critic_cache = DynamicCache(config=models.critic.config)
        self.baseline = self._values(prompts)  # [batch]

    def next_logits(self) -> Tensor:
        logits = self.policy_logits()
        self.candidates = select_candidates(logits, self.config.top_k)
        batch, k = self.candidates.shape
        self.critic_cache.batch_repeat_interleave(k)
        self.values = self._values(self.candidates.view(-1, 1)).view(batch, k)
        return guide(logits, self.candidates, Scores(self.values, self.baseline), self.config)

    def _values(self, tokens: Tensor) -> Tensor:
        """V at the last of these tokens, which go into the critic's cache."""
        critic = self.models.critic
        cached = {cache_argument(critic): self.critic_cache}
        return self.models.head(critic(tokens, **cached).last_hidden_state[:, -1])

    def accept(self, tokens: Tensor) -> None:
        super().accept(tokens)
        rank = (self.candidates == tokens[:, None]).int().argmax(-1)
        batch, k = self.candidates.shape
        self.critic_cache.batch_select_indices(torch.arange(batch) * k + rank)
        self.baseline = self.values.gather(-1, rank[:, None])[:, 0]


class Recomputed(Way):
    """Prefix and candidate forwarded anew for each candidate, one row's candidates at a time.

    Rows are independent and their forwards large, so only the first `sample` rows are computed,
    and their seconds are scaled to the batch.
    """

    def __init__(
        self, models: Models, prompts: Tensor, config: GuidanceConfig, sample: int = 1
    ) -> None:
        super().__init__(models, prompts)
        self.config = config
        self.sample = min(sample, len(prompts))

    def next_logits(self) -> Tensor:
        """As of every way, but for the first `sample` rows only: [sample, vocab]."""
        return self.guide(self.policy_logits())

    def guide(self, logits: Tensor) -> Tensor:
        candidates = select_candidates(logits[: self.sample], self.config.top_k)
        scores = [self.row(ids, own) for ids, own in zip(self.ids, candidates, strict=False)]
        values, baseline = (torch.stack(parts) for parts in zip(*scores, strict=True))
        return guide(logits[: self.sample], candidates, Scores(values, baseline), self.config)

    def row(self, prefix: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """V after each candidate, [k], and V of the prefix, []."""
        sequences = torch.cat(
            [prefix.expand(len(candidates), -1), candidates[:, None]], dim=-1
        )  # [k, length + 1]
        hidden = self.models.critic(sequences, use_cache=False).last_hidden_state
        values = self.models.head(hidden[:, -2:].flatten(0, 1)).view(-1, 2)
        return values[:, 1], values[0, 0]

    def seconds(self, steps: int) -> float:
        """As of every way; the same step again and again, on the prefix where it stands."""
        total = 0.0
        for _ in range(steps):
            begun = time.perf_counter()
            logits = self.policy_logits()
            chosen = time.perf_counter()
            self.guide(logits)
            scored = (time.perf_counter() - chosen) * len(self.ids) / self.sample
            total += chosen - begun + scored
            self.cache.crop(-1)
        return total / steps
