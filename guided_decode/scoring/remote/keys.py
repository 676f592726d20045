"""Key files: ZeroMQ's CURVE keys of a scorer server and of its clients.

`write_keys(FILE)` makes two: FILE for the server, which takes no client but one that has the key in
FILE.client. Both are JSON objects of CURVE keys in Z85, readable by their owner alone.
"""

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

CLIENT_SUFFIX = ".client"
_KEY_CHARACTERS = 40


@dataclass(frozen=True, slots=True, repr=False)
class _Keys:
    """Z85 texts of 40 characters, each 32 bytes."""

    def as_json(self) -> str:
        """What stands in the file."""
        return json.dumps({"guided_decode": type(self).__name__, **self._texts()}, indent=1) + "\n"

    def _texts(self) -> dict[str, str]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The keys of a file.

        Raises ValueError: it is none of these. OSError: it cannot be read.
        """
        try:
            given: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no key file: {error}; {_MAKE}") from None
        kind = str(given.get("guided_decode")) if isinstance(given, dict) else ""
        if kind != cls.__name__:
            raise ValueError(
                f"{path} {_IS.get(kind, 'is no key file')}: expected {_WANTED[cls.__name__]}"
            )
        names = [field.name for field in fields(cls)]
        for name in names:
            text = given.get(name)
            if not isinstance(text, str) or len(text) != _KEY_CHARACTERS or not text.isascii():
                raise ValueError(f"{path} has no key under {name!r}: {_MAKE}")
        return cls(**{name: given[name] for name in names})


@dataclass(frozen=True, slots=True, repr=False)
class ServerKeys(_Keys):
    """The server's pair, and the public key of the clients that it takes."""

    server_public: str
    server_secret: str
    client_public: str


@dataclass(frozen=True, slots=True, repr=False)
class ClientKeys(_Keys):
    """The clients' pair, and the server's public key."""

    server_public: str
    client_public: str
    client_secret: str


_MAKE = "make one with guided-decode scorer --new-key FILE"
_IS = {
    "ServerKeys": "is a server's key file",
    "ClientKeys": f"is a client's key file ({CLIENT_SUFFIX})",
}
_WANTED = {
    "ServerKeys": f"the server's, the file of --new-key without {CLIENT_SUFFIX}",
    "ClientKeys": f"the clients', the file of --new-key that ends in {CLIENT_SUFFIX}",
}


def write_keys(path: str | Path) -> tuple[Path, Path]:
    """Makes new keys; returns the server's file and the clients'.

    Raises OSError: one of the files is there already, or cannot be written.
    """
    import zmq

    server_public, server_secret = (key.decode() for key in zmq.curve_keypair())
    client_public, client_secret = (key.decode() for key in zmq.curve_keypair())
    server, client = Path(path), Path(f"{path}{CLIENT_SUFFIX}")
    texts = {
        server: ServerKeys(server_public, server_secret, client_public).as_json(),
        client: ClientKeys(server_public, client_public, client_secret).as_json(),
    }
    written: list[Path] = []
    try:
        for file, text in texts.items():
            _write_once(file, text)
            written.append(file)
    except OSError:
        for file in written:
            file.unlink()
        raise
    return server, client


def _write_once(path: Path, text: str) -> None:
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(number, "w", encoding="utf-8") as file:
        file.write(text)
