"""Long responses, and long streams: whose turn it is, and what is kept."""

from __future__ import annotations

import asyncio
import json

import pytest

pytest.importorskip("fastapi", reason="needs fastapi, which comes with vLLM")

from guided_decode.integrations.vllm.client_values.records import record
from guided_decode.integrations.vllm.client_values.requests import asked_of
from guided_decode.integrations.vllm.client_values.responses import ResponseValues
from guided_decode.integrations.vllm.client_values.texts import GrowingText
from tests.integrations.vllm.client_values.served import (
    ASK,
    PROMPT,
    Engine,
    collector,
    records_of,
    shown,
)

PIECE = 1024


def test_others_have_their_turn_while_a_long_response_is_written(monkeypatch):
    prompt, samples, length = list(range(2000)), 4, 5 * PIECE
    choices = [{"index": i, "token_ids": [i] * length} for i in range(samples)]
    hashed = []
    extend = GrowingText.extend

    def counted(text, tokens):
        hashed.append(len(tokens))
        extend(text, tokens)

    monkeypatch.setattr(GrowingText, "extend", counted)

    async def long():
        engine, turns = Engine(), 0
        found = collector(engine)
        found.open("a")
        for each in choices:
            texts = GrowingText(prompt).digests_before(each["token_ids"])
            for t, text in enumerate(texts):
                engine.store.add("a", record(text, float(t), {each["index"]: 0.5}))
        hashed.clear()

        async def others():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        ticks = asyncio.create_task(others())
        answer = {"prompt_token_ids": prompt, "choices": choices}
        await ResponseValues("a", found, keep_ids=True, choices=samples).add(answer)
        ticks.cancel()
        return turns

    pieces = samples * length // PIECE
    # Its texts, its records, what is lacking, and its values.
    assert asyncio.run(long()) >= 4 * pieces
    for choice in choices:
        found = choice["guided_decode"]
        assert found["prefix_values"][1:] == [float(t) for t in range(1, length)]
        assert found["advantages"] == [0.5] * length
    # The prompt that all share is read once.
    assert hashed.count(len(prompt)) == 1


def test_choices_of_several_prompts_stand_behind_their_own():
    prompts = [[1, 2], [1, 2], [3], [3]]
    choices = [
        {"index": i, "token_ids": [5], "prompt_token_ids": prompt}
        for i, prompt in enumerate(prompts)
    ]

    async def several():
        engine = Engine()
        found = collector(engine)
        found.open("a")
        for prompt in ([1, 2], [3]):
            text = GrowingText(prompt).digest()
            engine.store.add("a", record(text, float(len(prompt)), {5: 0.5}))
        await ResponseValues("a", found, keep_ids=True, choices=4).add({"choices": choices})

    asyncio.run(several())
    assert [c["guided_decode"]["prefix_values"] for c in choices] == [[2.0], [2.0], [1.0], [1.0]]


def streamed(samples, order, choices=None):
    """Of a stream of single tokens of these choices: most records at once, those at the end.

    order: whose token comes when.
    """

    async def stream():
        engine = Engine()
        found = collector(engine)
        found.open("a")
        known = await found.known("a", [], [])
        values = ResponseValues("a", found, keep_ids=True, choices=choices or len(samples))
        for i in range(len(samples)):
            opening = {"index": i, "delta": {"role": "assistant"}}
            await values.add({"choices": [opening], "prompt_token_ids": PROMPT})
        most, at = 0, [0] * len(samples)
        for i in order:
            t = at[i]
            engine.store.add("a", list(records_of(samples[i]))[t])
            ends = "stop" if t + 1 == len(samples[i]) else None
            choice = {"index": i, "token_ids": [samples[i][t]], "finish_reason": ends}
            await found.ahead()
            most = max(most, len(known))
            await values.add({"choices": [choice]})
            expected = shown(samples[i])
            assert choice["guided_decode"]["prefix_values"] == [expected["prefix_values"][t]]
            assert choice["guided_decode"]["advantages"] == [expected["advantages"][t]]
            at[i] += 1
        return most, len(known)

    return asyncio.run(stream())


LONG = [[4] * 30, [4] * 10 + [5] * 20]


def test_a_stream_keeps_what_a_choice_may_still_come_by():
    assert streamed(LONG[:1], [0] * 30) == (1, 0)
    # In step, and one behind the other.
    assert streamed(LONG, [0, 1] * 30) == (2, 0)
    assert streamed(LONG, [0] * 30 + [1] * 30) == (30, 0)
    # One that has yet to begin.
    assert streamed(LONG[:1], [0] * 30, choices=2) == (30, 30)
    # One that is over holds nobody up.
    short = [LONG[0], [5]]
    assert streamed(short, [0] * 5 + [1] + [0] * 25) == (5, 0)


@pytest.mark.parametrize(
    ("own", "choices"),
    [
        ({}, 1),
        ({"n": 3}, 3),
        ({"n": "3"}, 3),
        ({"prompt": "x", "n": None}, 1),
        ({"prompt": ["x", "y"], "n": 2}, 4),
        ({"prompt": [5, 6, 7], "n": 2}, 2),
        ({"prompt": [[5, 6, 7], [8]], "n": 2}, 4),
    ],
)
def test_a_request_says_how_many_choices_it_has(own, choices):
    body = json.dumps({**ASK, **own}).encode()
    assert asked_of(body).choices == choices
