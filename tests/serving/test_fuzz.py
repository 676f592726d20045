"""Eight clients at random, and all that can go wrong: every answer is the local scorer's."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

import psutil
import pytest
import torch

from guided_decode import PrefixHandle
from guided_decode.scoring.remote import RemoteScorer, ScorerServerError
from guided_decode.scoring.remote.prefix_hash import PrefixHash
from guided_decode.serving import Limits, ScorerServer
from tests import ROOT, models
from tests.serving.served import ANYWHERE, CLOSE, critic

CLIENTS = 8
MOST = 300
# Few sessions and few tokens: what clients know is often gone.
LIMITS = Limits(max_sessions=24, max_session_tokens=2_500, session_seconds=0.2, round_tokens=400)


class Restarting:
    """A server that ends and comes back at its address, with a scorer that remembers nothing."""

    def __init__(self) -> None:
        self.cache_tokens = 1_500
        self.restarts, self.counts = 0, {}
        self.server = self._server(ANYWHERE)
        self.address = self.server.address
        self._thread = self._start()

    def _server(self, listen: str) -> ScorerServer:
        scorer = critic(cache_tokens=self.cache_tokens, reference=models.tiny("llama", "lm"))
        return ScorerServer(scorer, listen, limits=LIMITS)

    def _start(self) -> threading.Thread:
        thread = threading.Thread(target=self.server.serve)
        thread.start()
        return thread

    def restart(self) -> None:
        self.end()
        time.sleep(0.05)
        self.server = self._server(self.address)
        self._thread = self._start()
        self.restarts += 1

    def end(self) -> None:
        self.server.stop()
        self._thread.join()
        for name, count in self.server.counters().items():
            self.counts[name] = self.counts.get(name, 0) + count
        self.server.close()


@dataclass
class Fuzz:
    """One client's life."""

    address: str
    calls: int
    seed: int
    wrong: list[str] = field(default_factory=list)
    answered: int = 0
    failed: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        # Small, so that what grows in this process is no cache that fills.
        self.local = critic(cache_tokens=2_000, reference=models.tiny("llama", "lm"))
        self.stems = models.prompts([3, 40, 66, 130, 200], seed=1)
        self.handles: list[PrefixHandle] = []

    def run(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self.wrong.append(repr(error))

    def _run(self) -> None:
        remote = RemoteScorer(self.address, connect_seconds=30)
        while self.answered < self.calls and not self.wrong:
            if self.random.random() < 0.01:
                # It goes without a word, or with one.
                if self.random.random() < 0.5:
                    remote._client.line._hang_up(0)
                    remote._client.line.is_up = False
                remote = RemoteScorer(self.address, connect_seconds=30)
            self._change()
            self._spoil(remote)
            rows = [self._prefix() for _ in range(self.random.choice([0, 1, 1, 2, 5]))]
            k = self.random.choice([0, 1, 4, 4, 9])
            candidates = torch.tensor(
                [[self.random.randrange(-1, models.VOCAB) for _ in range(k)] for _ in rows],
                dtype=torch.int64,
            ).view(len(rows), k)
            try:
                self._check(remote, rows, candidates)
                self.answered += 1
            except ScorerServerError:
                self.failed += 1
                time.sleep(0.02)
        remote.close()

    def _check(self, remote: RemoteScorer, rows: list, candidates: torch.Tensor) -> None:
        if self.random.random() < 0.2:
            got = remote.reference.log_probs(rows, candidates)
            wanted = self.local.reference.log_probs(rows, candidates)
            torch.testing.assert_close(got, wanted, **CLOSE)
            return
        got, wanted = remote.score(rows, candidates), self.local.score(rows, candidates)
        torch.testing.assert_close(got.values, wanted.values, **CLOSE)
        torch.testing.assert_close(got.baseline, wanted.baseline, **CLOSE)

    def _prefix(self):
        if not self.handles or self.random.random() < 0.1:
            return list(self.random.choice(self.stems))
        return self.random.choice(self.handles)

    def _change(self) -> None:
        """Handles grow, fork, are cut back, change, end and begin."""
        draw = self.random
        if not self.handles or (len(self.handles) < 8 and draw.random() < 0.3):
            self.handles.append(PrefixHandle(draw.choice(self.stems)))
        handle = draw.choice(self.handles)
        what = draw.random()
        if what < 0.5:
            handle.extend(
                [draw.randrange(3, models.VOCAB) for _ in range(draw.choice([1, 1, 1, 9]))]
            )
        elif what < 0.6:
            self.handles.append(PrefixHandle(handle.tokens))
        elif what < 0.65:
            handle.rewind(draw.randrange(1, len(handle) + 1))
        elif what < 0.7:
            handle.sync(handle.tokens[: draw.randrange(1, len(handle) + 1)].tolist())
        elif what < 0.75:
            changed = handle.tokens.tolist()
            changed[draw.randrange(len(changed))] = draw.randrange(3, models.VOCAB)
            handle.sync(changed)
        elif what < 0.85 or len(handle) > MOST:
            self.handles.remove(handle)

    def _spoil(self, remote: RemoteScorer) -> None:
        """What the client believes of the server is wrong, or the hash that it would send is."""
        sessions = list(remote._client.sessions._sessions.values())
        if not sessions or self.random.random() > 0.1:
            return
        session, other = self.random.choice(sessions), self.random.choice(sessions)
        what = self.random.random()
        if what < 0.3:
            session.hash._digest = b"wrong" * 3 + b"!"
        elif what < 0.6:
            session.hash = PrefixHash()
        else:
            # Each is taken for the other, whose tokens the server has under its number.
            session.number, other.number = other.number, session.number


def resident() -> int:
    """This process's bytes without what the C library has and does not use."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


def fuzz(calls: int, restarts: int) -> tuple[Restarting, list[Fuzz], list[int]]:
    """The server, its clients when each is done, and this process's bytes on the way."""
    torch.set_num_threads(1)
    server = Restarting()
    clients = [Fuzz(server.address, calls // CLIENTS, seed) for seed in range(CLIENTS)]
    threads = [threading.Thread(target=client.run) for client in clients]
    memory = []
    try:
        for thread in threads:
            thread.start()
        for part in range(1, restarts + 1):
            goal = part * calls // (restarts + 1)
            while sum(c.answered for c in clients) < goal and not any(c.wrong for c in clients):
                time.sleep(0.02)
            server.restart()
            memory.append(resident())
        for thread in threads:
            thread.join()
        left = time.monotonic() + 10
        while len(server.server.sessions) and time.monotonic() < left:
            time.sleep(0.05)
        held = server.server.counters()
    finally:
        server.end()
    assert held["sessions"] == held["session_tokens"] == held["clients"] == 0
    assert held["waiting_tokens"] == 0
    return server, clients, memory


def assert_right(server: Restarting, clients: list[Fuzz], calls: int) -> None:
    assert [client.wrong for client in clients] == [[]] * CLIENTS
    assert sum(client.answered for client in clients) >= calls // CLIENTS * CLIENTS
    # All that the test is for did happen.
    assert server.counts["rows_asked_again"] > calls // 50
    assert server.counts["sessions_evicted"] > 0
    assert server.counts["sessions_expired"] > 0
    assert server.counts["scorer_evictions"] > 0
    assert server.counts["failed"] == server.counts["malformed"] == 0
    # Clients met in one forward.
    assert server.counts["rounds"] < server.counts["requests"]


def test_five_hundred_calls():
    server, clients, _ = fuzz(500, restarts=3)
    assert_right(server, clients, 500)


def ten_thousand_calls() -> None:
    """Run in a process of its own, in which oneDNN keeps few of the kernels that it made."""
    server, clients, memory = fuzz(10_000, restarts=20)
    assert_right(server, clients, 10_000)
    # From a fifth of the way on, a restart's new caches included.
    assert memory[-1] - memory[4] < 60 * 2**20, [m >> 20 for m in memory]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ten_thousand_calls_and_flat_memory():
    run = f"from {__name__} import ten_thousand_calls; ten_thousand_calls()"
    # Its caches of 1,024, one a thread, are full only after as many shapes of a forward.
    few = dict.fromkeys(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), "8")
    own = few | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", run], cwd=ROOT, env=os.environ | own, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
