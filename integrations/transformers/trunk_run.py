"""One `generate` call of the trunk's own decoding loop: its rows, and a step of them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from guided_decode.guidance import failed_rows
from guided_decode.guidance.candidates import gated_rows
from guided_decode.guidance.config import GuidanceConfig, OnError
from guided_decode.guidance.rule import distinct
from guided_decode.guidance.step import guide_rows
from guided_decode.guidance.value_trail import ValueTrail
from guided_decode.integrations.transformers.custom_generate import split_processors, terminal_ids
from guided_decode.integrations.transformers.value_record import GuidedOutput, ValueRecord
from guided_decode.prefix import PrefixHandle
from guided_decode.scoring.next_logits import NextLogits
from guided_decode.scoring.trunk_scorer import TrunkScorer


@dataclass
class TrunkLookaheadOutput(GuidedOutput):
    """What `generate` returns with return_dict_in_generate; there is no cache in it, and always
    prefix_values."""


class TrunkRun:
    """The rows of one call, from their prompts to their ends."""

    def __init__(
        self,
        scorer: TrunkScorer,
        configs: Sequence[GuidanceConfig],  # one a row
        logits_of: NextLogits,
        input_ids: Tensor,  # [rows, width] int64, left-padded
        lengths: Sequence[int],
        processors: LogitsProcessorList,
        options: GenerationConfig,
        *,
        on_error: OnError,
        streamer: BaseStreamer | None,
        listens: bool = False,
    ) -> None:
        self.scorer = scorer
        self.configs = configs
        # What guides a row that is scored, and one that a gate lets pass.
        self.scoring = _each(configs, _without_gates)
        self.unscored = _each(configs, _without_scores)
        self.gates = [
            config.gate if config.gate is not None and config.needs_scores else torch.inf
            for config in configs
        ]
        self.logits_of = logits_of
        self.before, self.after = split_processors(processors)
        self.options = options
        self.terminals = terminal_ids(options)
        self.on_error: OnError = on_error
        self.streamer = streamer
        self.ids = input_ids
        self.handles = [
            PrefixHandle(row[len(row) - length :])
            for row, length in zip(input_ids.tolist(), lengths, strict=True)
        ]
        self.width = input_ids.shape[1]
        self.trails = [ValueTrail(len(each), listens=listens) for each in self.handles]
        self.record = ValueRecord() if listens else None
        self.abstains = any(config.abstain is not None for config in configs)
        self.ended_at = torch.full((len(input_ids),), -1)
        self.live = list(range(len(input_ids)))
        # Of finished rows, the last ones that they had.
        self.logits = torch.empty(0, dtype=torch.float32)
        self.scores: list[Tensor] = []
        self.raw: list[Tensor] = []
        self.values: list[Tensor] = []

    def until(self, criteria: StoppingCriteriaList) -> TrunkLookaheadOutput:
        """Decodes until the criteria have finished every row."""
        # Without an EOS nothing pads a row that another criterion finished: it goes on.
        pad = self.options._pad_token_tensor
        pads = pad is not None and any(hasattr(each, "eos_token_id") for each in criteria)
        finished = torch.zeros(len(self.ids), dtype=torch.bool, device=self.ids.device)
        while self.live:
            self._read()
            if self.abstains and self._all_abstain(finished, pads=pads):
                break
            tokens = self._step()
            if pads and pad is not None:
                tokens = torch.where(finished, pad.to(tokens.device), tokens)
            self.ids = torch.cat([self.ids, tokens[:, None]], -1)
            if self.streamer is not None:
                self.streamer.put(tokens.cpu())
            finished |= criteria(self.ids, tuple(self.scores) or None)  # type: ignore[arg-type]
            chosen, done = torch.stack([tokens, finished.long()]).tolist()
            for i in self.live:
                self.handles[i].append(chosen[i])
            if pads or all(done):
                self.live = [i for i in self.live if not done[i]]
        self.scorer.cache.drop_candidates()
        return self._output()

    def _all_abstain(self, finished: Tensor, *, pads: bool) -> bool:
        """Ends the rows whose value is too low, as `AbstentionCriteria`; whether none is left.

        finished: bool [rows], who was finished before; now these too.
        """
        tokens = self.ids.shape[1] - self.width
        values, done = self.values[-1].tolist(), finished.tolist()
        due = [i for i in self.live if not done[i] and self.configs[i].abstains_at(tokens)]
        unread = [i for i in due if not math.isfinite(values[i])]
        if unread:
            reason = failed_rows.no_value(len(unread), len(due))
            if self.on_error == "raise":
                raise ValueError(reason)
            failed_rows.count(self.scorer, len(unread), reason)
        ended = [i for i in due if i not in unread and self.configs[i].ends(values[i], tokens)]
        if not ended:
            return False
        self.ended_at[ended] = tokens
        finished[ended] = True
        self.values[-1][ended] = torch.nan
        if pads or bool(finished.all()):
            self.live = [i for i in self.live if i not in ended and not done[i]]
        if not self.live:
            self.values.pop()
        return not self.live

    def _output(self) -> TrunkLookaheadOutput:
        advantages = None
        if self.record is not None:
            _, advantages = self.record.of(self.ids[:, self.width :])
        return TrunkLookaheadOutput(
            advantages=advantages,
            abstained_at=self.ended_at.to(self.ids.device) if self.abstains else None,
            sequences=self.ids,  # type: ignore[arg-type]
            scores=tuple(self.scores) or None,  # type: ignore[arg-type]
            logits=tuple(self.raw) or None,  # type: ignore[arg-type]
            prefix_values=torch.stack(self.values, -1),
        )

    def _step(self) -> Tensor:
        """The next token of each row, int64 [rows]; any for finished ones."""
        scores = self.logits
        if self.before:
            # Processors may write to what they are given.
            scores = self.before(self.ids, scores.clone())  # type: ignore[arg-type]
        # Drawn for all rows at once, as torch.multinomial does: beside which others a row is
        # chosen then changes nothing.
        noise = torch.empty_like(scores).exponential_(1) if self.options.do_sample else None
        gated = self._gated(scores)
        everyone = list(range(len(scores)))
        if gated:
            processed, tokens = torch.empty_like(scores), torch.empty_like(self.ids[:, 0])
            others = sorted(set(everyone) - set(gated))
            for rows, configs in ((gated, self.unscored), (others, self.scoring)):
                if rows:
                    processed[rows] = self._guided(scores, rows, configs)
                    tokens[rows] = _choose(processed[rows], None if noise is None else noise[rows])
                if rows is gated:
                    self._ride(gated, tokens)
        else:
            processed = self._guided(scores, everyone, self.scoring)
            tokens = _choose(processed, noise)
        if self.record is not None:
            self.record.note(self.live, [self.trails[i] for i in self.live])
        if self.options.output_scores:
            self.scores.append(processed)
        if self.options.output_logits:
            self.raw.append(self.logits.clone())
        return tokens

    def _read(self) -> None:
        """Logits and values after each live row, of hidden states that the last step computed."""
        hidden, values = self.scorer.read([self.handles[i] for i in self.live])
        logits = self.logits_of(hidden).float()
        every = values.new_full((len(self.ids),), torch.nan)
        # An index by a list would wait for the device.
        at = torch.tensor(self.live).to(values.device, non_blocking=True)
        self.values.append(every.index_copy_(0, at, values))
        if len(self.live) == len(self.ids):
            self.logits = logits
        else:
            self.logits.index_copy_(0, at, logits)

    def _gated(self, scores: Tensor) -> list[int]:
        """Live rows that a gate lets pass: their token is chosen before the forward."""
        gates = [self.gates[i] for i in self.live]
        hits = [False] * len(gates)
        if min(gates) < torch.inf:
            hits = gated_rows(scores[self.live], gates).tolist()
        if any(self.configs[i].has_value_gate for i in self.live):
            hits = [hit or shut for hit, shut in zip(hits, self._shut(), strict=True)]
        gated = [i for i, hit in zip(self.live, hits, strict=True) if hit]
        self.scorer.stats.add(rows_gated=len(gated))
        return gated

    def _shut(self) -> list[bool]:
        """Of which live rows the value gate is shut; one whose value is no number is scored, which
        fails as it would without a gate."""
        now = self.values[-1].tolist()
        before = self.values[-2].tolist() if len(self.values) > 1 else [torch.nan] * len(now)
        return [
            math.isfinite(now[i]) and not self.configs[i].is_open(now[i], before[i])
            for i in self.live
        ]

    def _guided(self, scores: Tensor, rows: list[int], configs: Sequence[GuidanceConfig]) -> Tensor:
        """Guided and processed scores of some rows, [n, vocab]; finished ones are not guided."""
        alive = set(self.live)
        own = [i for i in rows if i in alive]
        handles, trails = [self.handles[i] for i in own], [self.trails[i] for i in own]
        own_configs = [configs[i] for i in own]
        guide = partial(guide_rows, self.scorer, terminals=self.terminals, on_error=self.on_error)
        if len(own) == len(scores):
            guided, ids = guide(scores, handles, own_configs, trails=trails), self.ids
        else:
            guided, ids = scores[rows], self.ids[rows]
            if own:
                places = [place for place, i in enumerate(rows) if i in alive]
                guided[places] = guide(scores[own], handles, own_configs, trails=trails)
        processed: Tensor = self.after(ids, guided)  # type: ignore[arg-type]
        return processed

    def _ride(self, gated: list[int], tokens: Tensor) -> None:
        """Lets gated rows' tokens go through the policy with the others' candidates."""
        for i, token in zip(gated, tokens[gated].tolist(), strict=True):
            if token not in self.terminals:
                self.scorer.ride(self.handles[i], token)


def _each(
    configs: Sequence[GuidanceConfig], change: Callable[[GuidanceConfig], GuidanceConfig]
) -> list[GuidanceConfig]:
    """The configs changed; rows that share one go on sharing it."""
    changed = {config: change(config) for config in distinct(configs)}
    return [changed[config] for config in configs]


def _without_gates(config: GuidanceConfig) -> GuidanceConfig:
    """What the config does to a row that is scored; who is, and who is ended, is known by then."""
    return replace(
        config, gate=None, value_gate=None, value_gate_fall=None, abstain=None, abstain_after=None
    )


def _without_scores(config: GuidanceConfig) -> GuidanceConfig:
    """What the config does to a gated row: A = 0 for every candidate, and its tail rule."""
    return replace(_without_gates(config), rule="reweight", margin=None, beta=0.0, kl_coef=0.0)


def _choose(scores: Tensor, noise: Tensor | None) -> Tensor:
    """The largest, or with exponential noise a sample of the softmax: int64 [rows]."""
    return (scores if noise is None else scores.softmax(-1) / noise).argmax(-1)
