"""One client's line to a scorer server: found, lost, and found again.

A line that is lost is opened once more within the call; where that fails, the call does, and a
greeting waits on the socket, which ZeroMQ delivers when the server is back. Until its answer is
there, calls fail at once: whoever goes on without scores is not held up by them.
"""

import contextlib
import os
import socket as sockets
import time
from collections.abc import Sequence
from typing import Any, Never

import zmq
from zmq.utils.monitor import recv_monitor_message

from guided_decode.scoring.remote import wire
from guided_decode.scoring.remote.address import IPC, TCP, is_ipv6
from guided_decode.scoring.remote.failures import ScorerBusyError, ScorerServerError
from guided_decode.scoring.remote.keys import ClientKeys

# For a server that was there a moment ago.
_AGAIN_SECONDS = 2.0
_PAUSE_SECONDS = 0.1
_BYE_MILLISECONDS = 1_000
# A machine that vanished from the network is lost after so long; a busy server answers these, too.
_HEARTBEAT_MILLISECONDS, _HEARTBEAT_LOST_MILLISECONDS = 2_000, 10_000
_NOT_LET_IN = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
# What it looks like to have a key of another server's, or to meet what is no scorer server.
_BROKEN_OFF = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_LOST = zmq.EVENT_DISCONNECTED | _BROKEN_OFF | _NOT_LET_IN
# A server that goes away as it is met does so once.
_MOST_BROKEN_OFF = 3


class _LineLost(Exception):
    """The server went away, or was never there."""


class _NotLetIn(_LineLost):
    """What answers lets this client not in. by: zmq's event."""

    def __init__(self, by: int) -> None:
        super().__init__("it does not let this client in")
        self.by = by


class Line:
    """A socket of its own process, to one server. Whoever uses it holds a lock.

    client: whose sessions the server keeps; a secret. sent, received: bytes so far, with headers.
    welcome: the server's, as it was met last. reopened: how often a lost server was found again.
    """

    def __init__(
        self, address: str, keys: ClientKeys | None, connect_seconds: float, timeout: float
    ) -> None:
        """
        Args:
            address: the server's.
            keys: where it wants some.
            connect_seconds: how long it is waited for, which may be starting.
            timeout: seconds that an answer may take.
        """
        self.address = address
        self.keys = keys
        self.connect_seconds = connect_seconds
        self.timeout = timeout
        self.client = os.urandom(wire.CLIENT_BYTES)
        self.sent = self.received = self.reopened = 0
        self.welcome: wire.Welcome | None = None
        self.is_up = False
        self._process = os.getpid()
        self._socket: Any = None
        self._monitor: Any = None
        self._last_id = 0

    @property
    def met(self) -> wire.Welcome:
        """The server's welcome, once it was met."""
        assert self.welcome is not None
        return self.welcome

    def open(self) -> wire.Welcome:
        """Meets the server. Raises ScorerServerError: none answers in time, or another scorer."""
        self._connect()
        seconds = self.connect_seconds
        try:
            return self._met(self._await_welcome(seconds))
        except _NotLetIn as error:
            raise ScorerServerError(self._why_not_let_in(error.by)) from None
        except _LineLost as error:
            unknown = self._unknown_host()
            raise ScorerServerError(
                f"no scorer server answers at {self.address} within {seconds:g} s "
                f"({unknown or error}): "
                + (
                    "see that the name is right"
                    if unknown
                    else f"start one with guided-decode scorer MODEL --listen {self.address}"
                )
            ) from None

    def ask(self, header: wire.Request, *buffers: bytes) -> tuple[wire.Reply, Sequence[bytes]]:
        """Sends a request and waits for its reply: header and buffers.

        Raises:
            ScorerServerError: no answer in time, a line that is lost and not found again, or a
                server that is busy or failed.
            ValueError: what the scorer refuses.
        """
        self._be_up()
        message = wire.frames(header, *buffers)
        number = getattr(header, "id", 0)
        try:
            reply = self._exchange(message, number)
        except _LineLost:
            self._reopen()
            try:
                reply = self._exchange(message, number)
            except _LineLost as error:
                self._lose(f"was lost twice ({error})")
        if isinstance(reply[0], wire.Failed):
            self._raise(reply[0])
        return reply

    def next_id(self) -> int:
        """A number for a request, which its reply bears."""
        self._last_id += 1
        return self._last_id

    def close(self) -> None:
        """Ends the line, and says so: the server forgets this client. A later call comes back."""
        if self._socket is None or os.getpid() != self._process:
            return
        linger = 0
        if self.is_up:
            with contextlib.suppress(zmq.ZMQError):
                self._socket.send_multipart(wire.frames(wire.Bye(self.client)), zmq.NOBLOCK)
                linger = _BYE_MILLISECONDS
        self.is_up = False
        self._hang_up(linger)

    def forget_process(self) -> bool:
        """In a fork: the parent's socket is left alone. Whether this is one."""
        if self._process == os.getpid():
            return False
        self._process = os.getpid()
        self.client = os.urandom(wire.CLIENT_BYTES)
        self._socket = self._monitor = None
        self.is_up = False
        return True

    def _why_not_let_in(self, by: int) -> str:
        # Whether a server breaks off before or after it says why is a matter of moments.
        if self.keys is None:
            return (
                f"what answers at {self.address} lets this client not in: it wants a key (pass "
                "key_file=, the file that ends in .client beside the one that it was started "
                "with), or it is no scorer server"
            )
        if by == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            return (
                f"the server at {self.address} has no keys, so that nothing would be encrypted: "
                "start it with --key-file, or drop key_file="
            )
        return (
            f"the server at {self.address} was started with another key, or with none: pass "
            "key_file=, the file that ends in .client beside its own, or drop it"
        )

    def _unknown_host(self) -> str | None:
        """What is wrong with the host's name; None: nothing."""
        if self.address.startswith(IPC):
            return None
        host = self.address.removeprefix(TCP).rpartition(":")[0].strip("[]")
        try:
            sockets.getaddrinfo(host, None)
        except OSError:
            return f"this machine knows no host {host}"
        return None

    def _connect(self) -> None:
        """A new socket, on which a greeting waits for the server."""
        self._hang_up(0)
        # `instance` makes one a process.
        socket: Any = zmq.Context.instance().socket(zmq.DEALER)
        self._socket = socket
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.IPV6, int(is_ipv6(self.address)))
        socket.set(zmq.HEARTBEAT_IVL, _HEARTBEAT_MILLISECONDS)
        socket.set(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_LOST_MILLISECONDS)
        socket.set(zmq.RECONNECT_IVL, 100)
        socket.set(zmq.RECONNECT_IVL_MAX, 2_000)
        if self.keys is not None:
            socket.curve_serverkey = self.keys.server_public.encode()
            socket.curve_publickey = self.keys.client_public.encode()
            socket.curve_secretkey = self.keys.client_secret.encode()
        self._monitor = socket.get_monitor_socket(_LOST)
        try:
            socket.connect(self.address)
        except zmq.ZMQError as error:
            self._hang_up(0)
            raise ValueError(f"{self.address!r} cannot be connected to: {error}") from None
        # Who is refused at once has nowhere to send to; the monitor says so.
        with contextlib.suppress(_LineLost):
            self._send(wire.frames(wire.Hello()))

    def _hang_up(self, linger: int) -> None:
        if self._socket is None:
            return
        with contextlib.suppress(zmq.ZMQError):
            self._socket.disable_monitor()
            self._monitor.close(0)
        self._socket.close(linger)
        self._socket = self._monitor = None

    def _be_up(self) -> None:
        """Raises ScorerServerError: the server has not come back yet."""
        if self._socket is None:
            self.open()
        elif not self.is_up:
            if self._monitor.poll(0):
                # Whoever got the greeting is gone.
                self._connect()
            try:
                self._met(self._await_welcome(0.0))
            except _LineLost:
                raise ScorerServerError(
                    f"the scorer server at {self.address} does not answer: it is looked for again "
                    "with every call"
                ) from None
            self.reopened += 1
        elif self._monitor.poll(0):
            self._reopen()

    def _reopen(self) -> None:
        """Raises ScorerServerError: the line is lost, and was not found again at once."""
        self.is_up = False
        self._connect()
        try:
            self._met(self._await_welcome(_AGAIN_SECONDS))
        except _LineLost:
            self._lose("went away")
        self.reopened += 1

    def _met(self, welcome: wire.Welcome) -> wire.Welcome:
        """The server that answered. Raises ScorerServerError: it has another scorer now."""
        if self.welcome is not None and welcome.digest != self.welcome.digest:
            self._socket_again()
            before, now = self.welcome.scorer, welcome.scorer
            raise ScorerServerError(
                f"the scorer server at {self.address} serves another scorer now: it was "
                f"{_shown(before)} and is {_shown(now)}; call load_scorer again, or start the one "
                "that was there"
            )
        self.welcome, self.is_up = welcome, True
        return welcome

    def _socket_again(self) -> None:
        """The next call asks anew who is there."""
        self.is_up = False
        self._connect()

    def _await_welcome(self, seconds: float) -> wire.Welcome:
        """Raises _LineLost: none came in time."""
        end, broken_off = time.monotonic() + seconds, 0
        while True:
            try:
                reply, _ = self._receive(end)
            except TimeoutError:
                # A server that refuses connections may be one that is being started.
                raise _LineLost("nothing listens there, or it has not started yet") from None
            except _LineLost as error:
                by = error.by if isinstance(error, _NotLetIn) else 0
                broken_off += by == _BROKEN_OFF
                if by & _NOT_LET_IN or broken_off == _MOST_BROKEN_OFF:
                    raise
                if time.monotonic() + _PAUSE_SECONDS >= end:
                    raise
                # Whoever got the greeting is gone.
                time.sleep(_PAUSE_SECONDS)
                self._connect()
                continue
            if isinstance(reply, wire.Welcome):
                return reply
            if isinstance(reply, wire.Failed) and reply.reason == "version":
                self._raise(reply)

    def _exchange(self, message: list[bytes], number: int) -> tuple[wire.Reply, Sequence[bytes]]:
        self._send(message)
        end = time.monotonic() + self.timeout
        while True:
            try:
                reply, buffers = self._receive(end)
            except TimeoutError:
                self._lose(f"gave no answer within {self.timeout:g} s")
            # An answer to a call that was interrupted may still come.
            if getattr(reply, "id", -1) in (number, 0):
                return reply, buffers

    def _send(self, message: list[bytes]) -> None:
        try:
            self._socket.send_multipart(message, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise _LineLost(str(error)) from None
        self.sent += sum(map(len, message))

    def _receive(self, end: float) -> tuple[wire.Reply, Sequence[bytes]]:
        """One message, by then. Raises TimeoutError, or _LineLost: the line broke first."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        while True:
            left = max(0, round((end - time.monotonic()) * 1000))
            events = dict(poller.poll(left))
            if self._socket in events:
                message = self._socket.recv_multipart()
                self.received += sum(map(len, message))
                return self._read(message)
            if self._monitor in events:
                event = recv_monitor_message(self._monitor)["event"]
                if event & (_NOT_LET_IN | _BROKEN_OFF):
                    raise _NotLetIn(int(event))
                raise _LineLost("the connection broke")
            if not left:
                raise TimeoutError

    def _read(self, message: list[bytes]) -> tuple[wire.Reply, Sequence[bytes]]:
        try:
            return wire.read_reply(message)
        except wire.WireError as error:
            self._socket_again()
            raise ScorerServerError(
                f"what answers at {self.address} sent {error}; install the same guided-decode on "
                "both sides, or mend the address"
            ) from None

    def _lose(self, how: str) -> Never:
        """Leaves a greeting for when the server is back."""
        self._socket_again()
        raise ScorerServerError(
            f"the scorer server at {self.address} {how}: rows cannot be scored until it is back"
        ) from None

    def _raise(self, failed: wire.Failed) -> Never:
        if failed.reason == "refused":
            raise ValueError(failed.message)
        if failed.reason == "busy":
            raise ScorerBusyError(f"the scorer server at {self.address}: {failed.message}")
        if failed.reason in ("changed", "version"):
            self._socket_again()
        raise ScorerServerError(f"the scorer server at {self.address}: {failed.message}")


def _shown(described: wire.Described) -> str:
    model = described.scorer
    kind = "" if model.kind is None else f", {model.kind}"
    return f"{model.name} ({model.vocab_size} tokens{kind}, terminal {model.terminal!r})"
