"""Histories as the server keeps them: only what is proven is known, and all of it is bounded."""

import time

import numpy as np
import pytest

from guided_decode.scoring.remote.prefix_hash import BLOCK, hash_of
from guided_decode.scoring.remote.wire import Row
from guided_decode.serving.limits import Limits
from guided_decode.serving.sessions import Sessions

ONE, OTHER = b"1" * 16, b"2" * 16
TOKENS = np.arange(2 * BLOCK + 9, dtype=np.int32)


def row(session, new, known=0, base=None, of=TOKENS, digest=None):
    """A row that says it knows the first `known` of `of`."""
    base = (session if known else 0) if base is None else base
    own = hash_of(of[:known]).digest if known else b""
    return Row(session, base, known, len(new), own if digest is None else digest)


def resolved(sessions, session, new, client=ONE, **how):
    new = np.array(new, np.int32)
    return sessions.resolve(client, row(session, new, **how), new)


def tokens_of(prefix):
    return getattr(prefix.tokens, "tokens", prefix.tokens).tolist()


@pytest.fixture
def sessions():
    return Sessions(Limits())


@pytest.fixture
def known(sessions):
    """Sessions in which client ONE has TOKENS under 7."""
    resolved(sessions, 7, TOKENS).answered()
    return sessions


def test_a_session_grows_and_keeps_its_handle(known):
    first = resolved(known, 7, [], known=len(TOKENS))
    again = resolved(known, 7, [5, 6], known=len(TOKENS))
    assert tokens_of(again) == [*TOKENS.tolist(), 5, 6]
    first.answered()
    again.answered()
    more = resolved(known, 7, [8], known=len(TOKENS) + 2, of=np.array([*TOKENS, 5, 6]))
    assert tokens_of(more) == [*TOKENS.tolist(), 5, 6, 8]
    assert known.tokens == len(TOKENS) + 3


@pytest.mark.parametrize("length", [1, BLOCK, BLOCK + 1, 2 * BLOCK, len(TOKENS) - 1])
def test_a_rewind_is_recognised_at_any_length(known, length):
    assert tokens_of(resolved(known, 7, [99], known=length)) == [*TOKENS[:length].tolist(), 99]
    assert known.tokens == length + 1


@pytest.mark.parametrize("length", [0, 5, BLOCK])
def test_a_request_that_came_twice_changes_nothing(known, length):
    handle = resolved(known, 7, [], known=len(TOKENS)).tokens
    again = resolved(known, 7, TOKENS[length:], known=length)
    assert again.tokens is handle
    assert known.tokens == len(TOKENS)


@pytest.mark.parametrize(
    "how",
    [
        {"digest": b"\0" * 16},
        {"digest": b""},
        {"known": len(TOKENS) + 1, "digest": hash_of(TOKENS).digest},
        {"client": OTHER},
        {"session": 8},
        {"base": 8},
        {"base": 0},
    ],
)
def test_what_is_not_proven_is_not_known(known, how):
    how = {"session": 7, "known": len(TOKENS), **how}
    assert resolved(known, how.pop("session"), [5], **how) is None
    # And nothing of it is kept.
    assert (len(known), known.tokens) == (1, len(TOKENS))


def test_a_fork_takes_over_what_it_names(known):
    fork = resolved(known, 8, [5], known=BLOCK, base=7)
    assert tokens_of(fork) == [*TOKENS[:BLOCK].tolist(), 5]
    assert tokens_of(resolved(known, 7, [], known=len(TOKENS))) == TOKENS.tolist()
    assert len(known) == 2
    # A row without a session may build on one, too.
    assert tokens_of(resolved(known, 0, [5], known=3, base=7)) == [0, 1, 2, 5]
    assert len(known) == 2


def test_a_row_that_waits_keeps_the_tokens_that_it_came_with(known):
    waiting = resolved(known, 7, [5], known=len(TOKENS))
    later = resolved(known, 7, [6], known=3)
    assert tokens_of(waiting) == [*TOKENS.tolist(), 5]
    assert tokens_of(later) == [0, 1, 2, 6]


def test_a_client_that_leaves_and_sessions_that_close(known):
    resolved(known, 8, [1, 2])
    resolved(known, 7, [3], client=OTHER)
    known.close(ONE, [8, 99])
    assert (len(known), known.clients) == (2, 2)
    known.leave(ONE)
    assert (len(known), known.clients, known.tokens) == (1, 1, 1)
    known.leave(ONE)
    known.leave(OTHER)
    assert (len(known), known.clients, known.tokens) == (0, 0, 0)


def test_the_least_recently_used_goes_first():
    sessions = Sessions(Limits(max_sessions=3))
    for number in (1, 2, 3):
        resolved(sessions, number, [number])
    resolved(sessions, 1, [], known=1, of=np.array([1]))
    resolved(sessions, 4, [4])
    assert resolved(sessions, 2, [], known=1, of=np.array([2])) is None
    assert resolved(sessions, 1, [], known=1, of=np.array([1])) is not None
    assert (len(sessions), sessions.evicted) == (3, 1)


def test_tokens_of_all_sessions_are_bounded():
    sessions = Sessions(Limits(max_session_tokens=100))
    for number in range(1, 50):
        resolved(sessions, number, range(30))
        assert sessions.tokens <= 100
    # One that is larger than all may be is kept alone, as long as nobody comes.
    resolved(sessions, 50, range(500))
    assert (len(sessions), sessions.tokens) == (1, 500)
    resolved(sessions, 51, range(30))
    assert (len(sessions), sessions.tokens) == (1, 30)


def test_what_is_not_used_goes():
    sessions = Sessions(Limits(session_seconds=0.05))
    resolved(sessions, 1, [5])
    time.sleep(0.03)
    resolved(sessions, 2, [6])
    sessions.expire()
    assert len(sessions) == 2
    time.sleep(0.03)
    sessions.expire()
    assert (len(sessions), sessions.expired) == (1, 1)
    time.sleep(0.04)
    sessions.expire()
    assert (len(sessions), sessions.clients, sessions.tokens) == (0, 0, 0)


@pytest.mark.parametrize("bad", [0, -1, 1.5, 2**60])
def test_limits_are_whole_and_above_zero(bad):
    with pytest.raises(ValueError, match=f"max_waiting_tokens={bad}: expected at least 1"):
        Limits(max_waiting_tokens=bad)
    with pytest.raises(ValueError, match="session_seconds=0: expected seconds above 0"):
        Limits(session_seconds=0)
