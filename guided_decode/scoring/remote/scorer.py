"""A scorer that runs in another process or on another machine: `guided-decode scorer`."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from guided_decode.scorer import LogProbs, Prefix, Scorer, Scores, TerminalRule
from guided_decode.scoring.remote import wire
from guided_decode.scoring.remote.address import check_address
from guided_decode.scoring.remote.client import Client
from guided_decode.scoring.remote.keys import ClientKeys
from guided_decode.scoring.remote.model import RemoteModel

CONNECT_SECONDS, TIMEOUT_SECONDS = 10.0, 60.0


class RemoteReference(RemoteModel):
    """The reference of kl_coef, on the server."""

    def log_probs(self, prefixes: Sequence[Prefix], candidates: Tensor) -> Tensor:
        """log π_ref(candidate | prefix), float32 [rows, k] on the CPU; NaN where padded.

        Raises ValueError, ScorerServerError: as `RemoteCritic.score`.
        """
        (values, *_) = self._ask(prefixes, candidates)
        return torch.from_numpy(values).view(candidates.shape)


class RemoteCritic(RemoteModel):
    """A critic or reward model on the server, without companions."""

    reward: Scorer | None = None
    reference: LogProbs | None = None

    @property
    def terminal(self) -> TerminalRule:
        return cast(TerminalRule, self._model.terminal)

    @property
    def bos_token_id(self) -> int | None:
        return self._model.bos_token_id

    @property
    def eos_token_id(self) -> int | None:
        return self._model.eos_token_id

    @property
    def scores_vocabulary(self) -> bool:
        return self._model.scores_vocabulary

    def score(self, prefixes: Sequence[Prefix], candidates: Tensor) -> Scores:
        """As `CriticScorer.score`, on the CPU.

        Raises:
            ValueError: what the scorer refuses.
            ScorerServerError: the server does not answer in time, went away and was not found again
                at once, has too much waiting (ScorerBusyError), or failed.
        """
        values, baseline = (torch.from_numpy(each) for each in self._ask(prefixes, candidates))
        return Scores(values.view(candidates.shape), baseline)


class RemoteScorer(RemoteCritic):
    """A scorer like any other, whose models are on a `guided-decode scorer`.

    A step sends what is new of each handle's prefix, and the candidates; lists are sent whole.
    Threads may share it, one call at a time; a fork and a deep copy have a line of their own.
    """

    def __init__(
        self,
        address: str,
        *,
        keys: ClientKeys | None = None,
        connect_seconds: float = CONNECT_SECONDS,
        timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        """
        Args:
            address: tcp://HOST:PORT or ipc://PATH.
            keys: of a server that wants them.
            connect_seconds: how long a server is waited for, that may be starting.
            timeout: seconds that an answer may take.

        Raises:
            ValueError: no address, or a time that is none.
            ScorerServerError: no server answers there.
        """
        check_address(address, connects=True)
        for name, seconds in (("connect_seconds", connect_seconds), ("timeout", timeout)):
            if not 0 < seconds < float("inf"):
                raise ValueError(f"{name}={seconds!r}: expected seconds above 0")
        client = Client(address, keys, connect_seconds, timeout)
        self.described = described = client.line.open().scorer
        super().__init__(client, wire.SCORER)
        if described.reward is not None:
            self.reward = RemoteCritic(client, wire.REWARD)
        if described.reference is not None:
            self.reference = RemoteReference(client, wire.REFERENCE)

    def __repr__(self) -> str:
        kind = "" if self._model.kind is None else f", {self._model.kind}"
        return (
            f"RemoteScorer({self.address!r}, {self._model.name!r}{kind}, "
            f"terminal={self.terminal!r})"
        )

    @property
    def address(self) -> str:
        return self._client.line.address

    def tokenizer(self) -> wire.Tokens | None:
        """The scorer's token ids; None where the server has no tokenizer."""
        if self.described.tokenizer is None:
            return None
        reply = self._client.simple(wire.AskTokens)
        assert isinstance(reply, wire.Tokens)
        return reply

    def server_counters(self) -> dict[str, float]:
        """What the server has done and holds, for all its clients, by name."""
        reply = self._client.simple(wire.AskCounters)
        assert isinstance(reply, wire.Counters)
        return reply.counts

    def wire_counters(self) -> dict[str, int]:
        """Of this client: bytes sent and received, rows that were asked for again, live sessions,
        and how often the server was found again after it had gone."""
        client, line = self._client, self._client.line
        return {
            "bytes_sent": line.sent,
            "bytes_received": line.received,
            "rows_asked_again": client.rows_asked_again,
            "sessions": len(client.sessions),
            "reopened": line.reopened,
        }

    def close(self) -> None:
        """Leaves the server, which forgets this client's sessions; a later call comes back."""
        self._client.close()
