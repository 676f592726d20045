"""What no client of ours would send: refused or dropped, and the server goes on."""

import contextlib
import os
import random
import socket
import time

import msgspec
import pytest
import torch
import zmq

from guided_decode import PrefixHandle
from guided_decode.scoring.remote import wire
from guided_decode.serving import Limits
from tests import PATIENCE, models
from tests.serving.served import CLOSE, client, critic, served

CLIENT = b"c" * 16
CANDIDATES = torch.tensor([[3, 4]])


@contextlib.contextmanager
def peer(server, **options):
    """A socket that may send anything."""
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    for name, value in options.items():
        dealer.set(getattr(zmq, name), value)
    dealer.connect(server.address)
    try:
        yield dealer
    finally:
        dealer.close()
        context.term()


def reply(dealer, seconds=60):
    """The next reply, or None."""
    if not dealer.poll(seconds * 1000):
        return None
    return wire.read_reply(dealer.recv_multipart())[0]


@pytest.fixture(scope="module")
def server():
    with served(
        critic(), limits=Limits(max_message_bytes=100_000, max_waiting_tokens=60_000)
    ) as server:
        yield server


@pytest.fixture(scope="module")
def local():
    return critic()


@pytest.fixture(autouse=True)
def goes_on(server, local):
    """After each test: others are answered, nothing waits, and no session is left."""
    yield
    remote = client(server)
    handle = PrefixHandle(models.prompts([30])[0])
    wanted = local.score([handle], CANDIDATES)
    torch.testing.assert_close(remote.score([handle], CANDIDATES).values, wanted.values, **CLOSE)
    remote.close()
    with peer(server) as dealer:
        dealer.send_multipart(wire.frames(wire.Bye(CLIENT)))
        dealer.send_multipart(wire.frames(wire.Hello()))
        assert isinstance(reply(dealer), wire.Welcome)
    # What a client that went away has left is scored, too; its last word may still be under way.
    end = time.monotonic() + PATIENCE
    while (server.waiting_tokens or len(server.sessions)) and time.monotonic() < end:
        time.sleep(0.05)
    assert server.waiting_tokens == 0
    assert len(server.sessions) == 0


def digest(server):
    with peer(server) as dealer:
        dealer.send_multipart(wire.frames(wire.Hello()))
        return reply(dealer).digest


def scores(server, rows, k=2, number=1, **own):
    fields = {"id": number, "client": CLIENT, "scorer": digest(server), "target": "scorer", "k": k}
    return wire.AskScores(**{**fields, "rows": rows, **own})


def row(new, **own):
    return wire.Row(**{"session": 1, "base": 0, "known": 0, "new": new, "digest": b"", **own})


def ints(*values):
    return b"".join(value.to_bytes(4, "little", signed=True) for value in values)


def test_noise_is_refused_or_dropped(server):
    before = server.counts.malformed
    noise = random.Random(0)
    with peer(server) as dealer:
        for _ in range(200):
            frames = [noise.randbytes(noise.randrange(0, 60)) for _ in range(noise.randrange(1, 5))]
            dealer.send_multipart(frames if noise.random() < 0.5 else [wire.PREAMBLE, *frames])
            answer = reply(dealer)
            assert isinstance(answer, wire.Failed)
            assert answer.reason == "malformed"
    assert server.counts.malformed >= before + 200


def test_a_quick_client_gets_every_answer(server):
    """However quickly one request follows another: the answers of before have been read."""
    hello = wire.frames(wire.Hello())
    with peer(server, RCVTIMEO=60_000) as dealer:
        for _ in range(5_000):
            dealer.send_multipart(hello)
            dealer.recv_multipart()


def test_plain_tcp_that_is_no_zeromq(server):
    host, port = server.address.removeprefix("tcp://").split(":")
    for text in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(500), b""):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(text)


def test_another_version_is_told_so(server):
    with peer(server) as dealer:
        dealer.send_multipart([wire.PREAMBLE[:-1] + b"\x09", b"anything"])
        answer = reply(dealer)
    assert (answer.reason, answer.id) == ("version", 0)
    assert answer.message == (
        "a message of version 9 of a scorer server's protocol: expected version 1; install the "
        "same guided-decode on both sides"
    )


@pytest.mark.parametrize(
    ("rows", "buffers", "reason"),
    [
        ([row(2)], [ints(5), ints(3, 4)], "buffers of [4, 8] bytes came: expected [8, 8]"),
        ([row(1)], [ints(5), ints(3)], "buffers of [4, 4] bytes came: expected [4, 8]"),
        ([row(1)], [ints(5)], "buffers of [4] bytes came"),
        ([row(1)], [ints(5), ints(3, 4), b""], "expected [4, 8]"),
        ([row(2**31 - 1)], [ints(5), ints(3, 4)], "expected [8589934588, 8]"),
        ([row(1)], [b"123", ints(3, 4)], "buffers of [3, 8] bytes"),
    ],
)
def test_buffers_that_do_not_fit_their_header(server, rows, buffers, reason):
    with peer(server) as dealer:
        dealer.send_multipart(wire.frames(scores(server, rows), *buffers))
        answer = reply(dealer)
    assert answer.reason == "malformed"
    assert reason in answer.message


@pytest.mark.parametrize(
    ("own", "reason", "message"),
    [
        ({"k": 2**31 - 1, "rows": []}, "malformed", "k=2147483647 candidates a row are more than"),
        ({"target": "reward"}, "malformed", "it has no reward"),
        ({"target": "reference"}, "malformed", "it has no reference"),
        ({"scorer": b"x" * 16}, "changed", "it serves another scorer"),
    ],
)
def test_requests_that_have_no_answer(server, own, reason, message):
    with peer(server) as dealer:
        header = scores(server, **{"rows": [row(1)], **own})
        dealer.send_multipart(wire.frames(header, ints(5), ints(3, 4)))
        answer = reply(dealer)
    assert answer.reason == reason
    assert message in answer.message


@pytest.mark.parametrize(
    ("tokens", "candidates", "message"),
    [
        ([101], [3, 4], "prefix token 101 is outside the vocabulary"),
        ([-7], [3, 4], "prefix token -7 is outside the vocabulary"),
        ([5], [3, 2**31 - 1], "candidate 2147483647 is outside the vocabulary"),
        ([5], [-9, 4], "candidate -9 is outside the vocabulary"),
        ([], [3, 4], "row 0 has an empty prefix"),
        ([5] * 600, [3, 4], "row 0 needs 601 positions"),
    ],
)
def test_tokens_that_a_client_of_ours_would_not_send(server, tokens, candidates, message):
    with peer(server) as dealer:
        header = scores(server, [row(len(tokens))])
        dealer.send_multipart(wire.frames(header, ints(*tokens), ints(*candidates)))
        answer = reply(dealer)
    assert answer.reason == "refused"
    assert message in answer.message


def test_a_frame_that_is_too_large_ends_its_connection(server):
    with peer(server) as dealer:
        header = scores(server, [row(100_000)])
        dealer.send_multipart(wire.frames(header, b"\0" * 400_000, ints(3, 4)))
        assert reply(dealer, 1) is None


def test_a_header_of_a_hundred_thousand_rows(server):
    with peer(server) as dealer:
        header = scores(server, [row(0)] * 5_000)
        dealer.send_multipart(wire.frames(header, b"", ints(3, 4) * 5_000))
        answer = reply(dealer)
    assert "row 0 has an empty prefix" in answer.message


def test_sessions_of_another_client_are_not_to_be_had(server):
    """Whoever knows a session's number and the hash of its tokens is told nothing of it."""
    from guided_decode.scoring.remote.prefix_hash import hash_of

    remote = client(server)
    handle = PrefixHandle([5, 6, 7])
    remote.score([handle], CANDIDATES)
    told = hash_of(handle.tokens).digest
    with peer(server) as dealer:
        stolen = row(0, known=3, base=1, digest=told)
        dealer.send_multipart(wire.frames(scores(server, [stolen]), b"", ints(3, 4)))
        assert reply(dealer).rows == [0]
    remote.close()


def test_who_does_not_read_keeps_nobody_waiting(server):
    before = server.counters()["requests"]
    with peer(server, RCVHWM=1, SNDHWM=1_000, RCVBUF=4_096) as dealer:
        sent, header = 0, scores(server, [row(0)] * 200, k=64)
        rows = [row(1, session=n + 1) for n in range(200)]
        message = wire.frames(msgspec.structs.replace(header, rows=rows), ints(*[5] * 200),
                              ints(*[3] * 64 * 200))  # fmt: skip
        with contextlib.suppress(zmq.Again):
            for _ in range(300):
                dealer.send_multipart(message, zmq.NOBLOCK)
                sent += 1
        remote = client(server)
        for _ in range(20):
            remote.score([[5, 6, 7]], CANDIDATES)
        remote.close()
        assert sent > 20
        assert server.counters()["requests"] > before + 20


def test_a_flood_of_closed_sessions_and_goodbyes(server):
    with peer(server) as dealer:
        for number in range(50):
            header = scores(server, [row(1)], number=number, closed=list(range(100)))
            dealer.send_multipart(wire.frames(header, ints(5), ints(3, 4)))
            assert isinstance(reply(dealer), wire.Answer)
            dealer.send_multipart(wire.frames(wire.Bye(os.urandom(16))))
