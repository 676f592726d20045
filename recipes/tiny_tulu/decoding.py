"""A plain batch decoder with look-ahead values, to measure models apart from the scorer.

The critic keeps an ordinary cache. Its candidates go through in one forward, side by side, under a
mask that shows each of them the prefix and itself; the chosen one's keys and values then stay.
The guidance is `guided_decode.guide`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from guided_decode import GuidanceConfig, Scores, guide, tiny_tulu
from guided_decode.forward.cache_argument import cache_argument
from guided_decode.guidance.candidates import select_candidates
from recipes.ppo.rollout import pad_left

MAX_NEW_TOKENS = 80


@dataclass(frozen=True)
class Decoded:
    """responses: token ids, EOS included. kl: KL(guided ‖ policy), nats, summed over a response."""

    responses: list[list[int]]
    texts: list[str]
    kl: Tensor  # float32 [rows]


class Reader:
    """A model that reads a left-padded batch token by token, with its cache."""

    def __init__(self, model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> None:
        self.model, self.mask, self.cache = model, mask, DynamicCache()
        self.positions = (mask.cumsum(-1) - 1).clamp(min=0)
        self.outputs = self._forward(tokens, mask, self.positions)[:, -1]
        self.next = self.positions[:, -1:] + 1

    def append(self, tokens: Tensor) -> None:
        """Read one more token a row, int64 [rows]; `outputs` then follows it."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.next)], dim=1)
        self.outputs = self._forward(tokens[:, None], self.mask, self.next)[:, -1]
        self.next = self.next + 1

    def look_ahead(self, candidates: Tensor) -> Tensor:
        """Outputs after each candidate, int64 [rows, k] -> [rows, k, labels]."""
        seen = self.mask.shape[1]
        k = candidates.shape[1]
        hidden = torch.ones(len(candidates), 1, k, seen + k, dtype=torch.bool)
        hidden[:, 0, :, :seen] = self.mask[:, None] == 0
        hidden[:, 0, :, seen:] = ~torch.eye(k, dtype=torch.bool)
        bias = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
        outputs = self._forward(candidates, bias, self.next.expand(-1, k))
        self.cache.crop(-k)
        return outputs

    def _forward(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        return self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{cache_argument(self.model): self.cache},
        ).logits


@torch.no_grad()
def decode(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[str],
    *,
    value_model: PreTrainedModel | None = None,
    config: GuidanceConfig | None = None,
    sample: bool = False,
    seed: int = 0,
) -> Decoded:
    """Answers to user messages: greedy or sampled at temperature 1, guided if a critic is given.

    Terminal rule "baseline": A = 0 for EOS.
    """
    inputs = pad_left(prompt_ids(tokenizer, messages), tokenizer.pad_token_id)
    reader = Reader(policy, *inputs)
    critic = Reader(value_model, *inputs) if value_model is not None else None
    generator = torch.Generator().manual_seed(seed)
    generated: list[Tensor] = []
    ended = torch.zeros(len(messages), dtype=torch.bool)
    kl = torch.zeros(len(messages))
    while not ended.all() and len(generated) < MAX_NEW_TOKENS:
        logits = reader.outputs
        if critic is not None and config is not None:
            logits = _guided(logits, critic, config, tokenizer.eos_token_id)
            kl += (~ended) * _kl(logits, reader.outputs)
        probabilities = logits.softmax(-1)
        drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        tokens = torch.where(ended, tokenizer.pad_token_id, drawn if sample else logits.argmax(-1))
        generated.append(tokens)
        ended |= tokens == tokenizer.eos_token_id
        for each in (reader, critic):
            if each is not None:
                each.append(tokens)
    rows = torch.stack(generated, dim=1).tolist()
    responses = [_until_eos(row, tokenizer.eos_token_id) for row in rows]
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    return Decoded(responses, texts, kl)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[str]) -> list[list[int]]:
    """Each message as the policy and the critic see it: in the chat format, without BOS."""
    chats = [tiny_tulu.render(message) for message in messages]
    return tokenizer(chats, add_special_tokens=False).input_ids


def _guided(logits: Tensor, critic: Reader, config: GuidanceConfig, eos_id: int) -> Tensor:
    candidates = select_candidates(logits, config.top_k, config.top_p)
    values = critic.look_ahead(candidates.clamp(min=0))[..., 0]
    scores = Scores(values.masked_fill(candidates < 0, torch.nan), critic.outputs[:, 0])
    return guide(logits, candidates, scores, config, exempt=candidates == eos_id)


def _kl(guided: Tensor, plain: Tensor) -> Tensor:
    """KL(guided ‖ plain) of the next token in nats, [rows, vocab] twice -> [rows]."""
    logp, logq = guided.log_softmax(-1), plain.log_softmax(-1)
    return torch.where(logp.isneginf(), 0.0, logp.exp() * (logp - logq)).sum(-1)


def _until_eos(tokens: list[int], eos_id: int) -> list[int]:
    return tokens[: tokens.index(eos_id) + 1] if eos_id in tokens else tokens
