"""Orders of a leader: what is said arrives as it was."""

import numpy as np
import pytest

from guided_decode.forward.packed import Segment
from guided_decode.forward.shard_orders import Forward, Order, decoded, encoded

RANDOM = np.random.default_rng(0)


def numbers(*shape):
    return RANDOM.integers(0, 1 << 40, shape)


@pytest.mark.parametrize("read", [None, numbers(0), numbers(3)], ids=["hidden", "none", "some"])
@pytest.mark.parametrize(
    "writes",
    [
        [],
        [[(0, 3, numbers(5))]],
        [[(7, 0, numbers(2)), (1, 9, numbers(0))], [], [(2, 2, numbers(1))]],
    ],
    ids=["nothing", "one", "several"],
)
def test_a_forward_arrives_as_it_was_sent(read, writes):
    segments = [Segment(0, 4, 2, 8, 12, 3), Segment(6, 0, 1, 5, 5, 0)]
    sent = Forward(numbers(3, 7), segments, read, (16, 512), writes)
    order = encoded(2, sent)
    assert order.dtype == np.int64
    assert order[:2].tolist() == [Order.FORWARD, 2]
    got = decoded(order)
    np.testing.assert_array_equal(got.tokens, sent.tokens)
    assert (got.segments, got.table) == (segments, (16, 512))
    assert (got.read is None) == (read is None)
    if read is not None:
        np.testing.assert_array_equal(got.read, read)
    assert [
        [(row, start, slots.tolist()) for row, start, slots in write] for write in got.writes
    ] == [[(row, start, slots.tolist()) for row, start, slots in write] for write in writes]


def test_an_order_does_not_grow_with_a_prefix_that_is_cached():
    def step(length):
        forward = Forward(
            numbers(3, 16), [Segment(0, 0, 16, length, length, 0)], None, (8, 8192),
            [[(0, length - 1, numbers(1))]],
        )  # fmt: skip
        return len(encoded(0, forward))

    assert step(4096) == step(16)
