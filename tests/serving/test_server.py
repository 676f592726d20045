"""A scorer behind a server is the scorer itself: the same values, errors and conventions."""

import copy
import os
import pickle
import threading

import pytest
import torch

from guided_decode import GuidanceConfig, PrefixHandle, Scorer
from guided_decode.guidance.step import guide_rows
from guided_decode.scorer import LogProbs
from tests import models
from tests.serving.served import CLOSE, client, critic, every_kind, nobody_left, served

KINDS = list(every_kind())
SAME = ("vocab_size", "terminal", "bos_token_id", "eos_token_id", "scores_vocabulary")
BOS, EOS, VOCAB = models.BOS, models.EOS, models.VOCAB


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    """(the scorer itself, a client of a server that has the same one)."""
    load = every_kind()[request.param]
    with served(load()) as server:
        remote = client(server)
        yield load(), remote
        remote.close()


def rows(seed=0, lengths=(1, 5, 70, 130), k=4):
    """(prefixes, candidates with padding, some repeated)."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = models.prompts(list(lengths), seed=seed, bos=True)
    candidates = torch.randint(0, VOCAB, (len(prefixes), k), generator=generator)
    candidates[torch.rand(candidates.shape, generator=generator) < 0.2] = -1
    candidates[0, :2] = 7
    return prefixes, candidates


def assert_same(local, remote, prefixes, candidates):
    wanted, got = (each.score(prefixes, candidates) for each in (local, remote))
    assert got.values.dtype == got.baseline.dtype == torch.float32
    assert got.values.shape == candidates.shape
    assert torch.equal(got.values.isnan(), candidates < 0)
    torch.testing.assert_close(got.values, wanted.values, **CLOSE)
    torch.testing.assert_close(got.baseline, wanted.baseline, **CLOSE)


def test_it_is_a_scorer_with_the_same_conventions(pair):
    local, remote = pair
    for one, other in ((local, remote), (local.reward, remote.reward)):
        assert (one is None) == (other is None)
        if one is not None:
            assert isinstance(other, Scorer)
            assert [getattr(other, name) for name in SAME] == [getattr(one, name) for name in SAME]
    assert (local.reference is None) == (remote.reference is None)
    assert remote.reference is None or isinstance(remote.reference, LogProbs)


def test_lists_tensors_and_handles_that_grow(pair):
    local, remote = pair
    prefixes, candidates = rows()
    assert_same(local, remote, prefixes, candidates)
    assert_same(local, remote, [torch.tensor(p) for p in prefixes], candidates.int())
    handles = [PrefixHandle(prefix) for prefix in prefixes]
    for step in range(6):
        _, candidates = rows(seed=step)
        assert_same(local, remote, handles, candidates)
        for i, handle in enumerate(handles):
            handle.extend([3 + step] * (1 + (i + step) % 3))


def test_rewound_forked_and_repeated_handles(pair):
    local, remote = pair
    (_, _, prefix, longer), candidates = rows(seed=5)
    one, two = PrefixHandle(prefix), PrefixHandle(longer)
    asked = [one, two, one, PrefixHandle(longer[:100])]
    assert_same(local, remote, asked, candidates)
    one.append(9)
    two.sync(longer[:80])
    assert_same(local, remote, asked, candidates)
    two.sync([BOS, 8, 7])
    assert_same(local, remote, [*asked[:3], PrefixHandle(longer)], candidates)


def test_no_rows_and_no_candidates(pair):
    local, remote = pair
    prefixes, _ = rows()
    assert_same(local, remote, prefixes, torch.empty(4, 0, dtype=torch.int64))
    assert_same(local, remote, [], torch.empty(0, 3, dtype=torch.int64))


def test_the_reference_and_the_reward_model(pair):
    local, remote = pair
    prefixes, candidates = rows(seed=2)
    if local.reference is not None:
        wanted, got = (s.reference.log_probs(prefixes, candidates) for s in (local, remote))
        torch.testing.assert_close(got, wanted, **CLOSE)
    if local.reward is not None:
        assert_same(local.reward, remote.reward, prefixes, candidates)


def test_guided_logits(pair):
    local, remote = pair
    prefixes, _ = rows(seed=3)
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1))
    logits[:, EOS] += 5.0
    config = GuidanceConfig(beta=2.0, top_k=5, kl_coef=0.1 if local.reference is not None else 0.0)
    wanted, got = (
        guide_rows(scorer, logits, prefixes, config, terminals=[EOS]) for scorer in (local, remote)
    )
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
    if local.scores_vocabulary:
        whole = config.changed(top_k=None)
        wanted, got = (guide_rows(s, logits, prefixes, whole) for s in (local, remote))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


BAD = {
    "an empty prefix": ([[5], []], [[3], [3]]),
    "a token that is none": ([[5], [VOCAB]], [[3], [3]]),
    "a negative token": ([[-4]], [[3]]),
    "a token beyond int32": ([[2**40]], [[3]]),
    "a candidate that is none": ([[5]], [[VOCAB]]),
    "a candidate of -2": ([[5]], [[-2]]),
    "too many positions": ([[5], [5] * (models.POSITIONS + 1)], [[3], [3]]),
    "no tokens": ([["a"]], [[3]]),
    "floats": ([torch.ones(3)], [[3]]),
    "text": ("abc", [[3], [3], [3]]),
    "another number of rows": ([[5], [6]], [[3]]),
    "more candidates than tokens": ([[5]], [[3] * (VOCAB + 1)]),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_the_scorer_refuses_is_refused_in_its_words(pair, bad):
    local, remote = pair
    prefixes, candidates = BAD[bad]
    messages = []
    for scorer in (local, remote):
        with pytest.raises(ValueError, match=r".") as refused:
            scorer.score(prefixes, torch.tensor(candidates))
        messages.append(str(refused.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("length", [0, 1, models.POSITIONS - 1, models.POSITIONS, 600])
def test_refusals_are_the_scorers(pair, length):
    local, remote = pair
    for prefix in ([5] * length, PrefixHandle([5] * length), PrefixHandle([BOS] + [5] * length)):
        for count in (0, 1, 3):
            assert remote.refusal(prefix, count) == local.refusal(prefix, count)
    assert remote.refusal([5, VOCAB], 1) == local.refusal([5, VOCAB], 1)


def test_a_row_that_is_refused_leaves_the_others_guided():
    with served(critic()) as server:
        remote, local = client(server), critic()
        prefixes = [*models.prompts([5, 9]), [5] * (models.POSITIONS + 1)]
        logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
        config = GuidanceConfig(top_k=4)
        wanted, got = (
            guide_rows(scorer, logits, prefixes, config, on_error="passthrough")
            for scorer in (local, remote)
        )
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
        assert torch.equal(got[2], logits[2])
        assert remote.stats.passthroughs == 1


def test_bytes_of_a_step_do_not_grow_with_the_prefix():
    with served(critic()) as server:
        remote, sent = client(server), {}
        for length in (32, 128, 480):
            handle = PrefixHandle(models.prompts([length])[0])
            candidates = torch.arange(3, 19)[None]
            remote.score([handle], candidates)
            before = remote.wire_counters()
            for token in range(5, 15):
                handle.append(token)
                remote.score([handle], candidates)
            after = remote.wire_counters()
            sent[length] = after["bytes_sent"] - before["bytes_sent"]
            assert after["bytes_received"] - before["bytes_received"] < 10 * 4 * 17 + 10 * 40
        # A row's length is one to three bytes in msgpack.
        assert max(sent.values()) - min(sent.values()) <= 10 * 4
        # A token and 16 candidates, a row's header, and the message's.
        assert max(sent.values()) <= 10 * (4 * 17 + 32 + 90)
        assert remote.wire_counters()["rows_asked_again"] == 0


def test_counters_of_both_sides():
    with served(critic()) as server:
        remote = client(server)
        handle = PrefixHandle(models.prompts([20])[0])
        candidates = torch.tensor([[3, 4, -1]])
        remote.score([handle], candidates)
        handle.append(4)
        remote.score([handle], candidates)
        stats = remote.stats
        assert (stats.rows_scored, stats.prefix_tokens, stats.candidate_tokens) == (2, 21, 4)
        assert stats.cache_hits == 20
        assert stats.seconds > 0
        counters = remote.server_counters()
        assert (counters["requests"], counters["rows"], counters["rounds"]) == (2, 2, 2)
        assert (counters["sessions"], counters["clients"], counters["session_tokens"]) == (1, 1, 21)
        # The chosen candidate was found there: 20 tokens of the prompt, and four candidates.
        assert counters["scorer_prefix_tokens"] == 20
        assert counters["scorer_candidate_tokens"] == 4
        assert counters["waiting_tokens"] == 0


def test_a_handle_that_goes_takes_its_session_along():
    with served(critic()) as server:
        remote = client(server)
        kept, gone = PrefixHandle([5, 6]), PrefixHandle([7, 8])
        one = torch.tensor([[3], [4]])
        remote.score([kept, gone], one)
        assert len(server.sessions) == 2
        del gone
        remote.score([kept], one[:1])
        assert len(server.sessions) == 1
        remote.close()
        remote.score([kept], one[:1])
        assert len(server.sessions) == 1
        remote.close()
        assert nobody_left(server)


def test_a_client_that_is_collected_says_goodbye():
    with served(critic()) as server:
        remote = client(server)
        remote.score([PrefixHandle([5, 6])], torch.tensor([[3]]))
        assert server.sessions.clients == 1
        del remote
        assert nobody_left(server)


def test_copies_have_a_line_of_their_own_and_pickles_are_refused():
    with served(critic()) as server:
        remote = client(server)
        handle, candidates = PrefixHandle([5, 6, 7]), torch.tensor([[3, 4]])
        wanted = remote.score([handle], candidates)
        copied = copy.deepcopy(remote)
        torch.testing.assert_close(copied.score([handle], candidates), wanted)
        assert server.sessions.clients == 2
        with pytest.raises(TypeError, match="call load_scorer in each process instead"):
            pickle.dumps(remote)


def test_a_fork_has_a_line_of_its_own():
    with served(critic()) as server:
        remote = client(server)
        handle, candidates = PrefixHandle([5, 6, 7]), torch.tensor([[3, 4]])
        wanted = remote.score([handle], candidates).values
        child = os.fork()
        if not child:
            code = 1
            try:
                got = remote.score([handle], candidates).values
                code = 0 if torch.allclose(got, wanted, atol=1e-5) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        torch.testing.assert_close(remote.score([handle], candidates).values, wanted)
        assert server.sessions.clients == 2


def test_threads_may_share_a_client():
    with served(critic()) as server:
        remote, local = client(server), critic()
        prefixes, candidates = rows(seed=1)
        wanted = local.score(prefixes, candidates)
        failures = []

        def work():
            try:
                handles = [PrefixHandle(prefix) for prefix in prefixes]
                for _ in range(20):
                    got = remote.score(handles, candidates)
                    torch.testing.assert_close(got.values, wanted.values, **CLOSE)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert remote.stats.rows_scored == 4 * 20 * 4
