"""An HTTP server for tests that says nothing of clients that went away."""

from __future__ import annotations

import sys
from http.server import ThreadingHTTPServer
from typing import Any


class QuietServer(ThreadingHTTPServer):
    """What a client takes back breaks its connection, which is no error of the server's.

    socketserver would print it to the stderr of this process, where tests read what a command says.
    """

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)
