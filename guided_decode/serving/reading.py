"""Requests about rows, from their frames: sizes checked, prefixes found."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from guided_decode.scoring.remote import wire
from guided_decode.scoring.remote.prefix_hash import TOKEN, Tokens
from guided_decode.serving.jobs import Job
from guided_decode.serving.sessions import HeldPrefix, Sessions


class Unread(Exception):
    """A request that is not taken in; reply: what its client is told."""

    def __init__(self, reply: wire.Failed) -> None:
        super().__init__(reply.message)
        self.reply = reply


def read_job(
    peer: bytes, request: wire.AskScores, buffers: Sequence[bytes], sessions: Sessions
) -> tuple[Job, list[int]]:
    """The job of a request, and the rows whose prefixes are not known, by index.

    Raises Unread: buffers of other sizes than the header says.
    """
    rows, k = len(request.rows), request.k
    new, candidates = _buffers(request, buffers, [_new(request.rows), rows * k])
    prefixes, missing = _prefixes(request, new, sessions)
    chosen = candidates.reshape(rows, k)
    counts = np.count_nonzero(chosen >= 0, -1).tolist()
    costs = [1 + row.new + count for row, count in zip(request.rows, counts, strict=True)]
    job = Job(peer, request.client, request.id, request.target, prefixes, chosen, costs)
    return job, missing


def read_refusal(
    request: wire.AskRefusal, buffers: Sequence[bytes], sessions: Sessions
) -> tuple[HeldPrefix | None, list[int]]:
    """The prefix of a request; None, and its index, where it is not known.

    Raises Unread: buffers of other sizes than the header says.
    """
    (new,) = _buffers(request, buffers, [_new(request.rows)])
    prefixes, missing = _prefixes(request, new, sessions)
    return (prefixes[0] if prefixes else None), missing


def _new(rows: Sequence[wire.Row]) -> int:
    return sum(row.new for row in rows)


def _buffers(
    request: wire.AskScores | wire.AskRefusal, buffers: Sequence[bytes], sizes: list[int]
) -> list[NDArray[np.int32]]:
    lengths = [len(buffer) for buffer in buffers]
    expected = [size * TOKEN.itemsize for size in sizes]
    if lengths != expected:
        raise Unread(
            wire.Failed(
                request.id,
                "malformed",
                f"buffers of {lengths} bytes came: expected {expected} by their header",
            )
        )
    return [np.frombuffer(buffer, TOKEN) for buffer in buffers]


def _prefixes(
    request: wire.AskScores | wire.AskRefusal, new: Tokens, sessions: Sessions
) -> tuple[list[HeldPrefix], list[int]]:
    prefixes: list[HeldPrefix] = []
    missing, at = [], 0
    for index, row in enumerate(request.rows):
        prefix = sessions.resolve(request.client, row, new[at : at + row.new])
        at += row.new
        if prefix is None:
            missing.append(index)
        else:
            prefixes.append(prefix)
    return prefixes, missing
