"""Where HTTP servers are, and the key that they want."""

from __future__ import annotations

import os
from collections.abc import Iterable
from urllib.parse import urlsplit


def api_key_of(variable: str | None) -> str | None:
    """The key that an environment variable holds; None: none was named.

    Raises ValueError: the variable is not set, or holds what no header can; never shows it.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"{variable} is not set: expected the server's API key in it")
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{variable} holds what is no API key: expected printable ASCII")
    return key


def check_urls(urls: str | Iterable[str]) -> list[str]:
    """Where servers are: http://HOST:PORT, with a path where one stands before that of requests.

    The /v1 at the end of an API's address, which OpenAI's clients are given, is taken off: paths of
    requests begin with it.

    Raises ValueError: none, one that is none, one twice, or one with a secret in it.
    """
    given = [urls] if isinstance(urls, str) else list(urls)
    found: list[str] = []
    for url in given:
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise ValueError(
                f"{url!r} is no URL of a server ({error}): expected http://HOST:PORT"
            ) from error
        if parts.username is not None or parts.password is not None:
            raise ValueError(
                f"a URL of {parts.hostname} has a name or password in it: pass the key by an "
                "environment variable"
            )
        try:
            whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            whole = False
        if not whole or parts.query or parts.fragment:
            raise ValueError(f"{url!r} is no URL of a server: expected http://HOST:PORT")
        bare = url.rstrip("/").removesuffix("/v1").rstrip("/")
        if bare in found:
            raise ValueError(f"{bare} came twice: pass each server once")
        found.append(bare)
    if not found:
        raise ValueError("no URL of a server came: expected http://HOST:PORT")
    return found
