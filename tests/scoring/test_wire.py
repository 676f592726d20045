"""Messages of the scorer server's protocol: what is read, and what is none."""

import os

import msgspec
import pytest

from guided_decode.scoring.remote import wire
from guided_decode.scoring.remote.address import check_address, is_address, is_local

CLIENT, DIGEST = b"c" * 16, b"d" * 16
ROW = wire.Row(3, 3, 12, 1, b"h" * 16)
SCORES = wire.AskScores(7, CLIENT, DIGEST, wire.SCORER, 4, [ROW, ROW], [1, 2])
MODEL = wire.Model(name="critic", vocab_size=10, room=64)


@pytest.mark.parametrize(
    "request_",
    [
        wire.Hello(),
        wire.AskTokens(1),
        wire.AskCounters(2),
        wire.Bye(CLIENT),
        SCORES,
        wire.AskRefusal(8, CLIENT, DIGEST, wire.REWARD, 4, [ROW]),
    ],
)
def test_a_request_comes_back_as_it_was(request_):
    assert wire.read_request(wire.frames(request_, b"12", b"")) == (request_, [b"12", b""])


@pytest.mark.parametrize(
    "reply",
    [
        wire.Welcome(wire.Described(scorer=MODEL, reward=MODEL), DIGEST),
        wire.Tokens(1, {"a": 0}, None, 2, {5: True}),
        wire.Answer(2),
        wire.Missing(3, [0, 4]),
        wire.Reason(4, None),
        wire.Counters(5, {"rows": 2.0}),
        wire.Failed(6, "busy", "later"),
    ],
)
def test_a_reply_comes_back_as_it_was(reply):
    assert wire.read_reply(wire.frames(reply)) == (reply, [])


def test_a_steps_row_is_small():
    """A row of a long prefix is no larger than one of a short prefix."""
    sizes = []
    for known in (128, 4096, 1_000_000):
        row = wire.Row(3, 3, known, 1, b"h" * 16)
        sizes.append(len(msgspec.msgpack.encode(row)))
    assert max(sizes) <= 30
    assert max(sizes) - min(sizes) <= 4


def broken(**changes):
    """The request with fields changed, as another implementation might send it."""
    fields = {name: getattr(SCORES, name) for name in SCORES.__struct_fields__} | changes
    return [wire.PREAMBLE, msgspec.msgpack.encode(["ask-scores", *fields.values()])]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ([], "no message"),
        ([b""], "no message"),
        ([wire.PREAMBLE], "no message"),
        ([b"GET / HTTP/1.1", b""], "no message"),
        ([wire.PREAMBLE[:-1] + b"\x02", b"x"], "a message of version 2"),
        ([wire.PREAMBLE, b""], "header cannot be read"),
        ([wire.PREAMBLE, os.urandom(64)], "header cannot be read"),
        ([wire.PREAMBLE, b"\x91" * 10_000], "header cannot be read"),
        ([wire.PREAMBLE, msgspec.msgpack.encode(["load", "/etc/passwd"])], "Invalid value 'load'"),
        (broken(client=b"short"), "length >= 16"),
        (broken(scorer=b"d" * 17), "length <= 16"),
        (broken(target="/etc"), "matching regex"),
        (broken(k=-1), "`int` >= 0"),
        (broken(k=2**40), "`int` <= 2147483647"),
        (broken(rows=[[1, 1, 2, 3]]), "length 5"),
        (broken(rows=[[1, 1, -2, 3, b""]]), "`int` >= 0"),
        (broken(rows="all"), "Expected `array`"),
    ],
)
def test_what_is_no_message_is_refused(message, reason):
    with pytest.raises(wire.WireError, match="(?s)" + reason.replace("(", r"\(")):
        wire.read_request(message)


def test_another_version_is_told_apart_from_noise():
    assert wire.other_version([wire.PREAMBLE[:-1] + b"\x07", b""]) == 7
    assert wire.other_version([wire.PREAMBLE, b""]) is None
    assert wire.other_version([b"noise", b""]) is None
    assert wire.other_version([]) is None


@pytest.mark.parametrize(
    "model", ["tiny-tulu-value", "owner/name", "/folder", None, 3, "http://a:1"]
)
def test_models_are_no_addresses(model):
    assert not is_address(model)


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("tcp://127.0.0.1:7070", True),
        ("tcp://127.3.2.1:7070", True),
        ("tcp://localhost:7070", True),
        ("tcp://[::1]:7070", True),
        ("ipc:///run/scorer", True),
        ("ipc://relative", True),
        ("tcp://10.0.0.1:7070", False),
        ("tcp://scorer.example:7070", False),
        ("tcp://[2001:db8::1]:7070", False),
    ],
)
def test_addresses(address, local):
    assert is_address(address)
    check_address(address, connects=True)
    assert is_local(address) is local


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("tcp://", "is no address of a scorer server: expected tcp://HOST:PORT or ipc://PATH"),
        ("tcp://host", "is no address"),
        ("tcp://host:", "is no address"),
        ("tcp://host:port", "is no address"),
        ("tcp://:7070", "is no address"),
        ("ipc://", "is no address"),
        ("tcp://host:70000", "has port 70000: expected 1 to 65535"),
        ("tcp://host:0", "has port 0: expected 1 to 65535"),
        ("tcp://0.0.0.0:7070", "is every address of a machine: expected one of them"),
        ("tcp://*:7070", "is every address of a machine"),
    ],
)
def test_what_cannot_be_connected_to_is_refused(address, reason):
    with pytest.raises(ValueError, match=reason):
        check_address(address, connects=True)
