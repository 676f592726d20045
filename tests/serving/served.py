"""A scorer server on a thread of this process, and small scorers to serve."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

from guided_decode import load_scorer
from guided_decode.checkpoints.loading import UnknownPolicyWarning
from guided_decode.scorer import Scorer
from guided_decode.scoring.remote import RemoteScorer
from guided_decode.serving import ScorerServer
from tests import models, trunk_heads

ANYWHERE = "tcp://127.0.0.1:0"
# Values of one row in one batch and in another differ by float32's rounding.
CLOSE = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}


@contextlib.contextmanager
def served(scorer: Scorer, listen: str = ANYWHERE, **options: Any) -> Iterator[ScorerServer]:
    """A server that answers while the block runs; a failure of its loop is raised behind it."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            server.serve()
        except BaseException as error:
            failures.append(error)

    with ScorerServer(scorer, listen, **options) as server:
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join()
    if failures:
        raise failures[0]


def critic(**own: Any) -> Scorer:
    """The tiny critic, with a cache of its own."""
    return load_scorer(models.tiny("llama", "token"), kind="verl-critic", **own)


def every_kind() -> dict[str, Any]:
    """How to load one scorer of each kind, by name."""
    lm = functools.partial(models.tiny, "llama", "lm")
    token = functools.partial(models.tiny, "llama", "token")
    reward = functools.partial(models.tiny, "llama", "sequence")
    return {
        "critic": lambda: critic(),
        "ppo-critic": lambda: load_scorer(token(), kind="ppo-critic"),
        "reward-model": lambda: load_scorer(reward()),
        "companions": lambda: critic(reward=reward(seed=3), reference=lm()),
        "implicit": lambda: load_scorer(lm(seed=1), kind="implicit", reference=lm()),
        "trunk-head": lambda: load_scorer(lm(), head=trunk_heads.linear()),
    }


def client(server: ScorerServer, **options: Any) -> RemoteScorer:
    """A client that did not go through `load_scorer`."""
    return RemoteScorer(server.address, **options)


def loaded(server: ScorerServer, **options: Any) -> RemoteScorer:
    """A client as a user has it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownPolicyWarning)
        scorer = load_scorer(server.address, **options)
    assert isinstance(scorer, RemoteScorer)
    return scorer


def nobody_left(server: ScorerServer) -> bool:
    """Whether all clients have gone, with their sessions; their last words may be under way."""
    end = time.monotonic() + 60
    while len(server.sessions) and time.monotonic() < end:
        time.sleep(0.05)
    return not len(server.sessions) and server.sessions.clients == 0
