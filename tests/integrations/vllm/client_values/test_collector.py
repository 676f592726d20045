"""Asking the worker: once for all, no longer than need be, and until all is known."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("fastapi", reason="needs fastapi, which comes with vLLM")

from guided_decode.integrations.vllm.client_values.records import record, token_values
from guided_decode.integrations.vllm.client_values.responses import ResponseValues
from guided_decode.integrations.vllm.client_values.texts import GrowingText
from tests import PATIENCE
from tests.integrations.vllm.client_values.served import (
    PROMPT,
    SAMPLES,
    Engine,
    collector,
    records_of,
)


def test_all_who_wait_share_one_call():
    async def many():
        engine = Engine()
        found = collector(engine)
        names = [f"{i:032}" for i in range(32)]
        for name in names:
            found.open(name)
            for each in records_of(SAMPLES[0]):
                engine.store.add(name, each)
        first = GrowingText(PROMPT).digest()
        known = await asyncio.gather(*(found.known(name, [first], [4]) for name in names))
        assert not any(each.lacks([first], [4]) for each in known)
        assert found.calls == engine.calls == 1

    asyncio.run(many())


def test_a_record_is_found_though_a_call_began_before_it_was_kept():
    async def late():
        engine = Engine()
        found = collector(engine)
        found.open("a")
        early = found.ahead()
        while not engine.calls:
            await asyncio.sleep(0)
        ask, first = engine.store.take, GrowingText(PROMPT).digest()
        engine.store.take = lambda names: b""
        waits = asyncio.create_task(found.known("a", [first], [4]))
        await early
        engine.store.take = ask
        engine.store.add("a", next(iter(records_of(SAMPLES[0]))))
        assert not (await waits).lacks([first], [4])
        assert engine.calls == 2

    asyncio.run(late())


@pytest.mark.parametrize("early", [None, 1.0])
def test_what_came_of_a_part_of_a_prompt_is_not_the_last_word(early):
    """V1 calls for each chunk of a prompt with the whole of it; a fetch may fall between them.

    early: V as it was read then; of the policy's own hidden states it is not.
    """

    async def chunked():
        engine = Engine()
        found = collector(engine)
        found.open("a")
        text = GrowingText(PROMPT).digest()
        engine.store.add("a", record(text, early, {11: 0.25} if early else {}, final=False))
        await found.ahead()
        engine.store.add("a", record(text, 1.0, {4: 0.5}, final=False))
        known = await found.known("a", [text], [4])
        assert token_values(known, [text], [4]) == ([1.0], [0.5])
        assert engine.calls == 2
        # Whoever has that token, too, has all there is.
        await found.known("a", [text], [4])
        assert engine.calls == 2

    asyncio.run(chunked())


def test_a_hung_engine_is_waited_for_once_for_all(caplog):
    """By all choices of a response, and by all responses after it, until it answers again."""

    async def hung():
        engine = Engine()
        engine.hangs = True
        found = collector(engine, patience=0.01, every=PATIENCE)
        waited = 0
        wait = asyncio.wait

        async def counted(tasks, timeout=None):
            nonlocal waited
            waited += found.ahead() in tasks
            return await wait(tasks, timeout=timeout)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asyncio, "wait", counted)
            for name in "abc":
                found.open(name)
                values = ResponseValues(name, found, keep_ids=False, choices=8)
                choices = [{"index": i, "token_ids": [i]} for i in range(8)]
                await values.add({"prompt_token_ids": PROMPT, "choices": choices})
                nothing = {"prefix_values": [None], "advantages": [None]}
                assert all(choice["guided_decode"] == nothing for choice in choices)
        assert waited == engine.calls == 1
        assert caplog.text.count("nothing came within 0.01 seconds") == 1
        engine.hangs = False
        await found.ahead()
        await sees(found, engine, "a")

    asyncio.run(hung())


async def sees(found, engine, name):
    text = GrowingText(PROMPT).digest()
    engine.store.add(name, record(text, 1.0, {4: 0.5}))
    known = await found.known(name, [text], [4])
    assert token_values(known, [text], [4]) == ([1.0], [0.5])


def test_what_an_answer_brings_late_is_kept():
    async def late():
        engine = Engine()
        engine.hangs = True
        found = collector(engine, patience=0.01, every=PATIENCE)
        found.open("a")
        text = GrowingText(PROMPT).digest()
        engine.store.add("a", record(text, 1.0, {4: 0.5}))
        assert (await found.known("a", [text], [4])).lacks([text], [4])
        # With nothing to wait for, it is there at once.
        engine.wakes.set()
        await asyncio.wait_for(asyncio.gather(*found._answers), PATIENCE)
        known = await found.known("a", [text], [4])
        assert token_values(known, [text], [4]) == ([1.0], [0.5])
        assert engine.calls == 1
        assert not found._answers

    asyncio.run(late())


def test_what_the_worker_does_not_have_is_asked_for_once():
    async def absent():
        engine = Engine()
        found = collector(engine)
        found.open("a")
        for i in range(5):
            await found.known("a", [b"%d" % i], [4])
            assert engine.calls == i + 1

    asyncio.run(absent())


def test_a_failure_is_said_again_after_an_answer(caplog):
    async def failing():
        engine = Engine()
        found = collector(engine)
        found.open("a")
        for fails in (True, True, False, True, True):
            engine.fails = fails
            await found.ahead()

    asyncio.run(failing())
    assert caplog.text.count("the worker did not answer: the engine is dead") == 2


def test_the_worker_is_relieved_while_nobody_waits():
    async def idle():
        engine = Engine()
        found = collector(engine, every=0.001)
        found.open("a")
        for each in records_of(SAMPLES[0]):
            engine.store.add("a", each)

        async def relieved():
            while len(engine.store):
                await asyncio.sleep(0.001)

        await asyncio.wait_for(relieved(), PATIENCE)
        # With the last response that ends, so does that.
        found.close("a")
        await asyncio.wait_for(found._relief, PATIENCE)

    asyncio.run(idle())
