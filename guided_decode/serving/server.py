"""The server's loop: what has arrived is scored together and answered, on one thread."""

import contextlib
import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import zmq
from msgspec import structs
from transformers import PreTrainedTokenizerBase

from guided_decode.cache.closable import Closable
from guided_decode.guidance.step import is_device_error
from guided_decode.scorer import Scorer
from guided_decode.scoring.remote import wire
from guided_decode.scoring.remote.address import DEFAULT
from guided_decode.scoring.remote.keys import ServerKeys
from guided_decode.scoring.remote.prefix_hash import TOKEN
from guided_decode.serving.counts import ServerCounts
from guided_decode.serving.description import describe, tokens_of
from guided_decode.serving.jobs import FairQueue, Job, Slice
from guided_decode.serving.limits import Limits
from guided_decode.serving.reading import Unread, read_job, read_refusal
from guided_decode.serving.rounds import calls_of, models_of, score_together
from guided_decode.serving.security import Gate, check_listening, listening
from guided_decode.serving.sessions import Sessions

logger = logging.getLogger("guided_decode")

# Messages of one look: who sends without end does not keep the others waiting.
_MOST_MESSAGES = 256
_LINGER_MILLISECONDS = 2_000
_EXPIRY_MILLISECONDS = 1_000


class ScorerServer(Closable):
    """Serves any `Scorer`. `serve` runs until `stop`; both are a context manager's inside."""

    def __init__(
        self,
        scorer: Scorer,
        listen: str = DEFAULT,
        *,
        keys: ServerKeys | None = None,
        insecure: bool = False,
        limits: Limits = Limits(),  # noqa: B008 - a frozen record
        kind: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """
        Args:
            scorer: what is served, with its reward model and reference.
            listen: tcp://HOST:PORT, where port 0 takes a free one, or ipc://PATH.
            keys: the server's; then only clients with theirs are answered.
            insecure: listens without keys where other machines reach it.
            limits: what clients may take.
            kind, tokenizer: of the scorer, for its clients: its checkpoint family, and what its
                ids are.

        Raises:
            ValueError: an address that cannot be listened on, or that wants keys.
        """
        check_listening(listen, keys, insecure=insecure)
        self.counts = ServerCounts()
        self.sessions = Sessions(limits)
        self.limits = limits
        self._tokens = None if tokenizer is None else tokens_of(tokenizer)
        described = describe(scorer, kind=kind, tokens=self._tokens)
        self._scorer = scorer
        self._models = models_of(scorer)
        self._welcome = wire.Welcome(described, wire.digest_of(described))
        self._queue = FairQueue()
        self._stopping = False
        with contextlib.ExitStack() as stack:
            context: zmq.Context[Any] = zmq.Context()
            stack.callback(context.term)
            self._gate = None
            if keys is not None:
                self._gate = Gate(context, keys)
                stack.callback(self._gate.socket.close, 0)
            self._socket = stack.enter_context(
                listening(context, listen, keys, limits.max_message_bytes)
            )
            if self._gate is not None:
                stack.enter_context(self._gate.watching(self._socket))
            self._wake, self._woken = os.pipe()
            stack.callback(os.close, self._wake)
            stack.callback(os.close, self._woken)
            os.set_blocking(self._woken, False)
            self._closing = stack.pop_all()

    @property
    def address(self) -> str:
        """Where it listens, with the port that was taken."""
        endpoint = self._socket.get(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        return endpoint.rstrip(b"\0").decode()

    @property
    def waiting_tokens(self) -> int:
        """New tokens and candidates of the requests that wait."""
        return self._queue.tokens

    def close(self) -> None:
        """Ends listening; `serve` has returned."""
        self._closing.close()

    def stop(self) -> None:
        """Lets `serve` answer what has arrived, and return. Any thread, and signals, may call."""
        self._stopping = True
        with contextlib.suppress(OSError):
            os.write(self._woken, b"\0")

    def serve(self) -> None:
        """Answers until `stop`.

        Raises the scorer's error after which it scores no more: its device failed, or a process
        that has a shard of it is lost.
        """
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        if self._gate is not None:
            poller.register(self._gate.socket, zmq.POLLIN)
        while not self._stopping:
            poller.poll(0 if self._queue else _EXPIRY_MILLISECONDS)
            if self._gate is not None:
                self._gate.answer()
            self._receive()
            self._score_round()
            self.sessions.expire()
        # What came before the end is answered.
        self._receive()
        while self._queue:
            self._score_round()
        self._socket.linger = _LINGER_MILLISECONDS

    def counters(self) -> dict[str, float]:
        """What it did and holds, by name; the scorer's own begin with `scorer_`."""
        held = {
            "sessions": len(self.sessions),
            "session_tokens": self.sessions.tokens,
            "clients": self.sessions.clients,
            "waiting_tokens": self._queue.tokens,
            "sessions_evicted": self.sessions.evicted,
            "sessions_expired": self.sessions.expired,
            "keys_refused": 0 if self._gate is None else self._gate.refused,
        }
        scorers = {f"scorer_{name}": n for name, n in self._scorer.stats.as_dict().items()}
        return self.counts.as_dict() | held | scorers

    def _receive(self) -> None:
        """Takes in what has arrived."""
        with contextlib.suppress(zmq.Again):
            for _ in range(_MOST_MESSAGES):
                peer, *message = self._socket.recv_multipart(zmq.NOBLOCK)
                self.counts.bytes_received += sum(map(len, message))
                try:
                    self._handle(peer, message)
                except Exception:
                    # No message of a client ends the server.
                    self.counts.malformed += 1
                    logger.exception("a client's message could not be handled")

    def _handle(self, peer: bytes, message: Sequence[bytes]) -> None:
        try:
            request, buffers = wire.read_request(message)
        except wire.WireError as error:
            self.counts.malformed += 1
            reason = "malformed" if wire.other_version(message) is None else "version"
            self._send(peer, wire.Failed(0, reason, f"{error}; install the same guided-decode on "
                                         "both sides"))  # fmt: skip
            return
        match request:
            case wire.Hello():
                self._send(peer, self._welcome)
            case wire.AskTokens(id=number) if self._tokens is not None:
                self._send(peer, structs.replace(self._tokens, id=number))
            case wire.AskTokens(id=number):
                self._send(peer, wire.Failed(number, "error", "the server has no tokenizer"))
            case wire.AskCounters(id=number):
                self._send(peer, wire.Counters(number, self.counters()))
            case wire.Bye(client=client):
                self.sessions.leave(client)
            case wire.AskScores() | wire.AskRefusal():
                try:
                    self._take_in(peer, request, buffers)
                except Unread as unread:
                    self.counts.malformed += unread.reply.reason == "malformed"
                    self._send(peer, unread.reply)
                except Exception as error:
                    self._send(peer, _failed(request.id, error))

    def _take_in(
        self, peer: bytes, request: wire.AskScores | wire.AskRefusal, buffers: Sequence[bytes]
    ) -> None:
        """A request about rows. Raises Unread: it cannot be answered."""
        self._check(request)
        self.sessions.close(request.client, request.closed)
        self.counts.requests += 1
        if isinstance(request, wire.AskRefusal):
            prefix, missing = read_refusal(request, buffers, self.sessions)
            if prefix is None:
                self._ask_again(peer, request.id, missing)
                return
            text = self._models[request.target].refusal(prefix.tokens, request.candidates)
            prefix.answered()
            self._send(peer, wire.Reason(request.id, text))
            return
        self._check_room(request, buffers)
        job, missing = read_job(peer, request, buffers, self.sessions)
        if missing:
            for prefix in job.prefixes:
                prefix.answered()
            self._ask_again(peer, request.id, missing)
            return
        self._queue.add(job)

    def _ask_again(self, peer: bytes, number: int, missing: list[int]) -> None:
        self.counts.rows_asked_again += len(missing)
        self._send(peer, wire.Missing(number, missing))

    def _check(self, request: wire.AskScores | wire.AskRefusal) -> None:
        if request.scorer != self._welcome.digest:
            raise Unread(wire.Failed(request.id, "changed", "it serves another scorer than the one "
                                     "that this client met: call load_scorer again"))  # fmt: skip
        if request.target not in self._models:
            raise Unread(wire.Failed(request.id, "malformed", f"it has no {request.target}"))
        if isinstance(request, wire.AskScores) and request.k > self._scorer.vocab_size:
            raise Unread(
                wire.Failed(
                    request.id,
                    "malformed",
                    f"k={request.k} candidates a row are more than its vocabulary",
                )
            )

    def _check_room(self, request: wire.AskScores, buffers: Sequence[bytes]) -> None:
        asked = len(request.rows) + sum(map(len, buffers)) // TOKEN.itemsize
        most, waits = self.limits.max_waiting_tokens, self._queue.tokens
        if waits + asked > most:
            self.counts.busy += 1
            raise Unread(wire.Failed(
                request.id, "busy", f"{waits} tokens wait and {asked} came, of at most {most}: "
                "ask for fewer rows at a time, try again later, or start it with a larger "
                "--max-waiting-tokens",
            ))  # fmt: skip

    def _score_round(self) -> None:
        slices = self._queue.take(self.limits.round_tokens)
        if not slices:
            return
        self.counts.rounds += 1
        begun = time.perf_counter()
        for model, own in calls_of(self._models, slices):
            self._score(model, own)
        self.counts.seconds += time.perf_counter() - begun

    def _score(self, model: Any, slices: list[Slice]) -> None:
        """Rows of one model; a job that fails fails alone."""
        try:
            score_together(model, slices)
        except Exception as error:
            self._end_if_lost(error, slices)
            if len(slices) == 1 and slices[0].whole:
                self._fail(slices[0].job, error)
                return
            for each in slices:
                self._score_alone(model, each.job)
            return
        for each in slices:
            if not each.job.left:
                self._answer(each.job)

    def _score_alone(self, model: Any, job: Job) -> None:
        """A job of a call that failed, from its first row to its last, with its own error."""
        self._queue.drop(job)
        whole = Slice(job, 0, len(job.prefixes))
        job.left = whole.stop
        try:
            score_together(model, [whole])
        except Exception as error:
            self._end_if_lost(error, [whole])
            self._fail(job, error)
            return
        self._answer(job)

    def _end_if_lost(self, error: Exception, slices: list[Slice]) -> None:
        """Raises the error, if the scorer does not survive it."""
        if is_device_error(error) or getattr(self._scorer, "closed", None) is not None:
            # Whoever has asked is told, those too whose requests have only arrived.
            self._receive()
            for job in dict.fromkeys([*(each.job for each in slices), *self._queue.drain()]):
                self._fail(job, error)
            self._socket.linger = _LINGER_MILLISECONDS
            raise error

    def _answer(self, job: Job) -> None:
        buffers = [job.values.tobytes()]
        if job.target != wire.REFERENCE:
            buffers.append(job.baseline.tobytes())
        self._end(job)
        self.counts.rows += len(job.prefixes)
        self._send(job.peer, wire.Answer(job.number), *buffers)

    def _fail(self, job: Job, error: Exception) -> None:
        self._end(job)
        self.counts.failed += 1
        self._send(job.peer, _failed(job.number, error))

    @staticmethod
    def _end(job: Job) -> None:
        for prefix in job.prefixes:
            prefix.answered()

    def _send(self, peer: bytes, header: wire.Reply, *buffers: bytes) -> None:
        message = wire.frames(header, *buffers)
        self.counts.bytes_sent += sum(map(len, message))
        # A peer that has gone, or does not read, loses its answer.
        with contextlib.suppress(zmq.ZMQError):
            try:
                self._socket.send_multipart([peer, *message], zmq.NOBLOCK)
            except zmq.Again:
                # ZeroMQ hears that answers have been read when it is asked for events; on its
                # own, only once a millisecond while messages keep coming.
                self._socket.get(zmq.EVENTS)
                self._socket.send_multipart([peer, *message], zmq.NOBLOCK)


def _failed(number: int, error: Exception) -> wire.Failed:
    """What a client is told of an exception: what the scorer refuses stays a ValueError there."""
    if isinstance(error, ValueError):
        return wire.Failed(number, "refused", str(error))
    logger.error("a request could not be scored", exc_info=error)
    return wire.Failed(number, "error", f"{type(error).__name__}: {error}")
