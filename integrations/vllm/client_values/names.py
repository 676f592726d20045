"""The names under which values wait: in a server's process only the middleware draws them."""

import contextlib
import secrets
from collections.abc import Iterator


class DrawnNames:
    """Names of the responses that are under way, and whether any request is."""

    def __init__(self) -> None:
        self._served = 0
        self._names: set[str] = set()

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """A connection, whose requests may only bring names that were drawn here."""
        self._served += 1
        try:
            yield
        finally:
            self._served -= 1

    def draw(self) -> str:
        """A name that nobody can guess."""
        name = secrets.token_hex(16)
        self._names.add(name)
        return name

    def drop(self, name: str) -> None:
        """Its response is over."""
        self._names.discard(name)

    def check(self, name: str) -> None:
        """Raises ValueError: a client chose this name."""
        if self._served and name not in self._names:
            raise ValueError(
                "guide_values_id is for engines in process: over HTTP the server chooses it; drop "
                "it"
            )


# vLLM checks a request's parameters in the process whose middleware it came by, on no given thread.
NAMES = DrawnNames()
