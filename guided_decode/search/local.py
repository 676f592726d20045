"""Continuations by a policy on this machine, over one prefix cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from guided_decode.checkpoints.checkpoint import load_causal_lm
from guided_decode.checkpoints.loading_options import LoadingOptions, packed_model
from guided_decode.checkpoints.precision import (
    Device,
    DType,
    read_device,
    read_dtype,
    settled_dtype,
)
from guided_decode.checkpoints.source import ModelLike, open_source
from guided_decode.checkpoints.tokenizer_files import load_tokenizer
from guided_decode.forward.modes import without_autograd
from guided_decode.kernels.sample_tokens import sample_tokens
from guided_decode.prefix import PrefixHandle
from guided_decode.scoring.implicit import LanguageModel
from guided_decode.search.likeliest import likeliest
from guided_decode.search.policy_text import PolicyText
from guided_decode.search.requests import Continuation, NextTokens, Reason, Sampling
from guided_decode.search.seeds import derive
from guided_decode.search.stop_strings import StopStrings
from guided_decode.stats import ScorerStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LocalGenerator(PolicyText):
    """A causal LM whose branches share what they have in common.

    Continuations go through the packed forward that scorers use, on one slot pool with a radix
    tree: a token of the search's tree is forwarded once, whoever asks for it again. What is drawn
    is a function of the seed, the continuation's number and the position (Gumbel-max with
    counter-based noise), so that neither batch nor order changes a response, up to the rounding of
    logits.
    """

    def __init__(
        self,
        policy: LanguageModel,
        *,
        eos_token_ids: Collection[int],
        tokenizer: PreTrainedTokenizerBase | None = None,
        reference: LanguageModel | None = None,
    ) -> None:
        """
        Args:
            policy: what is decoded; see `load_generator`.
            eos_token_ids: what ends a response.
            tokenizer: for stop strings.
            reference: the model that KL terms compare the policy with.

        Raises ValueError: the reference has another vocabulary.
        """
        if reference is not None and reference.model.vocab_size != policy.model.vocab_size:
            raise ValueError(
                f"{policy.model.name} has a vocabulary of {policy.model.vocab_size} tokens but its "
                f"reference {reference.model.name} has {reference.model.vocab_size}: they must "
                "share their token ids"
            )
        super().__init__(tokenizer, eos_token_ids)
        self.policy = policy
        self.reference = reference

    @property
    def stats(self) -> ScorerStats:
        """Counters of the policy's forwards."""
        return self.policy.stats

    def extend(
        self,
        prefixes: Sequence[Sequence[int]],
        n: Sequence[int],
        *,
        max_tokens: Sequence[int],
        sampling: Sequence[Sampling],
        seeds: Sequence[int],
    ) -> list[list[Continuation]]:
        """As `requests.Generator.extend`.

        Raises ValueError: an empty prefix, a token outside the vocabulary, more tokens than the
        policy has positions; stop strings without a tokenizer.
        """
        rows = [
            [
                self._begin(prefix, derive(seed, number), most, how)
                for number in range(count)
            ]
            for prefix, count, most, how, seed in zip(
                prefixes, n, max_tokens, sampling, seeds, strict=True
            )
        ]  # fmt: skip
        running = [row for own in rows for row in own if row.max_tokens > 0]
        while running:
            self._step(running)
            running = [row for row in running if row.reason is None]
        return [[row.continuation() for row in own] for own in rows]

    def next_tokens(
        self,
        prefixes: Sequence[Sequence[int]],
        k: Sequence[int],
        *,
        temperatures: Sequence[float],
        references: Sequence[bool],
        entropies: Sequence[bool] | None = None,
    ) -> list[NextTokens]:
        """As `requests.TokenGenerator.next_tokens`; entropies come whether they are wanted or not.

        Raises ValueError: as `extend`, of prefixes; a reference is wanted and there is none.
        """
        logits = self.policy.next_logits(prefixes)
        others, rows = None, [i for i, wanted in enumerate(references) if wanted]
        if rows:
            if self.reference is None:
                raise ValueError(
                    "a KL term needs the reference's log-probabilities: pass "
                    "load_generator(..., reference=), the model that the policy was tuned from"
                )
            found = self.reference.next_logits([prefixes[i] for i in rows]).to(logits.device)
            others = logits.new_full(logits.shape, torch.nan)
            others[rows] = found
        return likeliest(logits, others, k, temperatures, self.eos_token_ids)

    def _begin(self, prefix: Sequence[int], seed: int, most: int, how: Sampling) -> _Row:
        stops = None
        if how.stop:
            stops = StopStrings(self._text(), how.stop)
        return _Row(PrefixHandle(prefix), seed, most, how, stops)

    def _step(self, rows: Sequence[_Row]) -> None:
        logits = self.policy.next_logits([row.handle for row in rows])
        tokens = draw(logits, rows)
        taken = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        for row, token, log_prob in zip(rows, tokens.tolist(), taken.tolist(), strict=True):
            row.append(token, log_prob, self.eos_token_ids)


@dataclass(slots=True)
class _Row:
    handle: PrefixHandle
    seed: int
    max_tokens: int
    sampling: Sampling
    stops: StopStrings | None
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    reason: Reason | None = None

    def append(self, token: int, log_prob: float, ends: Collection[int]) -> None:
        self.handle.append(token)
        self.tokens.append(token)
        self.log_probs.append(log_prob)
        if token in ends:
            self.reason = "eos"
        elif self.stops is not None and self.stops.completed(self.tokens):
            self.reason = "stop"
        elif len(self.tokens) >= self.max_tokens:
            self.reason = "length"

    def continuation(self) -> Continuation:
        return Continuation(tuple(self.tokens), tuple(self.log_probs), self.reason or "length")


def draw(logits: Tensor, rows: Sequence[_Row]) -> Tensor:
    """The next token of each row, int64 [rows]: by Gumbel-max, the largest logit where greedy."""
    device = logits.device
    heat = torch.tensor([row.sampling.temperature for row in rows]).to(device)
    if any(row.sampling.top_p < 1.0 for row in rows):
        most = torch.tensor([row.sampling.top_p for row in rows]).to(device)
        scaled = logits / heat.masked_fill(heat == 0, 1.0)[:, None]
        logits = logits.masked_fill(outside_mass(scaled, most[:, None]), -torch.inf)
    seeds = torch.tensor([row.seed for row in rows]).to(device)
    positions = torch.tensor([len(row.handle) for row in rows]).to(device)
    return sample_tokens(logits, heat, seeds, positions)


def outside_mass(logits: Tensor, mass: Tensor) -> Tensor:
    """What is not in the smallest set of largest logits that reaches `mass`, [rows, 1]: bool
    [rows, vocab]."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    share = ordered.softmax(-1)
    # What comes before a token: the token that reaches the mass is still in.
    out = (share.cumsum(-1) - share >= mass) & (mass < 1.0)
    out[:, 0] = False
    return torch.zeros_like(out).scatter(-1, order, out)


@without_autograd
def load_generator(
    policy: ModelLike,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    eos_token_ids: Collection[int] | None = None,
    reference: ModelLike | None = None,
    device: Device | None = None,
    dtype: DType | None = None,
    cache_tokens: int | None = None,
    max_forward_tokens: int = 8192,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LocalGenerator:
    """A policy that writes continuations on this machine.

    Args:
        policy: a registered name, a Hub id, a local path, or a causal LM of transformers in memory,
            whose weights are then shared and which is not changed; with PEFT adapters as of
            `load_scorer`.
        tokenizer: the policy's, for stop strings; None: the one beside a path's weights.
        eos_token_ids: what ends a response; None: what the policy's generation config says.
        reference: the model that KL terms compare the policy with; as `policy`.
        device, dtype, cache_tokens, max_forward_tokens, revision, trust_remote_code: as of
            `load_scorer`.

    Raises ValueError: as `load_scorer`; nothing says what ends a response; the reference has
    another vocabulary.
    """
    on = read_device(device)
    options = LoadingOptions(
        device=on, dtype=settled_dtype(policy, on, read_dtype(dtype)), revision=revision,
        allow_pickle=False, trust_remote_code=trust_remote_code, rope_theta=None,
        cache_tokens=cache_tokens, live_tokens=None, max_forward_tokens=max_forward_tokens,
        policy_tokenizer=None,
    )  # fmt: skip
    source = open_source(policy, **options.of_files)
    model = load_causal_lm(policy, **options.of_weights)
    tokenizer = tokenizer or load_tokenizer(source)
    if eos_token_ids is None:
        eos_token_ids = _ends(model, tokenizer)
    if not eos_token_ids:
        raise ValueError(
            f"{source.name} names no end-of-sequence token: pass eos_token_ids=, the ids that end "
            "a response"
        )
    other = None
    if reference is not None:
        of_reference = replace(options, dtype=settled_dtype(reference, on, read_dtype(dtype)))
        own = load_causal_lm(reference, **of_reference.of_weights)
        name = open_source(reference, **of_reference.of_files).name
        other = LanguageModel(packed_model(own, name, of_reference))
    return LocalGenerator(
        LanguageModel(packed_model(model, source.name, options)),
        eos_token_ids=eos_token_ids, tokenizer=tokenizer, reference=other,
    )  # fmt: skip


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> set[int]:
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = own if isinstance(own, list) else [own]
    ids = [*ids, None if tokenizer is None else tokenizer.eos_token_id]
    return {each for each in ids if each is not None}
