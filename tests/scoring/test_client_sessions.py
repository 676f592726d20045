"""What a client sends of its prefixes: what is new, whatever became of them."""

import gc

import numpy as np
import pytest

from guided_decode import PrefixHandle
from guided_decode.scoring.remote import prefix_hash
from guided_decode.scoring.remote.client_sessions import ClientSessions, Read
from guided_decode.scoring.remote.prefix_hash import BLOCK, hash_of
from guided_decode.serving.limits import Limits
from guided_decode.serving.sessions import Sessions

LONG = list(range(3 * BLOCK + 10))


def read(handle):
    state = handle.state()
    return Read(state.tokens, handle, state.version)


def told(sessions, *handles):
    """The rows of one call that is answered."""
    rows = [sessions.tell(read(handle)) for handle in handles]
    sessions.told(rows)
    return rows if len(rows) > 1 else rows[0]


def test_a_step_tells_its_new_tokens():
    sessions, handle = ClientSessions(), PrefixHandle(LONG)
    first = told(sessions, handle)
    assert (first.row.known, first.row.new, first.row.digest) == (0, len(LONG), b"")
    for token in range(2 * BLOCK):
        handle.append(token)
        row = told(sessions, handle)
        known = len(LONG) + token
        assert (row.row.known, row.row.new) == (known, 1)
        assert row.row.session == row.row.base == first.row.session
        assert row.row.digest == hash_of(handle.tokens[:known]).digest
        assert np.frombuffer(row.new, "<i4").tolist() == [token]
    assert told(sessions, handle).row.new == 0


def test_a_call_without_an_answer_is_told_again():
    sessions, handle = ClientSessions(), PrefixHandle(LONG)
    told(sessions, handle)
    handle.append(1)
    lost = sessions.tell(read(handle))
    handle.append(2)
    again = told(sessions, handle)
    assert (again.row.known, again.row.new) == (lost.row.known, 2)
    handle.append(3)
    assert told(sessions, handle).row.known == len(LONG) + 2


def test_a_rewound_handle_tells_from_the_last_block_that_holds():
    sessions, handle = ClientSessions(), PrefixHandle(LONG)
    told(sessions, handle)
    handle.sync([*LONG[: 2 * BLOCK + 5], 999])
    row = told(sessions, handle)
    assert (row.row.known, row.row.new) == (2 * BLOCK, 6)
    assert row.row.digest == hash_of(np.array(LONG[: 2 * BLOCK])).digest
    handle.append(7)
    assert told(sessions, handle).row.known == 2 * BLOCK + 6
    handle.sync([5, 6])
    row = told(sessions, handle)
    assert (row.row.known, row.row.new, row.row.base) == (0, 2, 0)


@pytest.mark.parametrize("kept", [1, BLOCK, 2 * BLOCK + 5, len(LONG) - 1])
def test_a_handle_that_gave_up_its_end_tells_what_came_in_its_place(kept):
    sessions, handle = ClientSessions(), PrefixHandle(LONG)
    told(sessions, handle)
    handle.rewind(kept)
    handle.extend([7, 8])
    row = told(sessions, handle)
    assert (row.row.known, row.row.new, row.row.base) == (kept, 2, row.row.session)
    assert row.row.digest == hash_of(np.array(LONG[:kept])).digest
    handle.append(9)
    row = told(sessions, handle)
    assert (row.row.known, row.row.new) == (kept + 2, 1)
    assert row.row.digest == hash_of(handle.tokens[:-1]).digest
    # Of what it gave up nobody is told.
    fork = told(sessions, PrefixHandle(LONG))
    assert fork.row.known == kept // BLOCK * BLOCK


def test_a_handle_that_gave_up_its_end_may_stand_in_two_rows_and_lose_an_answer():
    sessions, handle = ClientSessions(), PrefixHandle(LONG)
    told(sessions, handle)
    for token in range(12):
        handle.rewind(len(LONG) - 2)
        handle.extend([token, token])
        if token % 3:
            sessions.tell(read(handle))  # no answer came
        else:
            one, two = told(sessions, handle, handle)
            assert one.row == two.row
    handle.append(5)
    old = read(handle)
    handle.rewind(3)
    handle.append(6)
    assert told(sessions, handle).row.known == 3
    # What another thread had read before is not told as if nothing had changed since.
    assert sessions.tell(old._replace(tokens=np.array([*LONG[:2], 1, 2, 3, 4]))).row.known == 0


def test_a_rewound_handle_costs_what_it_gave_up_on_either_side(monkeypatch):
    hashed, real = [], prefix_hash._hash

    def counted(before, tokens):
        hashed.append(len(tokens))
        return real(before, tokens)

    client, server = ClientSessions(), Sessions(Limits())
    prompt = list(range(40 * BLOCK))
    draft = PrefixHandle([*prompt, 0, 1])

    def step():
        row = client.tell(read(draft))
        held = server.resolve(b"me", row.row, np.frombuffer(row.new, "<i4"))
        client.told([row])
        held.answered()
        assert held.tokens.tokens.tolist() == draft.tokens.tolist()
        return held.tokens

    version = step().version
    monkeypatch.setattr(prefix_hash, "_hash", counted)
    for token in range(BLOCK):
        draft.rewind(len(prompt) + token + 1)
        draft.extend([token, token + 1])
        handle = step()
        # As it was found in the scorer's cache, up to where it changed.
        assert handle.kept(version) >= len(prompt) + token
        version = handle.version
        assert sum(hashed) <= 6 * BLOCK * np.dtype("<i4").itemsize
        hashed.clear()


def test_a_fork_tells_what_it_shares_with_another():
    sessions, parent = ClientSessions(), PrefixHandle(LONG)
    first = told(sessions, parent)
    fork = PrefixHandle([*LONG, 1])
    row = told(sessions, fork)
    assert (row.row.base, row.row.known, row.row.new) == (first.row.session, 3 * BLOCK, 11)
    assert row.row.session != first.row.session
    fork.append(2)
    assert told(sessions, fork).row.base == row.row.session


def test_a_handle_that_stands_in_two_rows_goes_on_as_one():
    sessions, handle = ClientSessions(), PrefixHandle(LONG)
    told(sessions, handle, handle)
    handle.append(4)
    one, two = told(sessions, handle, handle)
    assert one.row == two.row
    handle.append(5)
    row = told(sessions, handle)
    assert (row.row.known, row.row.new) == (len(LONG) + 1, 1)
    assert row.row.digest == hash_of(handle.tokens[:-1]).digest


def test_a_list_is_told_whole_and_leaves_nothing():
    sessions = ClientSessions()
    tokens = np.array(LONG)
    for _ in range(2):
        row = sessions.tell(Read(tokens))
        sessions.told([row])
        assert (row.row.session, row.row.known, row.row.new) == (0, 0, len(LONG))
    assert len(sessions) == 0


def test_handles_that_are_gone_are_told_once_and_leave_nothing():
    sessions = ClientSessions()
    handles = [PrefixHandle([*LONG, n]) for n in range(3)]
    numbers = [told(sessions, handle).row.session for handle in handles]
    del handles
    gc.collect()
    closed = sessions.closed()
    assert sorted(closed) == numbers
    assert sessions.closed() == []
    assert len(sessions) == 0
    sessions.untold(closed)
    assert sorted(sessions.closed()) == numbers
    # Nobody is told of tokens that only they had.
    assert told(sessions, PrefixHandle(LONG)).row.known == 0


def test_what_a_server_does_not_know_is_told_in_full():
    sessions, handle = ClientSessions(), PrefixHandle(LONG)
    told(sessions, handle)
    handle.append(1)
    full = sessions.in_full(sessions.tell(read(handle)))
    assert (full.row.known, full.row.base, full.row.digest) == (0, 0, b"")
    assert np.frombuffer(full.new, "<i4").tolist() == [*LONG, 1]
    sessions.told([full])
    handle.append(2)
    row = told(sessions, handle)
    assert (row.row.known, row.row.new) == (len(LONG) + 1, 1)
