"""Implicit rewards: what a tuned policy prefers over its reference, token by token."""

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from guided_decode.cache.one_process import OneProcess
from guided_decode.cache.prefix_cache import Placement, PrefixCache
from guided_decode.forward.graphs import GraphedForward
from guided_decode.forward.modes import without_autograd
from guided_decode.forward.packed import Segments
from guided_decode.forward.packed_model import PackedModel, Row
from guided_decode.scorer import LogProbs, Prefix, Scorer, Scores, TerminalRule
from guided_decode.scoring.asked import check_asked
from guided_decode.scoring.closing import Closing
from guided_decode.scoring.graphed_logits import GraphedLogits
from guided_decode.stats import ScorerStats

# Logits of one part of a call, 512 MiB: a judge asks about all tokens of all responses at once.
_MOST_LOGITS = 1 << 27


class LanguageModel(OneProcess):
    """A causal LM read for log-probabilities after prefixes, with a prefix cache of its own.

    Threads may share it, and a model in memory is followed, as by `CriticScorer`.
    """

    def __init__(
        self,
        model: PackedModel,
        stats: ScorerStats | None = None,
        *,
        graphs: bool | None = None,
    ) -> None:
        """
        Args:
            model: the causal LM.
            stats: counts its forwards; None: counters of its own.
            graphs: as of `CriticScorer`.
        """
        self.model = model
        self.stats = ScorerStats() if stats is None else stats
        self._graphs: GraphedLogits | None = None
        on_gpu = model.device.type == "cuda"
        if (on_gpu if graphs is None else graphs) and model.can_be_graphed:
            self._graphs = GraphedLogits(model, capture=on_gpu)

    @property
    def graphs(self) -> GraphedForward | None:
        """As of `CriticScorer`."""
        return None if self._graphs is None else self._graphs.graphs

    @without_autograd
    def prepare(self, rows: int, prefix: int) -> None:
        """Captures the CUDA graphs of usual steps now; where there are none this does nothing.

        Args:
            rows: the most rows of a step.
            prefix: the most tokens of a prefix.
        """
        if self._graphs is None:
            return
        with self.cache.lock:
            self._begin()
            self._graphs.prepare(rows, prefix)

    @property
    def cache(self) -> PrefixCache:
        return self.model.cache

    @without_autograd
    def log_probs(self, prefixes: Sequence[Prefix], candidates: Tensor) -> Tensor:
        """log π(candidate | prefix) by the full softmax, one forward of the prefix for all.

        Args:
            prefixes: rows of unpadded token ids, or handles.
            candidates: int64 [rows, k], padded with -1; k may be the whole vocabulary.

        Returns:
            float32 [rows, k] on the model's device, NaN where padded.

        Raises:
            ValueError: as `CriticScorer.score`.
        """
        check_asked(prefixes, candidates, self.model.vocab_size)
        with self.cache.lock:
            chosen = candidates.to(self.model.device, torch.int64)
            if chosen.numel():
                lowest, highest = (int(bound) for bound in chosen.aminmax())
                self.model.check_vocabulary(0 if lowest == -1 else lowest, highest, "candidate")
            parts = list(
                self._logits(prefixes, lambda rows, logits: self._read(logits, chosen[rows]))
            )
        return torch.cat(parts) if parts else torch.empty(candidates.shape, dtype=torch.float32)

    @without_autograd
    def next_logits(self, prefixes: Sequence[Prefix]) -> Tensor:
        """The next token's logits after each prefix, float32 [rows, vocab] on the model's device.

        Rows with one prefix share its forward.

        Raises ValueError: as `log_probs`, of prefixes.
        """
        with self.cache.lock:
            parts = list(self._logits(prefixes, lambda rows, logits: logits))
        return torch.cat(parts) if parts else torch.empty(0, self.model.vocab_size)

    def _logits(
        self, prefixes: Sequence[Prefix], read: Callable[[slice, Tensor], Tensor]
    ) -> Iterator[Tensor]:
        """What `read` makes of the logits of as many rows as fit the pool, and whose logits fit
        memory, until all are read."""
        self._begin()
        rows = [self.model.row(given, i, None, 0) for i, given in enumerate(prefixes)]
        done, most = 0, max(1, _MOST_LOGITS // self.model.vocab_size)
        try:
            while done < len(rows):
                logits = self._part(rows[done : done + most])
                yield read(slice(done, done + len(logits)), logits)
                done += len(logits)
        except BaseException:
            self.cache.clear()
            raise
        self.stats.add(evictions=self.cache.tree.take_evicted())

    def _begin(self) -> None:
        self.model.begin_call()
        if self._graphs is not None:
            self._graphs.follow()

    def refusal(self, prefix: Prefix, candidates: int) -> str | None:
        """Why `log_probs` would refuse this prefix, or None."""
        return self.model.refusal(prefix, None, 0)

    def _part(self, rows: Sequence[Row]) -> Tensor:
        """Logits after as many of the rows as fit the pool together, float32 [rows, vocab]."""
        self.cache.begin_batch()
        placements: list[Placement] = []
        index: list[int] = []
        read: dict[int, int] = {}
        for row in rows:
            placement = self.model.place(row, reread_last=True, alone=not index)
            if placement is None:
                break
            # Rows with one prefix share the forward of its last token.
            if placement.last_slot not in read:
                read[placement.last_slot] = len(placements)
                placements.append(placement)
            index.append(read[placement.last_slot])
        logits = self._forward(placements)
        self.cache.end_batch()
        return logits[index]

    def _forward(self, placements: list[Placement]) -> Tensor:
        outputs: list[Tensor] = []
        batches = self.model.batches(placements)
        for batch in batches:
            assert isinstance(batch.segments, Segments)
            last = batch.segments.last_tokens()
            begun = time.perf_counter()
            logits = None
            if self._graphs is not None and len(last) == len(batch.segments):
                logits = self._graphs.run(batch)
                if logits is not None and len(batches) > 1:
                    # The next batch writes there too.
                    logits = logits.clone()
            if logits is None:
                read = torch.from_numpy(last).to(self.model.device, non_blocking=True)
                logits = self.model.forward(batch, read).float()
            outputs.append(logits)
            self.stats.add(forwards=1, forward_seconds=time.perf_counter() - begun)
        self.stats.add(
            prefix_tokens=sum(len(placement.work.prefix) for placement in placements),
            cache_hits=sum(placement.hits for placement in placements),
        )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @staticmethod
    def _read(logits: Tensor, candidates: Tensor) -> Tensor:
        log_probs = logits.log_softmax(-1).gather(-1, candidates.clamp(min=0))
        return log_probs.masked_fill(candidates < 0, torch.nan)


class ImplicitScorer(Closing):
    """A(s,a) = log π*(a|s) − log π_ref(a|s): values with baseline 0, terminals included.

    DPO and KTO train π* so that beta · this is its reward up to a term of the prompt
    (Rafailov et al., arXiv 2305.18290, equation 5). Threads may share it: each of its two models
    lets one call in at a time.
    """

    terminal: TerminalRule = "included"
    scores_vocabulary = True
    reward: Scorer | None = None

    def __init__(
        self,
        tuned: PackedModel,
        reference: PackedModel,
        *,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        graphs: bool | None = None,
    ) -> None:
        """
        Args:
            tuned, reference: the policy that preferences made, and what it was tuned from.
            bos_token_id, eos_token_id, graphs: as of `CriticScorer`.

        Raises ValueError: they have different vocabularies.
        """
        if tuned.vocab_size != reference.vocab_size:
            raise ValueError(
                f"{tuned.name} has a vocabulary of {tuned.vocab_size} tokens but its reference "
                f"{reference.name} has {reference.vocab_size}: they must share their token ids"
            )
        self.stats = ScorerStats()
        self._tuned = LanguageModel(tuned, self.stats, graphs=graphs)
        self._reference = LanguageModel(reference, self.stats, graphs=graphs)
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id

    def _packed_models(self) -> Iterator[PackedModel]:
        yield self._tuned.model
        yield self._reference.model

    def __repr__(self) -> str:
        return f"ImplicitScorer({self._tuned.model.name!r}, {self._reference.model.name!r})"

    @property
    def model(self) -> PackedModel:
        """The tuned policy."""
        return self._tuned.model

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def reference(self) -> LogProbs:
        """The reference, which also serves kl_coef."""
        return self._reference

    @property
    def cache(self) -> PrefixCache:
        """The tuned policy's cache."""
        return self._tuned.cache

    @property
    def caches(self) -> tuple[PrefixCache, PrefixCache]:
        """The tuned policy's cache, and the reference's."""
        return self._tuned.cache, self._reference.cache

    def prepare(self, rows: int, prefix: int) -> None:
        """As of `LanguageModel`, of both models."""
        for model in (self._tuned, self._reference):
            model.prepare(rows, prefix)

    def score(self, prefixes: Sequence[Prefix], candidates: Tensor) -> Scores:
        """log π* − log π_ref of each candidate; arguments and errors as `CriticScorer.score`."""
        begun = time.perf_counter()
        values = self._tuned.log_probs(prefixes, candidates)
        values = values - self._reference.log_probs(prefixes, candidates).to(values.device)
        self.stats.add(rows_scored=len(prefixes), seconds=time.perf_counter() - begun)
        return Scores(values, values.new_zeros(len(values)))

    def refusal(self, prefix: Prefix, candidates: int) -> str | None:
        """Why `score` would refuse this prefix, or None."""
        tuned = self._tuned.refusal(prefix, candidates)
        return tuned if tuned is not None else self._reference.refusal(prefix, candidates)
