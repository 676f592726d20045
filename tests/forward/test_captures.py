"""Captures of CUDA graphs: on the scorer's own device, and nothing left of one that fails."""

import copy
import threading
import types
import warnings

import pytest
import torch

from guided_decode import load_scorer
from guided_decode.forward.graphs import GraphedForward, Shape
from guided_decode.forward.packed import PackedBatch
from guided_decode.forward.stream_order import StreamOrder
from tests import models
from tests.forward.fake_cuda import FakeCuda
from tests.forward.test_graphs import scorer_like_a_gpus


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


def model_on(device, *, has_kernel=True):
    pool = types.SimpleNamespace(capacity=100)
    return types.SimpleNamespace(
        device=device,
        has_kernel=has_kernel,
        cache=types.SimpleNamespace(pool=pool),
        most_graph_tokens=512,
    )


TABLE = torch.zeros(1, 64, dtype=torch.int32)


def batch(tokens=3):
    stacked = torch.arange(3 * tokens).view(3, tokens)
    segments = torch.zeros(1, 3, dtype=torch.int32)
    return PackedBatch(
        stacked, *stacked.unbind(), [], TABLE, None,
        segment_table=segments, most_queries=tokens, most_positions=tokens,
    )  # fmt: skip


def graphed(cuda, index, forward=None, **options):
    forward = forward or (lambda given: cuda.launch())
    return GraphedForward(model_on(cuda.devices[index], **options), forward)


def test_each_of_two_scorers_is_captured_and_replayed_on_its_own_device(cuda):
    for index in (1, 0, 1):
        forward, cuda.events[:] = graphed(cuda, index), []
        for tokens in (3, 3, 12):
            assert forward.run(batch(tokens))
        assert {event[1:] for event in cuda.events} == {(index, index)}
        assert [kind for kind, *_ in cuda.events].count("replay") == 3
        assert [kind for kind, *_ in cuda.events].count("launch") == 2 * 3
        assert cuda.current == cuda.devices[0]
        assert cuda.streams == cuda.default
    assert [stream.device.index for stream in cuda.made] == [1, 0, 1], "one a scorer"
    assert cuda.captures == [(i, i, ("pool", i)) for i in (1, 1, 0, 0, 1, 1)]


def test_a_forward_that_waits_is_never_captured(cuda, caplog):
    forward = graphed(cuda, 1, lambda given: cuda.wait())
    assert not forward.run(batch())
    assert cuda.captures == []
    assert "the host waits for the device at" in caplog.text
    assert not forward.works
    assert (cuda.mode, cuda.current, cuda.streams) == (0, cuda.devices[0], cuda.default)
    # Nor tried again.
    assert not forward.run(batch(12))
    assert caplog.text.count("CUDA graphs are off") == 1


def test_heads_without_a_kernel_are_never_captured(cuda):
    forward = graphed(cuda, 1, has_kernel=False)
    assert not forward.run(batch())
    assert cuda.events == cuda.captures == cuda.made == []


def test_another_threads_wait_does_not_count(cuda):
    def work(given):
        other = threading.Thread(target=lambda: cuda.mode and cuda.wait())
        if not cuda.capturing:
            other.start()
            other.join()
        cuda.launch()

    assert graphed(cuda, 0, work).run(batch())


def test_other_warnings_of_the_warm_up_are_shown(cuda):
    def work(given):
        warnings.warn("something else", stacklevel=1)
        cuda.launch()

    with pytest.warns(UserWarning, match="something else"):
        assert graphed(cuda, 0, work).run(batch())


def test_after_a_capture_that_failed_sampling_works_and_the_stream_is_what_it_was(cuda, caplog):
    """A wait that only a capture has: its end raises, and torch puts nothing back."""
    forward = graphed(cuda, 1, lambda given: cuda.wait() if cuda.capturing else cuda.launch())
    assert not forward.run(batch())
    assert len(cuda.captures) == 1
    assert "CUDA graphs are off" in caplog.text
    assert (cuda.current, cuda.streams) == (cuda.devices[0], cuda.default)
    cuda.generators[1].sample()
    assert cuda.ended_pools == [(1, ("pool", 1))]


def test_a_capture_without_room_loses_that_shape_alone(cuda, caplog):
    def work(given):
        if cuda.capturing and given.stacked.shape[1] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        cuda.launch()

    forward = graphed(cuda, 0, work)
    assert not forward.run(batch(12))
    assert not forward.run(batch(12))
    assert forward.run(batch(3))
    assert forward.works
    assert len(cuda.captures) == 2
    assert "a forward of 16 tokens runs without a CUDA graph" in caplog.text


def test_calls_on_streams_of_their_own_follow_one_another(cuda):
    order = StreamOrder(cuda.devices[1])
    mine, other = cuda.new_stream("cuda:1"), cuda.new_stream("cuda:1")
    waits = []
    for stream in (mine, other):
        stream.wait_stream = lambda last, this=stream: waits.append((this, last))
    for stream in (mine, mine, other, mine):
        with cuda.stream(stream), cuda.device("cuda:0"):
            order.begin()
    assert waits == [(other, mine), (mine, other)]
    # A copy has called nothing yet.
    copied = copy.deepcopy(order)
    with cuda.stream(other):
        copied.begin()
    assert len(waits) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_threads_may_have_streams_of_their_own():
    scorer = load_scorer(
        copy.deepcopy(models.tiny("llama", "token")).to("cuda"), kind="verl-critic"
    )
    rows, candidates = models.prompts([40, 40, 40, 40], seed=9), torch.arange(3, 11)[None]
    expected = [scorer.score([row], candidates).values.cpu() for row in rows]
    for turn in range(20):
        if turn % 5 == 0:
            scorer.cache.clear()
        for row, each in zip(rows, expected, strict=True):
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.testing.assert_close(scorer.score([row], candidates).values.cpu(), each)


def test_what_is_prepared_is_captured_once_and_the_largest_first(cuda):
    sizes = []
    forward = graphed(cuda, 1, lambda given: sizes.append(given.stacked.shape[1]))
    shapes = [Shape(16 * rows, rows, 16, 700) for rows in range(1, 50)]
    forward.prepare(shapes, TABLE, None)
    # What exceeds the longest graph, 32 rows, is left out.
    assert sizes[::3] == [512, 384, 256, 192, 128, 96, 64, 48, 32, 16]
    assert {index for index, _, _ in cuda.captures} == {1}
    assert [kind for kind, *_ in cuda.events].count("replay") == 0
    forward.prepare(shapes, TABLE, None)
    assert len(cuda.captures) == len(forward) == 10


def test_a_model_knows_whether_its_heads_have_a_kernel(monkeypatch):
    packed = scorer_like_a_gpus().model
    assert packed.has_kernel
    assert not type(packed)(packed.model.double(), "wide", cache_tokens=8, fused=True).has_kernel
