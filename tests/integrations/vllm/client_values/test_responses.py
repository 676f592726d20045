"""Long responses, and long streams: whose turn it is, and what is kept."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("fastapi", reason="needs fastapi, which comes with vLLM")

from guided_decode.integrations.vllm.client_values.records import record
from guided_decode.integrations.vllm.client_values.responses import ResponseValues
from guided_decode.integrations.vllm.client_values.texts import GrowingText
from tests.integrations.vllm.client_values.served import Engine, collector

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
        await ResponseValues("a", found, keep_ids=True).add(answer)
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
        await ResponseValues("a", found, keep_ids=True).add({"choices": choices})

    asyncio.run(several())
    assert [c["guided_decode"]["prefix_values"] for c in choices] == [[2.0], [2.0], [1.0], [1.0]]
