"""What goes wrong at an HTTP server: what is tried again, after how long, and what is said."""

from __future__ import annotations

import email.utils
import json
import random
import time
from dataclasses import dataclass

import httpx

# Of the codes under 500: the request was fine, and came at the wrong time.
_AGAIN = (408, 409, 425, 429)
# Of those from 500 on: it will not be otherwise later.
_NEVER = (501, 505)
# The server is busy or gone, whoever asks; the others were this request's.
_BUSY = (429, 502, 503, 504)
# Seconds: a server that asks for more patience than this is asked earlier.
_MOST_PATIENCE = 300.0
_SHOWN = 300
_WHAT_TO_DO = {
    401: "pass the server's API key by an environment variable",
    403: "pass an API key that may ask this",
    404: "see that the URL and the model's name are the server's",
    405: "see that the URL is that of such a server",
    501: "see that the server has been started for this task",
}


class EndpointError(ConnectionError):
    """No server answered as it should: gone, too slow, or not what was expected there.

    status: of an answer that says that the server is another one; None: it was nothing so plain.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class RequestRefused(ValueError):
    """A server is up, and this one request will never have an answer: a text that is too long, say.

    status: of the answer that says so; None: it is what was read of one, which will not do.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Retry:
    """How often a request is tried at each server, and how long it waits in between.

    attempts: at each server, the first among them. first, most: seconds of the first wait and of
    the longest; they double, and half of each is drawn.
    """

    attempts: int = 6
    first: float = 0.5
    most: float = 30.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts={self.attempts}: expected an integer of at least 1")
        if not 0.0 < self.first <= self.most:
            raise ValueError(
                f"first={self.first}, most={self.most}: expected seconds, 0 < first <= most"
            )

    def wait(self, failures: int, asked: float | None = None) -> float:
        """Seconds until the next attempt, after so many failures; no less than the server asked."""
        # 2.0**1023 is the largest.
        longest = min(self.most, self.first * 2.0 ** min(failures - 1, 64))
        return max(longest * random.uniform(0.5, 1.0), min(asked or 0.0, _MOST_PATIENCE))


class Failure(Exception):
    """An attempt that is worth another one.

    reason: what came instead of an answer. busy: whether the server should be left alone for a
    while. after: seconds that it asked for.
    """

    def __init__(self, reason: str, *, busy: bool = False, after: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.busy, self.after = reason, busy, after


def check_status(response: httpx.Response, where: str, hidden: str | None) -> None:
    """Lets an answer of 200 pass.

    Args:
        where: the URL, for messages.
        hidden: what no message may show, whatever the server says.

    Raises:
        Failure: it may answer later.
        RequestRefused: it never will, to this request. EndpointError: nor to others.
    """
    code = response.status_code
    if code == 200:
        return
    said = what_it_says(response)
    if hidden:
        said = said.replace(hidden, "***")
    if (code in _AGAIN or code >= 500) and code not in _NEVER:
        after = _retry_after(response.headers.get("retry-after"))
        raise Failure(f"answered {code} ({said})", busy=code in _BUSY, after=after)
    if code in (400, 413, 422):
        raise RequestRefused(f"{where} refused the request ({code}): {said}", code)
    what = _WHAT_TO_DO.get(code, "see that the URL is that of such a server")
    raise EndpointError(f"{where} answered {code} ({said}): expected 200; {what}", code)


def what_it_says(response: httpx.Response) -> str:
    """The message of an error, in one line: OpenAI's shape, FastAPI's, or the text's beginning."""
    text = response.text
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        error = found.get("error", found)
        if isinstance(error, dict):
            error = error.get("message", error.get("detail", text))
        text = error if isinstance(error, str) else json.dumps(error)
    line = " ".join(text.split()) or response.reason_phrase or "nothing"
    return line if len(line) <= _SHOWN else line[:_SHOWN] + "…"


def _retry_after(text: str | None) -> float | None:
    """Seconds of a Retry-After header, which has them or a date."""
    if text is None:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None
