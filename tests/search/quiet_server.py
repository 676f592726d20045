"""An HTTP server for tests that says nothing of clients that went away."""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class QuietServer(ThreadingHTTPServer):
    """What a client takes back breaks its connection, which is no error of the server's.

    socketserver would print it to the stderr of this process, where tests read what a command says.
    """

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class QuietHandler(BaseHTTPRequestHandler):
    """Connections that stay open; no request is logged."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *said: Any) -> None:
        pass

    def json_body(self) -> Any:
        """Raises ConnectionAbortedError: the client was gone before all of it had come."""
        length = self.headers.get("content-length")
        body = self.rfile.read(int(length or 0))
        if length is None or len(body) < int(length):
            raise ConnectionAbortedError(f"{len(body)} of {length} bytes came")
        return json.loads(body)
