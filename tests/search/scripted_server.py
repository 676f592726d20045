"""A real HTTP server that does what a test's script says: answers, fails, hangs, breaks off."""

import contextlib
import json
import threading
from dataclasses import dataclass, field

from tests.search.quiet_server import QuietHandler, QuietServer


@dataclass(frozen=True)
class Reply:
    """status, headers: of the answer. body: JSON, or bytes as they are. wait: seconds before it.
    cut: of its bytes, how many come before the connection is closed; None: all."""

    body: object = None
    status: int = 200
    headers: dict = field(default_factory=dict)
    wait: float = 0.0
    cut: int | None = None

    @property
    def bytes(self):
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


DROPPED = Reply(b" ", cut=-1)  # the connection is closed, and nothing was said


class ScriptedServer:
    """answer(path, body, number) gives a `Reply`, or what is the JSON of one; number counts from 0.

    seen: (path, body, headers) of each request. most: that were under way at a time.
    """

    def __init__(self, answer):
        self.answer, self.seen, self.most = answer, [], 0
        self._under_way, self._lock, self._ended = 0, threading.Lock(), threading.Event()
        server = self

        class Handler(QuietHandler):
            def do_POST(self):
                server._serve(self, self.json_body())

            def do_GET(self):
                server._serve(self, None)

        self._http = QuietServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self._http.server_port}"

    def close(self):
        self._ended.set()
        self._http.shutdown()
        self._http.server_close()

    def _serve(self, handler, body):
        with self._lock:
            number = len(self.seen)
            self.seen.append((handler.path, body, dict(handler.headers)))
            self._under_way += 1
            self.most = max(self.most, self._under_way)
        try:
            found = self.answer(handler.path, body, number)
            reply = found if isinstance(found, Reply) else Reply(found)
            if reply.wait:
                self._ended.wait(reply.wait)
        finally:
            with self._lock:
                self._under_way -= 1
        with contextlib.suppress(OSError):
            self._write(handler, reply)

    def _write(self, handler, reply):
        if reply.cut == -1:
            handler.close_connection = True
            return
        handler.send_response(reply.status)
        for name, value in reply.headers.items():
            handler.send_header(name, value)
        handler.send_header("content-length", str(len(reply.bytes)))
        handler.end_headers()
        handler.wfile.write(reply.bytes[: reply.cut])
        if reply.cut is not None:
            handler.close_connection = True


@contextlib.contextmanager
def scripted(*answers):
    """A server for each script, all gone when the block is left."""
    servers = [ScriptedServer(answer) for answer in answers]
    try:
        yield servers
    finally:
        for server in servers:
            server.close()
