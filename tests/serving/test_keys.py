"""Who may come in: keys, addresses that others reach, one server a path."""

import contextlib
import json
import os
import socket
import stat
import threading
import time

import pytest
import torch
import zmq

from guided_decode import load_scorer
from guided_decode.scoring.remote import RemoteScorer, ScorerServerError, wire
from guided_decode.scoring.remote.keys import ClientKeys, ServerKeys, write_keys
from guided_decode.serving import ScorerServer
from tests import PATIENCE
from tests.serving.served import CLOSE, client, critic, loaded, served

ASKED = ([[5, 6, 7]], torch.tensor([[3, 4]]))
# Long enough for a server that would answer.
SOON = 0.7


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_keys(tmp_path_factory.mktemp("keys") / "scorer.key")


def test_key_files_are_their_owners_and_are_never_written_over(tmp_path):
    server, clients = write_keys(tmp_path / "key")
    assert [path.name for path in (server, clients)] == ["key", "key.client"]
    for path in (server, clients):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    # What a client gets does not let it pass for the server, or let others in.
    assert not {"server_secret"} & set(json.loads(clients.read_text()))
    assert "client_secret" not in json.loads(server.read_text())
    before = clients.read_text()
    server.unlink()
    with pytest.raises(FileExistsError):
        write_keys(tmp_path / "key")
    assert clients.read_text() == before
    assert not server.exists()
    assert ServerKeys.__repr__ is object.__repr__


def test_with_the_key_a_client_is_answered(files):
    with served(critic(), keys=ServerKeys.read(files[0])) as server:
        remote = loaded(server, key_file=files[1])
        torch.testing.assert_close(
            remote.score(*ASKED).values, critic().score(*ASKED).values, **CLOSE
        )


def test_without_the_key_nothing_is_answered(files, tmp_path):
    _, others = write_keys(tmp_path / "other")
    own, other = ClientKeys.read(files[1]), ClientKeys.read(others)
    # Who knows the server's public key alone is not let in either.
    stranger = ClientKeys(own.server_public, other.client_public, other.client_secret)
    with served(critic(), keys=ServerKeys.read(files[0])) as server:
        begun = time.monotonic()
        for number, (keys, reason) in enumerate([
            (None, r"not in: it wants a key \(pass key_file=, the file that ends in \.client"),
            (other, "with another key, or with none: pass key_file=, the file that ends"),
            (stranger, "was started with another key"),
        ], start=1):  # fmt: skip
            with pytest.raises(ScorerServerError, match=reason):
                client(server, keys=keys, connect_seconds=PATIENCE)
            end = time.monotonic() + 60
            while server.counters()["keys_refused"] < number and time.monotonic() < end:
                time.sleep(0.05)
            assert server.counters()["keys_refused"] >= number
        # They need not wait as for a server that may be starting.
        assert time.monotonic() - begun < PATIENCE
        context = zmq.Context()
        for kind in (zmq.DEALER, zmq.REQ):
            with context.socket(kind) as plain:
                plain.linger = 0
                plain.connect(server.address)
                plain.send_multipart(wire.frames(wire.Hello()), zmq.NOBLOCK)
                assert plain.poll(SOON * 1000) == 0
        context.term()
        assert server.counts.bytes_received == 0
        assert client(server, keys=own).score(*ASKED)


def test_a_key_for_a_server_without_keys_is_no_way_in(files):
    reason = (
        "has no keys, so that nothing would be encrypted: start it|with another key, or with none"
    )
    with served(critic()) as server, pytest.raises(ScorerServerError, match=reason):
        client(server, keys=ClientKeys.read(files[1]), connect_seconds=PATIENCE)


def test_what_is_no_scorer_server_is_told_apart():
    with socket.create_server(("127.0.0.1", 0)) as server:
        stop = threading.Event()

        def answer():
            server.settimeout(0.1)
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    connection, _ = server.accept()
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            with pytest.raises(ScorerServerError, match="or it is no scorer server"):
                RemoteScorer(f"tcp://127.0.0.1:{server.getsockname()[1]}")
        finally:
            stop.set()
            thread.join()


def test_a_host_that_is_none_is_named():
    reason = r"within 0.3 s \(this machine knows no host no.such.invalid\): see that the name is"
    with pytest.raises(ScorerServerError, match=reason):
        RemoteScorer("tcp://no.such.invalid:7070", connect_seconds=0.3)


def test_key_files_that_are_none(files, tmp_path):
    nothing = tmp_path / "nothing"
    nothing.write_text("a secret")
    halves = tmp_path / "halves"
    halves.write_text(json.dumps({"guided_decode": "ClientKeys", "server_public": "short"}))
    cases = [
        (nothing, "nothing is no key file: .*make one with guided-decode scorer --new-key FILE"),
        (halves, "halves has no key under 'server_public': make one"),
        (files[0], "scorer.key is a server's key file: expected the clients', the file of "
                   "--new-key that ends in .client"),
    ]  # fmt: skip
    for path, reason in cases:
        with pytest.raises(ValueError, match=reason):
            load_scorer("tcp://127.0.0.1:1", key_file=path)
    with pytest.raises(ValueError, match=r"is a client's key file \(.client\): expected the ser"):
        ServerKeys.read(files[1])
    with pytest.raises(OSError, match="No such file"):
        load_scorer("tcp://127.0.0.1:1", key_file=tmp_path / "gone")


@pytest.mark.parametrize("listen", ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://10.0.0.1:7070"])
def test_an_address_that_others_reach_wants_keys(listen, files):
    reason = (
        r"can be reached from other machines, and no keys were given: expected key_file=\.\.\., as "
        r"--new-key FILE makes it, a loopback or ipc:// address, or insecure=True"
    )
    with pytest.raises(ValueError, match=reason):
        ScorerServer(critic(), listen)
    if listen.endswith(":0"):
        for how in ({"insecure": True}, {"keys": ServerKeys.read(files[0])}):
            ScorerServer(critic(), listen, **how).close()


def test_an_address_has_one_server(tmp_path):
    taken = r"cannot be listened on \(Address already in use"
    with served(critic()) as server, pytest.raises(ValueError, match=taken):
        ScorerServer(critic(), server.address)
    with served(critic(), "tcp://localhost:0") as server:
        assert RemoteScorer(server.address.replace("127.0.0.1", "localhost")).score(*ASKED)
    path = f"ipc://{tmp_path}/scorer"
    with served(critic(), path) as server:
        assert server.address == path
        with pytest.raises(ValueError, match=r"\(another scorer server listens there\): pass ano"):
            ScorerServer(critic(), path)
        mode = os.stat(tmp_path / "scorer").st_mode
        assert stat.S_ISSOCK(mode)
        assert not mode & 0o077
        assert RemoteScorer(path).score(*ASKED)
    # What a server that was killed leaves behind does not keep the next one out.
    (tmp_path / "scorer").touch()
    with served(critic(), path):
        assert RemoteScorer(path).score(*ASKED)
    with pytest.raises(ValueError, match=r"cannot be listened on \(No such file or directory\)"):
        ScorerServer(critic(), "ipc:///no/such/folder/scorer")
