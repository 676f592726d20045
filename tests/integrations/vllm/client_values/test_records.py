"""What is kept of a text: merged, bounded, and found again by the text's digest."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="needs fastapi, which comes with vLLM")

from guided_decode.integrations.vllm.client_values.offline import take_values
from guided_decode.integrations.vllm.client_values.records import (
    Known,
    decoded,
    encoded,
    record,
    token_values,
)
from guided_decode.integrations.vllm.client_values.store import ValueStore
from guided_decode.integrations.vllm.client_values.texts import GrowingText, HandleText
from guided_decode.integrations.vllm.client_values.worker import EXTENSION
from guided_decode.prefix import PrefixHandle
from tests.integrations.vllm.client_values.served import PROMPT, records_of, shown


def test_what_nobody_fetches_is_dropped_from_the_oldest_on(caplog):
    one = next(iter(records_of([4])))
    store = ValueStore(most_bytes=3 * one.size)
    for name in "abc":
        store.add(name, one)
    assert decoded(store.take("a")) == {"a": [one]}
    store.add("a", one)
    store.add("d", one)
    # What was fetched once is the newest.
    assert decoded(store.take("abcd")) == {name: [one] for name in "cad"}
    assert store.bytes == len(store) == 0
    assert caplog.text.count("values that no client fetched are dropped") == 1


def test_of_one_name_the_newest_stay():
    several = list(records_of([*range(10, 20)]))
    store = ValueStore(most_bytes=sum(each.size for each in several[-3:]))
    for each in several:
        store.add("a", each)
        assert store.bytes <= 3 * each.size
    assert decoded(store.take("a")) == {"a": several[-3:]}
    assert store.bytes == 0


def test_in_process_it_is_said_how_many_tokens_have_nothing(caplog):
    sample = [4, 5, 6]
    several = list(records_of(sample))
    store = ValueStore(most_bytes=2 * several[0].size)
    for each in several:
        store.add("a", each)

    class Llm:
        llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(
            data_parallel_size=1, worker_extension_cls=EXTENSION)))  # fmt: skip

        def collective_rpc(self, method, args):
            return [store.take(*args), b""]

    samples = [SimpleNamespace(token_ids=each) for each in (sample, sample[:1])]
    outputs = [SimpleNamespace(prompt_token_ids=PROMPT, outputs=samples)]
    ((first, second),) = take_values(Llm(), outputs, "a")
    whole = shown(sample)
    assert first.prefix_values == [None, *whole["prefix_values"][1:]]
    assert first.advantages == [None, *whole["advantages"][1:]]
    assert second == ([None], [None])
    assert "2 of 4 tokens have no values" in caplog.text
    caplog.clear()
    for each in several[1:]:
        store.add("a", each)
    take_values(Llm(), [], "a")
    assert not caplog.text


def test_what_is_no_number_is_left_out():
    kept = record(b"x", math.inf, {3: math.nan, 4: math.inf, 5: -1.5})
    (back,) = decoded(encoded({"a": [kept]}))["a"]
    assert math.isnan(back.value)
    assert [back.advantage(token) for token in (3, 4, 5, 6)] == [None, None, -1.5, None]


def test_steps_of_one_text_know_together_what_each_knows():
    text = GrowingText(PROMPT).digest()
    steps = [
        record(text, None, {}, final=False),
        record(text, 1.5, {4: 0.25, 5: -0.5}, final=True),
        # Pruned, and of other candidates.
        record(text, 1.5, {}, final=False),
        record(text, None, {5: -0.5, 6: 2.0}, final=True),
    ]
    for order in itertools.permutations(steps):
        known = Known()
        known.add(order)
        assert token_values(known, [text] * 4, [4, 5, 6, 7]) == (
            [1.5] * 4, [0.25, -0.5, 2.0, None]
        )  # fmt: skip
        found = known.get(text)
        assert found.final
        assert len(found.tokens) == 3 * 8
        assert len(found.advantages) == 3 * 4


def test_the_digests_before_tokens_are_those_of_the_texts():
    text = GrowingText(PROMPT)
    tokens = [4, 2**40, 0]
    whole = [*PROMPT, *tokens]
    copy = text.copy()
    expected = [GrowingText(whole[: len(PROMPT) + i]).digest() for i in range(4)]
    assert text.digests_before(tokens) == expected[:3]
    assert text.digest() == expected[3]
    assert text.length == len(whole)
    assert copy.digest() == expected[0]
    assert copy.length == len(PROMPT)


def test_a_candidate_is_found_by_its_whole_id():
    # The bytes of 1 also stand across those of the first two.
    one = record(b"x", 1.0, {2**56: 0.25, 0: 0.5, 1: -1.5})
    assert [one.advantage(token) for token in (2**56, 0, 1, 2)] == [0.25, 0.5, -1.5, None]


def test_a_handles_digest_is_that_of_its_tokens_whatever_becomes_of_it():
    text, handle = HandleText(), PrefixHandle(PROMPT)
    assert text.text(handle).digest() == GrowingText(PROMPT).digest()
    handle.append(4)
    assert text.text(handle).digest() == GrowingText([*PROMPT, 4]).digest()
    assert text.text(handle).digest() == GrowingText([*PROMPT, 4]).digest()
    for tokens in ([*PROMPT, 5, 6], PROMPT[:2], [1, 2, 3, 4, 5]):
        handle.sync(tokens)
        assert text.text(handle).digest() == GrowingText(tokens).digest()
