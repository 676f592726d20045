"""The tests' own HTTP servers: what clients take back midway is not said on stderr."""

import socket

import pytest

from tests.search.scripted_server import scripted
from tests.search.servers.completion_server import CompletionServer

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 40\r\n\r\n"


def take_back(url, sent):
    """Sends it, and waits until the server has given up on the rest."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        client.recv(1)


@pytest.mark.parametrize("sent", [HEAD, HEAD + b'{"prompt": ', HEAD[:60], HEAD[:20], b""])
def test_servers_are_quiet_about_what_was_taken_back(sent, capfd):
    with scripted(lambda *asked: {}) as [server]:
        take_back(server.url, sent)
    with CompletionServer(None, None).running() as server:
        take_back(server.url, sent)
    assert capfd.readouterr().err == ""
