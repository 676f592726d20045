"""Where a server may listen, and whom it lets in."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zmq
import zmq.utils.z85
from zmq.utils.monitor import recv_monitor_message

from guided_decode.scoring.remote.address import IPC, check_address, is_ipv6, is_local
from guided_decode.scoring.remote.keys import ServerKeys
from guided_decode.serving.file_lock import FileLock

_ZAP = "inproc://zeromq.zap.01"
_ZAP_FRAMES = 7
# Which of them it is depends on who of both breaks off first.
_REFUSED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


def check_listening(address: str, keys: ServerKeys | None, *, insecure: bool) -> None:
    """Raises ValueError: no address, or one that others reach, without keys."""
    check_address(address, connects=False)
    if keys is None and not insecure and not is_local(address):
        raise ValueError(
            f"listen={address!r} can be reached from other machines, and no keys were given: "
            "expected key_file=..., as --new-key FILE makes it, a loopback or ipc:// address, or "
            "insecure=True where the network keeps others out"
        )


def require_free(address: str, keys: ServerKeys | None, *, insecure: bool) -> None:
    """Raises ValueError: what a server that listens there would, before its model is loaded."""
    check_listening(address, keys, insecure=insecure)
    with zmq.Context() as context, listening(context, address, None, message_bytes=1):
        pass


class Gate:
    """ZeroMQ's question whether a client may come in (ZAP): only with the clients' key.

    refused: connections without that key, or with none, and of what is no client at all. Most of
    them fail before the question is asked.
    """

    def __init__(self, context: "zmq.Context[Any]", keys: ServerKeys) -> None:
        self._client = zmq.utils.z85.decode(keys.client_public)
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(_ZAP)
        self.refused = 0
        self._monitor: Any = None

    @contextlib.contextmanager
    def watching(self, socket: Any) -> Iterator[None]:
        """Counts who is refused at the server's socket."""
        self._monitor = socket.get_monitor_socket(_REFUSED)
        try:
            yield
        finally:
            socket.disable_monitor()
            self._monitor.close(0)
            self._monitor = None

    def answer(self) -> None:
        """Answers the questions that wait."""
        with contextlib.suppress(zmq.Again):
            while True:
                asked = self.socket.recv_multipart(zmq.NOBLOCK)
                lets_in = len(asked) == _ZAP_FRAMES and asked[5:] == [b"CURVE", self._client]
                verdict = (b"200", b"OK") if lets_in else (b"400", b"another key")
                self.socket.send_multipart([b"1.0", asked[1], *verdict, b"", b""])
        while self._monitor is not None and self._monitor.poll(0):
            recv_monitor_message(self._monitor)
            self.refused += 1


@contextlib.contextmanager
def listening(
    context: "zmq.Context[Any]", address: str, keys: ServerKeys | None, message_bytes: int
) -> Iterator["zmq.Socket[Any]"]:
    """The server's socket.

    Raises ValueError: the address cannot be listened on.
    """
    with contextlib.ExitStack() as stack:
        socket = context.socket(zmq.ROUTER)
        stack.callback(socket.close, 0)
        socket.set(zmq.MAXMSGSIZE, message_bytes)
        socket.set(zmq.IPV6, int(is_ipv6(address)))
        # A client has one request at a time; to one that does not read its answers, or has gone,
        # sending fails.
        socket.set(zmq.ROUTER_MANDATORY, 1)
        socket.set(zmq.SNDHWM, 8)
        socket.set(zmq.RCVHWM, 8)
        if keys is not None:
            socket.curve_server = True
            socket.curve_secretkey = keys.server_secret.encode()
            socket.curve_publickey = keys.server_public.encode()
        if address.startswith(IPC):
            stack.enter_context(_own_path(address))
        # What an ipc address creates is its owner's alone.
        mask = os.umask(0o077)
        try:
            # To bind, ZeroMQ takes no name of a host.
            socket.bind(address.replace("tcp://localhost:", "tcp://127.0.0.1:"))
        except zmq.ZMQError as error:
            raise _refusal(address, zmq.strerror(error.errno or 0)) from None
        finally:
            os.umask(mask)
        yield socket


@contextlib.contextmanager
def _own_path(address: str) -> Iterator[None]:
    """One server a path: ZeroMQ would take it away from another."""
    path = Path(address.removeprefix(IPC))
    lock = FileLock()
    try:
        taken = lock.take(path.with_name(f"{path.name}.lock"), link=False, mode=0o600)
    except OSError as error:
        raise _refusal(address, str(error.strerror)) from None
    if not taken:
        raise _refusal(address, "another scorer server listens there")
    try:
        yield
    finally:
        lock.release()


def _refusal(address: str, reason: str) -> ValueError:
    return ValueError(f"listen={address!r} cannot be listened on ({reason}): pass another address")
