"""The order in which requests are scored: all that arrived at once, and no client before others."""

import threading
import time

import numpy as np
import pytest
import torch

from guided_decode import PrefixHandle
from guided_decode.scoring.remote.failures import ScorerBusyError
from guided_decode.serving import Limits
from guided_decode.serving.jobs import FairQueue, Job
from tests import models
from tests.serving.served import CLOSE, client, critic, served


def job(name, costs, number=1):
    return Job(b"peer", name, number, "scorer", [None] * len(costs),
               np.zeros((len(costs), 2), np.int32), costs)  # fmt: skip


def rounds(queue, tokens):
    """Who was taken in each round: (client, rows)."""
    taken = []
    while queue:
        taken.append([(s.job.client.decode(), s.stop - s.start) for s in queue.take(tokens)])
    return taken


def test_all_that_waits_goes_together():
    queue = FairQueue()
    for name in (b"a", b"b", b"c"):
        queue.add(job(name, [3, 3]))
    assert (len(queue), queue.tokens) == (3, 18)
    assert rounds(queue, 100) == [[("a", 2), ("b", 2), ("c", 2)]]
    assert (len(queue), queue.tokens) == (0, 0)


def test_a_large_request_leaves_room_for_small_ones():
    queue = FairQueue()
    queue.add(job(b"large", [10] * 10))
    queue.add(job(b"small", [10]))
    assert rounds(queue, 40)[:2] == [[("large", 2), ("small", 1)], [("large", 4)]]


def test_a_row_larger_than_a_share_is_taken_alone():
    queue = FairQueue()
    queue.add(job(b"a", [1000, 1000, 1]))
    queue.add(job(b"b", [1]))
    assert rounds(queue, 10) == [[("a", 1), ("b", 1)], [("a", 1)], [("a", 1)]]


def test_requests_of_one_client_go_in_their_order_and_clients_take_turns():
    queue = FairQueue()
    for number in range(3):
        queue.add(job(b"a", [6], number))
        queue.add(job(b"b", [6], number))
    firsts = [taken[0][0] for taken in rounds(queue, 12)]
    assert firsts == ["a", "b", "a"]


def test_a_job_without_rows_is_taken_and_one_that_is_dropped_is_not():
    queue = FairQueue()
    queue.add(job(b"a", []))
    gone = job(b"b", [5, 5])
    queue.add(gone)
    queue.drop(gone)
    assert queue.tokens == 0
    assert rounds(queue, 10) == [[("a", 0)]]


class Slow:
    """The tiny critic, whose calls take their time and are counted with their rows."""

    def __init__(self, seconds):
        self._scorer, self._seconds, self.calls = critic(), seconds, []

    def __getattr__(self, name):
        return getattr(self._scorer, name)

    def score(self, prefixes, candidates):
        self.calls.append(len(prefixes))
        time.sleep(self._seconds)
        return self._scorer.score(prefixes, candidates)


def at_once(*work):
    """Runs each piece on a thread; returns what they return."""
    answers = [None] * len(work)

    def run(i):
        try:
            answers[i] = work[i]()
        except Exception as error:
            answers[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_what_arrives_during_a_forward_shares_the_next_one():
    scorer = Slow(0.3)
    with served(scorer) as server:
        clients = [client(server) for _ in range(6)]
        rows = [[PrefixHandle(p)] for p in models.prompts([5, 9, 20, 40, 7, 3])]
        candidates = [torch.arange(3, 4 + i)[None] for i in range(6)]
        one, *others = [lambda i=i: clients[i].score(rows[i], candidates[i]) for i in range(6)]
        first = threading.Thread(target=one)
        first.start()
        time.sleep(0.1)
        answers = at_once(*others)
        first.join()
    assert scorer.calls == [1, 5]
    local = critic()
    for row, chosen, answer in zip(rows[1:], candidates[1:], answers, strict=True):
        wanted = local.score(row, chosen)
        torch.testing.assert_close(answer.values, wanted.values, **CLOSE)
        torch.testing.assert_close(answer.baseline, wanted.baseline, **CLOSE)


def test_one_clients_error_is_its_own():
    scorer = Slow(0.2)
    too_long = [5] * (models.POSITIONS + 1)
    with served(scorer) as server:
        clients = [client(server) for _ in range(4)]
        asked = [[[5, 6]], [[7, 8, 9]], [[5], too_long], [[4]]]
        candidates = [torch.full((len(rows), 2), 3) for rows in asked]
        work = [lambda i=i: clients[i].score(asked[i], candidates[i]) for i in range(4)]
        first = threading.Thread(target=work[0])
        first.start()
        time.sleep(0.07)
        fine, refused, short = at_once(*work[1:])
        first.join()
        assert server.counts.failed == 1
    assert str(refused).startswith(f"row 1 needs {models.POSITIONS + 2} positions")
    assert isinstance(refused, ValueError)
    local = critic()
    for answer, i in ((fine, 1), (short, 3)):
        torch.testing.assert_close(answer.values, local.score(asked[i], candidates[i]).values,
                                   **CLOSE)  # fmt: skip


def test_more_than_may_wait_is_refused_in_words():
    scorer = Slow(0.3)
    refusal = (
        "0 tokens wait and 124 came, of at most 100: ask for fewer rows at a time, try again "
        "later, or start it with a larger --max-waiting-tokens"
    )
    with served(scorer, limits=Limits(max_waiting_tokens=100)) as server:
        one, two, three = (client(server) for _ in range(3))
        candidates = torch.tensor([[3, 4, 5]])
        with pytest.raises(ScorerBusyError, match=refusal):
            one.score([[5] * 120], candidates)
        first = threading.Thread(target=lambda: one.score([[5] * 20], candidates))
        first.start()
        time.sleep(0.1)
        fits, busy = at_once(
            lambda: two.score([[6] * 80], candidates),
            lambda: (time.sleep(0.05), three.score([[7] * 30], candidates))[1],
        )
        first.join()
        assert isinstance(busy, ScorerBusyError)
        torch.testing.assert_close(fits.values, critic().score([[6] * 80], candidates).values,
                                   **CLOSE)  # fmt: skip
        # It is up, and there is room again.
        three.score([[7] * 30], candidates)
        assert server.counts.busy == 2
        assert server.waiting_tokens == 0


def test_a_request_larger_than_a_round_is_answered_whole():
    with served(critic(), limits=Limits(round_tokens=64)) as server:
        prefixes = models.prompts([3, 100, 30, 7, 60, 1, 2])
        candidates = torch.arange(7 * 3).view(7, 3)
        remote, local = client(server), critic()
        wanted, got = local.score(prefixes, candidates), remote.score(prefixes, candidates)
        torch.testing.assert_close(got.values, wanted.values, **CLOSE)
        torch.testing.assert_close(got.baseline, wanted.baseline, **CLOSE)
        assert server.counts.rounds > 3
        bad = [*prefixes, [5] * (models.POSITIONS + 1)]
        with pytest.raises(ValueError, match="row 7 needs"):
            remote.score(bad, torch.arange(8 * 3).view(8, 3))
        remote.score(prefixes, candidates)
        assert server.waiting_tokens == 0
