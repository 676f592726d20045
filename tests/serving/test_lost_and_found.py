"""Servers that go, come back, come back as others, or take too long."""

import contextlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
import zmq

from guided_decode import GuidanceConfig, PrefixHandle
from guided_decode.guidance.step import guide_rows
from guided_decode.scoring.remote import RemoteScorer, ScorerServerError, wire
from tests import PATIENCE, models
from tests.serving.served import ANYWHERE, CLOSE, client, critic, loaded, nobody_left, served

CANDIDATES = torch.tensor([[3, 4, 5]])


def until_answered(work, seconds=20):
    """What `work` returns once it does not fail any more."""
    end = time.monotonic() + seconds
    while True:
        try:
            return work()
        except ScorerServerError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def test_a_server_that_restarts_between_calls_is_asked_again_and_nobody_notices():
    handle = PrefixHandle(models.prompts([100])[0])
    local = critic()
    with served(critic()) as server:
        remote, address = client(server), server.address
        remote.score([handle], CANDIDATES)
    for _ in range(3):
        with served(critic(), address):
            handle.append(6)
            wanted = local.score([handle], CANDIDATES)
            torch.testing.assert_close(
                remote.score([handle], CANDIDATES).values, wanted.values, **CLOSE
            )
    assert remote.wire_counters()["rows_asked_again"] == 3
    assert remote.wire_counters()["reopened"] >= 1


def test_while_it_is_away_calls_fail_and_soon_and_then_it_is_found():
    handle = PrefixHandle(models.prompts([100])[0])
    with served(critic()) as server:
        remote, address = client(server), server.address
        remote.score([handle], CANDIDATES)
    with pytest.raises(ScorerServerError, match=f"{address} went away: rows cannot be scored"):
        remote.score([handle], CANDIDATES)
    begun = time.perf_counter()
    for _ in range(50):
        with pytest.raises(ScorerServerError, match=f"{address} does not answer: it is looked for"):
            remote.score([handle], CANDIDATES)
    # Decoding goes on without it: a call costs next to nothing.
    assert time.perf_counter() - begun < 1.0
    with served(critic(), address):
        answer = until_answered(lambda: remote.score([handle], CANDIDATES))
        torch.testing.assert_close(
            answer.values, critic().score([handle], CANDIDATES).values, **CLOSE
        )


def test_rows_go_on_unguided_and_are_counted_while_it_is_away():
    logits = torch.randn(2, models.VOCAB, generator=torch.Generator().manual_seed(0))
    handles, config = [PrefixHandle(p) for p in models.prompts([5, 9])], GuidanceConfig(top_k=4)

    def guided(scorer):
        return guide_rows(scorer, logits, handles, config, on_error="passthrough")

    wanted = guided(critic())
    with served(critic()) as server:
        remote, address = client(server), server.address
        torch.testing.assert_close(guided(remote), wanted, rtol=0, atol=1e-4)
    assert torch.equal(guided(remote), logits)
    assert torch.equal(guided(remote), logits)
    assert remote.stats.passthroughs == 4
    with served(critic(), address):
        until_answered(lambda: remote.score(handles, CANDIDATES.expand(2, -1)))
        torch.testing.assert_close(guided(remote), wanted, rtol=0, atol=1e-4)
    assert remote.stats.passthroughs == 4


def test_another_scorer_at_the_address_is_never_taken_for_the_first():
    handle = PrefixHandle([5, 6, 7])
    with served(critic()) as server:
        remote, address = client(server), server.address
        wanted = remote.score([handle], CANDIDATES).values
    other = critic(terminal="critic")
    with served(other, address) as server:
        for _ in range(3):
            with pytest.raises(ScorerServerError, match=(
                r"serves another scorer now: it was LlamaForTokenClassification \(101 tokens, "
                r"terminal 'baseline'\) and is LlamaForTokenClassification \(101 tokens, terminal "
                r"'critic'\); call load_scorer again"
            )):  # fmt: skip
                until_answered_or_other(remote, handle)
        assert server.counts.rows == 0
    with served(critic(), address):
        got = until_answered(lambda: remote.score([handle], CANDIDATES)).values
        torch.testing.assert_close(got, wanted, **CLOSE)


def test_a_server_that_came_back_with_less_room_is_the_same_and_says_so():
    with served(critic()) as server:
        remote, address = client(server), server.address
        assert remote.refusal([5] * 300, 3) is None
    with served(critic(cache_tokens=200), address):
        until_answered(lambda: remote.score([[5]], CANDIDATES))
        assert remote.refusal([5] * 100, 3) is None
        assert remote.refusal([5] * 300, 3) == (
            "cache_tokens=200 is too small for one row of LlamaForTokenClassification: its prefix "
            "has 300 tokens and 3 candidates, so cache_tokens must be at least 303"
        )


def until_answered_or_other(remote, handle):
    """Calls until the server that is there has said what it serves."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return remote.score([handle], CANDIDATES)
        except ScorerServerError as error:
            if "another scorer" in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.05)


class Held:
    """The tiny critic, whose next call waits until it is let go."""

    def __init__(self):
        self._scorer, self.go = critic(), threading.Event()
        self.go.set()

    def __getattr__(self, name):
        return getattr(self._scorer, name)

    def score(self, prefixes, candidates):
        assert self.go.wait(PATIENCE)
        return self._scorer.score(prefixes, candidates)


def test_an_answer_that_does_not_come_in_time_and_its_late_arrival():
    scorer = Held()
    handle = PrefixHandle([5, 6, 7])
    with served(scorer) as server:
        remote = loaded(server, timeout=2.0)
        remote.score([handle], CANDIDATES)
        scorer.go.clear()
        with pytest.raises(ScorerServerError, match=r"gave no answer within 2 s"):
            remote.score([handle], CANDIDATES)
        with pytest.raises(ScorerServerError, match="does not answer"):
            remote.score([handle], CANDIDATES)
        scorer.go.set()
        handle.append(9)
        got = until_answered(lambda: remote.score([handle], CANDIDATES[:, :1]))
        wanted = critic().score([handle], CANDIDATES[:, :1])
        torch.testing.assert_close(got.values, wanted.values, **CLOSE)


def test_a_call_that_is_interrupted_leaves_the_next_one_right():
    scorer = Held()
    handle = PrefixHandle(models.prompts([70])[0])
    with served(scorer) as server:
        remote = client(server)
        remote.score([handle], CANDIDATES)
        scorer.go.clear()
        handle.append(5)
        main = threading.main_thread().ident
        timer = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            remote.score([handle], CANDIDATES)
        timer.join()
        scorer.go.set()
        handle.append(6)
        got = remote.score([handle], CANDIDATES[:, :2])
        wanted = critic().score([handle], CANDIDATES[:, :2])
        torch.testing.assert_close(got.values, wanted.values, **CLOSE)


class Broken:
    """The tiny critic, which fails when it is told to."""

    def __init__(self):
        self._scorer, self.error = critic(), None

    def __getattr__(self, name):
        return getattr(self._scorer, name)

    def score(self, prefixes, candidates):
        if self.error is not None:
            raise self.error
        return self._scorer.score(prefixes, candidates)


def test_a_scorer_that_fails_is_told_and_the_server_goes_on():
    scorer = Broken()
    with served(scorer) as server:
        remote = client(server)
        scorer.error = RuntimeError("the scorer broke")
        with pytest.raises(ScorerServerError, match="7.0.0.1:.*: RuntimeError: the scorer broke"):
            remote.score([[5, 6]], CANDIDATES)
        scorer.error = None
        assert remote.score([[5, 6]], CANDIDATES)
        assert server.counts.failed == 1


def test_a_device_that_fails_ends_the_server_and_whoever_waits_is_told():
    scorer = Broken()
    scorer.error = torch.AcceleratorError("an illegal memory access")
    told = []

    def ask_a_server_that_fails():
        with served(scorer) as server:
            try:
                client(server).score([[5, 6]], CANDIDATES)
            except ScorerServerError as error:
                told.append(str(error))

    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        ask_a_server_that_fails()
    assert told[0].endswith("AcceleratorError: an illegal memory access")


def test_all_who_wait_are_told_that_the_device_failed():
    scorer, told = Broken(), []
    asked, go = threading.Event(), threading.Event()

    def breaks(prefixes, candidates):
        asked.set()
        assert go.wait(PATIENCE)
        raise torch.AcceleratorError("an illegal memory access")

    def asks(remote):
        with pytest.raises(ScorerServerError) as refusal:
            remote.score([[5, 6]], CANDIDATES)
        told.append(str(refusal.value))

    def serve():
        with served(scorer) as server:
            clients = [client(server, timeout=60) for _ in range(3)]
            scorer.score = breaks
            threads = [threading.Thread(target=asks, args=(each,)) for each in clients]
            threads[0].start()
            assert asked.wait(PATIENCE)
            for thread in threads[1:]:
                thread.start()
            # Their requests arrive while the scorer is at work.
            time.sleep(0.5)
            go.set()
            for thread in threads:
                thread.join()

    with pytest.raises(torch.AcceleratorError):
        serve()
    assert len(told) == 3
    assert all(each.endswith("AcceleratorError: an illegal memory access") for each in told)


def test_no_server_at_all():
    begun = time.perf_counter()
    with pytest.raises(ScorerServerError, match=(
        r"no scorer server answers at tcp://127\.0\.0\.1:1 within 0\.3 s .*start one with "
        r"guided-decode scorer MODEL --listen tcp://127\.0\.0\.1:1$"
    )):  # fmt: skip
        RemoteScorer("tcp://127.0.0.1:1", connect_seconds=0.3)
    assert time.perf_counter() - begun < 2


def test_a_client_waits_for_a_server_that_is_starting():
    with served(critic(), ANYWHERE) as server:
        address = server.address
    found = []

    def connect():
        found.append(RemoteScorer(address, connect_seconds=20))

    thread = threading.Thread(target=connect)
    thread.start()
    time.sleep(0.5)
    with served(critic(), address):
        thread.join()
        assert found[0].score([[5]], CANDIDATES)


def test_a_greeting_that_was_lost_with_its_server_is_sent_again():
    with served(critic(), ANYWHERE) as server:
        address = server.address
    found = []

    def connect():
        found.append(RemoteScorer(address, connect_seconds=20))

    thread = threading.Thread(target=connect)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as silent:
        silent.linger = 0
        silent.bind(address)
        thread.start()
        _, *greeting = silent.recv_multipart()
        assert wire.read_request(greeting)[0] == wire.Hello()
    with served(critic(), address):
        thread.join()
        assert found[0].score([[5]], CANDIDATES)


def test_what_is_in_work_when_the_end_comes_is_answered():
    scorer = Held()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(served(scorer))
        clients = [client(server) for _ in range(4)]
        scorer.go.clear()
        answers = []
        threads = [
            threading.Thread(target=lambda c=c: answers.append(c.score([[5, 6]], CANDIDATES)))
            for c in clients
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        server.stop()
        time.sleep(0.1)
        scorer.go.set()
        for thread in threads:
            thread.join()
    wanted = critic().score([[5, 6]], CANDIDATES).values
    assert len(answers) == 4
    for answer in answers:
        torch.testing.assert_close(answer.values, wanted, **CLOSE)


def test_a_process_that_ends_does_not_hang():
    code = """
        import torch
        from guided_decode import PrefixHandle
        from guided_decode.scoring.remote import RemoteScorer
        remote = RemoteScorer({address!r})
        handle = PrefixHandle([5, 6])
        remote.score([handle], torch.tensor([[3]]))
        print("scored")
    """
    with served(critic()) as server:
        ended = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code).format(address=server.address)],
            capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
        assert (ended.stdout, ended.returncode) == ("scored\n", 0), ended.stderr
        assert nobody_left(server)
