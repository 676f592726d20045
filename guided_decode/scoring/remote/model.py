"""One model of a scorer server, as a client has it: what both scorers and references do."""

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from guided_decode.cache.one_process import OneProcess
from guided_decode.prefix import PrefixHandle, as_ints
from guided_decode.scorer import Prefix
from guided_decode.scoring.asked import check_asked
from guided_decode.scoring.remote import wire
from guided_decode.scoring.remote.client import Client
from guided_decode.scoring.remote.client_sessions import Read, Told
from guided_decode.scoring.remote.failures import ScorerServerError
from guided_decode.stats import ScorerStats

_INT32, _FLOAT32 = np.dtype("<i4"), np.dtype("<f4")

Floats = NDArray[np.float32]


class RemoteModel(OneProcess):
    """The scorer, its reward model, or its reference, by the name of `wire`.

    `stats` counts what was sent: prefix_tokens and candidate_tokens; cache_hits are the tokens of
    prefixes that were not, because the server knew them.
    """

    def __init__(self, client: Client, target: str) -> None:
        self._client = client
        self._target = target
        self.stats = ScorerStats()

    @property
    def _model(self) -> wire.Model:
        """As the server says now: one that came back may have more or less room."""
        model: wire.Model = getattr(self._client.line.met.scorer, self._target)
        return model

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    def refusal(self, prefix: Prefix, candidates: int) -> str | None:
        """Why a row with so many candidates cannot be scored, or None.

        Raises ScorerServerError: only the server can tell, and does not answer.
        """
        try:
            read = self._read(prefix, 0)
        except ValueError as error:
            return str(error).removeprefix("row 0: ")
        if len(read.tokens) + candidates <= self._model.room:
            return None

        def request(number: int, rows: list[wire.Row], closed: list[int]) -> wire.Request:
            own = self._client.line.client
            return wire.AskRefusal(
                number, own, self._digest, self._target, candidates, rows, closed
            )

        reply, _, _ = self._client.ask([read], request)
        return reply.text if isinstance(reply, wire.Reason) else self._unexpected(reply)

    def _ask(self, prefixes: Sequence[Prefix], candidates: Tensor) -> list[Floats]:
        """The answer's arrays: values [rows · k] and, of a scorer, baselines [rows]."""
        begun = time.perf_counter()
        check_asked(prefixes, candidates, self.vocab_size)
        chosen = candidates.cpu().numpy()
        self._check_candidates(chosen)
        reads = [self._read(prefix, i) for i, prefix in enumerate(prefixes)]
        rows, k = chosen.shape

        def request(number: int, told: list[wire.Row], closed: list[int]) -> wire.Request:
            own = self._client.line.client
            return wire.AskScores(number, own, self._digest, self._target, k, told, closed)

        asked = chosen.astype(_INT32, copy=False).tobytes()
        reply, buffers, told = self._client.ask(reads, request, asked)
        if not isinstance(reply, wire.Answer):
            self._unexpected(reply)
        self._count(told, chosen, begun)
        lengths = [len(buffer) for buffer in buffers]
        wanted = [size * _FLOAT32.itemsize for size in (rows * k, rows)]
        if not lengths or lengths != wanted[: len(lengths)]:
            raise ScorerServerError(
                f"the scorer server at {self._client.line.address} answered with {lengths} bytes "
                f"for {rows} rows of {k} candidates"
            )
        # A copy: frames are read-only, tensors are not.
        return [np.frombuffer(buffer, _FLOAT32).astype(np.float32) for buffer in buffers]

    def _count(self, told: Sequence[Told], chosen: NDArray[np.integer], begun: float) -> None:
        new = sum(each.row.new for each in told)
        self.stats.add(
            rows_scored=len(told),
            prefix_tokens=new,
            candidate_tokens=int(np.count_nonzero(chosen >= 0)),
            cache_hits=sum(each.row.known for each in told),
            seconds=time.perf_counter() - begun,
        )

    @property
    def _digest(self) -> bytes:
        return self._client.line.met.digest

    def _unexpected(self, reply: wire.Reply) -> str:
        raise ScorerServerError(
            f"the scorer server at {self._client.line.address} sent {type(reply).__name__} for "
            "what it was asked"
        )

    def _read(self, prefix: Prefix, index: int) -> Read:
        """A prefix that fits the wire; others are refused in the words of a local scorer."""
        if isinstance(prefix, PrefixHandle):
            state = prefix.state()
            read = Read(state.tokens, prefix, state.version)
            lowest, highest = state.lowest, state.highest
        else:
            tokens = as_ints(prefix)
            read = Read(tokens)
            lowest, highest = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, 0)
        if not len(read.tokens):
            raise ValueError(f"row {index} has an empty prefix: expected at least one token id")
        self._check_vocabulary(lowest, highest, f"row {index}: prefix token")
        return read

    def _check_candidates(self, chosen: NDArray[np.integer]) -> None:
        if chosen.size:
            # -1 is padding.
            lowest, highest = int(chosen.min()), int(chosen.max())
            self._check_vocabulary(0 if lowest == -1 else lowest, highest, "candidate")

    def _check_vocabulary(self, lowest: int, highest: int, what: str) -> None:
        if lowest < 0 or highest >= self.vocab_size:
            odd = lowest if lowest < 0 else highest
            raise ValueError(
                f"{what} {odd} is outside the vocabulary of {self._model.name}, which has "
                f"{self.vocab_size} tokens: policy and scorer must share their token ids"
            )
