"""Values on their way from the worker to a client: kept, fetched, put into responses."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import zlib
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="needs fastapi, which comes with vLLM")

import httpx
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from guided_decode.integrations.vllm.client_values.collector import ValueCollector
from guided_decode.integrations.vllm.client_values.middleware import ValuesToClient
from guided_decode.integrations.vllm.client_values.records import (
    Known,
    decoded,
    encoded,
    record,
    token_values,
)
from guided_decode.integrations.vllm.client_values.store import ValueStore
from guided_decode.integrations.vllm.client_values.texts import GrowingText, HandleText
from guided_decode.integrations.vllm.client_values.worker import (
    EXTENSION,
    ValuesOfWorker,
    refuse_unreadable,
)
from guided_decode.prefix import PrefixHandle
from tests import PATIENCE

PROMPT = [7, 8, 9]
# Two samples; V of a text is a hundred times its length, plus its last token.
SAMPLES = [[4, 5, 6], [4, 1]]


def value(tokens):
    return 100.0 * len(tokens) + tokens[-1]


def advantage(t, token):
    return t - 0.5 * token


def records_of(sample, prompt=PROMPT, scored=True):
    """What a worker keeps of a row that wrote a sample; its siblings' tokens are not among it."""
    for t, token in enumerate(sample):
        text = [*prompt, *sample[:t]]
        advantages = {99: -1.0, token: advantage(t, token)} if scored else {}
        yield record(GrowingText(text).digest(), value(text), advantages)


def shown(sample, prompt=PROMPT):
    texts = [[*prompt, *sample[:t]] for t in range(len(sample))]
    return {
        "prefix_values": [value(text) for text in texts],
        "advantages": [advantage(t, token) for t, token in enumerate(sample)],
    }


class Engine:
    """What the middleware asks: a worker's store, behind a call that takes its time."""

    def __init__(self) -> None:
        self.store = ValueStore()
        self.calls = 0
        self.fails = self.hangs = False
        parallel = SimpleNamespace(data_parallel_size=1, worker_extension_cls=EXTENSION)
        self.vllm_config = SimpleNamespace(parallel_config=parallel)

    async def collective_rpc(self, method, args=()):
        assert method == "guided_decode_values"
        self.calls += 1
        if self.fails:
            raise RuntimeError("the engine is dead")
        if self.hangs:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        # As of two ranks, one of which scores nothing.
        return [self.store.take(*args), b""]


class Server:
    """vLLM's two responses with choices, as it writes them, behind the middleware."""

    def __init__(self, engine=None):
        self.engine = engine or Engine()
        self.seen = []
        self.scored = True
        paths = ("/v1/completions", "/v1/chat/completions")
        routes = [Route(path, self.answer, methods=["POST"]) for path in paths]
        self.vllm = Starlette(routes=routes)
        self.vllm.state.engine_client = self.engine
        self.vllm.state.vllm_config = self.engine.vllm_config
        self.values = None

        def middleware(app):
            self.values = ValuesToClient(app)
            return self.values

        self.vllm.add_middleware(middleware)

    async def answer(self, request):
        body = await request.json()
        self.seen.append(body)
        is_chat = "chat" in str(request.url)
        if body.get("stream"):
            events = self.events(body, is_chat)
            return StreamingResponse(events, media_type="text/event-stream")
        for sample in SAMPLES:
            self.write(body, sample)
        ids = bool(body.get("return_token_ids"))
        choices = [
            {"index": i, "token_ids": sample if ids else None, "finish_reason": "stop"}
            | ({} if is_chat else {"prompt_token_ids": PROMPT if ids else None})
            for i, sample in enumerate(SAMPLES)
        ]
        prompt = {"prompt_token_ids": PROMPT if ids else None} if is_chat else {}
        return JSONResponse({"id": "x", "choices": choices, "usage": {"total_tokens": 8}} | prompt)

    def write(self, body, sample, start=0, end=None):
        name = (body.get("vllm_xargs") or {}).get("guide_values_id")
        if name is not None:
            for each in list(records_of(sample, scored=self.scored))[start:end]:
                self.engine.store.add(name, each)

    async def events(self, body, is_chat):
        ids = bool(body.get("return_token_ids"))
        for i in range(len(SAMPLES)):
            choice = {"index": i, "delta": {"role": "assistant"}}
            if is_chat:
                yield self.event([choice], prompt_token_ids=PROMPT if ids else None)
        # The first chunk has two tokens.
        for start, end in ((0, 2), (2, 3)):
            for i, sample in enumerate(SAMPLES):
                piece = sample[start:end]
                if not piece:
                    continue
                self.write(body, sample, start, end)
                choice = {"index": i, "delta": {}} if is_chat else {"index": i, "text": "é"}
                if not is_chat and not start:
                    choice["prompt_token_ids"] = PROMPT if ids else None
                yield self.event([{**choice, "token_ids": piece if ids else None}])
        yield "data: " + json.dumps({"id": "x", "choices": [], "usage": {"total_tokens": 8}})
        yield "\n\ndata: [DONE]\n\n"

    def event(self, choices, **more):
        return "data: " + json.dumps({"id": "x", "choices": choices, **more}) + "\n\n"

    def post(self, path="/v1/chat/completions", *, then=None, **body):
        async def posted():
            transport = httpx.ASGITransport(app=self.vllm)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                response = await client.post(path, json=body)
            if then is not None:
                await then()
            return response

        return asyncio.run(posted())


ASK = {"vllm_xargs": {"guide": 1, "guide_values": 1}}
PATHS = ["/v1/chat/completions", "/v1/completions"]


def choices_of(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def chunks_of(response):
    assert response.status_code == 200, response.text
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.mark.parametrize("path", PATHS)
def test_each_choice_has_a_value_and_an_advantage_a_token(path):
    server = Server()
    choices = choices_of(server.post(path, **ASK))
    assert [choice["guided_decode"] for choice in choices] == [shown(s) for s in SAMPLES]
    # The token ids were for us alone.
    assert all(choice["token_ids"] is None for choice in choices)
    assert len(server.engine.store) == len(server.values._collector) == 0


@pytest.mark.parametrize("path", PATHS)
def test_each_chunk_has_those_of_its_own_tokens(path):
    server = Server()
    chunks = chunks_of(server.post(path, stream=True, **ASK))
    pieces = [choice for chunk in chunks for choice in chunk["choices"]]
    for i, sample in enumerate(SAMPLES):
        own = [p["guided_decode"] for p in pieces if p["index"] == i and "guided_decode" in p]
        joined = {name: [each for piece in own for each in piece[name]] for name in own[0]}
        assert joined == shown(sample)
        assert len(own) == (2 if len(sample) > 2 else 1)
    assert chunks[-1] == {"id": "x", "choices": [], "usage": {"total_tokens": 8}}
    assert all(piece.get("token_ids") is None for piece in pieces)


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_that_the_client_asked_for_stay(stream):
    response = Server().post(stream=stream, return_token_ids=True, **ASK)
    if stream:
        pieces = [choice for chunk in chunks_of(response) for choice in chunk["choices"]]
        tokens = [p["token_ids"] for p in pieces if p["index"] == 0 and "token_ids" in p]
        assert [token for piece in tokens for token in piece] == SAMPLES[0]
    else:
        assert [choice["token_ids"] for choice in choices_of(response)] == SAMPLES
        assert response.json()["prompt_token_ids"] == PROMPT


def test_a_token_that_was_not_scored_has_no_advantage():
    server = Server()
    server.scored = False
    first = choices_of(server.post(**ASK))[0]["guided_decode"]
    assert first == {**shown(SAMPLES[0]), "advantages": [None] * 3}


@pytest.mark.parametrize("path", [*PATHS, "/v1/chat/completions"])
@pytest.mark.parametrize("xargs", [None, {"guide": 1}, {"guide": 1, "guide_values": 0}])
@pytest.mark.parametrize("stream", [False, True])
def test_who_does_not_ask_gets_vllms_own_bytes(path, xargs, stream):
    body = {"stream": stream, "prompt": "guide_values", "vllm_xargs": xargs}
    server, plain = Server(), Server()
    plain.vllm.user_middleware.clear()
    answered = server.post(path, **body)
    assert answered.content == plain.post(path, **body).content
    assert answered.headers == plain.post(path, **body).headers
    assert server.seen == [body]
    assert server.engine.calls == 0


def test_the_request_goes_on_with_a_name_of_its_own():
    server = Server()
    for _ in range(2):
        server.post(**ASK, max_tokens=3)
    names = [body["vllm_xargs"].pop("guide_values_id") for body in server.seen]
    assert len(set(names)) == 2
    assert all(len(name) == 32 for name in names)
    assert server.seen[0] == {**ASK, "max_tokens": 3, "return_token_ids": True}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"vllm_xargs": {"guide_values": 1, "guide_values_id": "x" * 32}},
         "guide_values_id is for engines in process"),
        ({**ASK, "use_beam_search": True}, "vLLM's beam search drops vllm_xargs"),
        ({**ASK, "prompt": "x", "echo": True}, "with them vLLM echoes no text"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused(more, message):
    server = Server()
    response = server.post("/v1/completions", **more)
    assert response.status_code == 400
    assert message in response.text
    assert not server.seen


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("worker_extension_cls", "", "start it with --worker-extension-cls guided_decode."),
        ("worker_extension_cls", "collections.Counter", "cannot be asked for values"),
        ("data_parallel_size", 2, r"came to 2 engines \(data parallelism\)"),
    ],
)
def test_an_engine_that_cannot_be_asked(name, given, message):
    server = Server()
    parallel = server.engine.vllm_config.parallel_config
    setattr(parallel, name, given)
    with pytest.raises(ValueError, match=message):
        refuse_unreadable(parallel)
    assert server.post(**ASK).status_code == 400
    assert choices_of(server.post())[0].keys() == {"index", "token_ids", "finish_reason"}


class Extended(ValuesOfWorker):
    """A user's own extension."""


def test_an_extension_of_the_users_may_inherit_from_ours():
    name = f"{Extended.__module__}.{Extended.__name__}"
    refuse_unreadable(SimpleNamespace(data_parallel_size=1, worker_extension_cls=name))


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_leaves_the_response(stream, caplog):
    server = Server()
    server.engine.fails = True
    response = server.post(stream=stream, **ASK)
    if stream:
        pieces = [c for chunk in chunks_of(response) for c in chunk["choices"]]
        found = next(p["guided_decode"] for p in pieces if "guided_decode" in p)
        assert found == {"prefix_values": [None] * 2, "advantages": [None] * 2}
    else:
        found = choices_of(response)[0]["guided_decode"]
        assert found == {"prefix_values": [None] * 3, "advantages": [None] * 3}
    assert caplog.text.count("responses go without values: the worker did not answer") == 1


class GzippedStream:
    """Compresses streams, too, which Starlette's leaves alone."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        gzip = zlib.compressobj(wbits=31)

        async def compressed(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-encoding", b"gzip")]
            elif message.get("more_body"):
                message["body"] = gzip.compress(message["body"]) + gzip.flush(zlib.Z_SYNC_FLUSH)
            else:
                message["body"] = gzip.compress(message["body"]) + gzip.flush()
            await send(message)

        await self._app(scope, receive, compressed)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_middleware_behind_ours_may_compress(path, stream):
    server, bare = Server(), Server()
    behind = Middleware(GzippedStream) if stream else Middleware(GZipMiddleware, minimum_size=1)
    server.vllm.user_middleware.append(behind)
    plain = server.post(path, stream=stream)
    assert plain.headers["content-encoding"] == "gzip"
    assert plain.content == bare.post(path, stream=stream).content
    response = server.post(path, stream=stream, **ASK)
    assert "content-encoding" not in response.headers
    assert response.content == bare.post(path, stream=stream, **ASK).content


class Coded:
    """Writes responses in a code that nobody here knows."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        async def coded(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-encoding", b"rot13")]
            await send(message)

        await self._app(scope, receive, coded)


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_compression_goes_on_as_it_is(stream, caplog):
    server = Server()
    server.vllm.user_middleware.append(Middleware(Coded))
    for _ in range(2):
        response = server.post(stream=stream, **ASK)
        assert response.status_code == 200
        assert "guided_decode" not in response.text
    assert caplog.text.count("a middleware behind ours compresses them, and not by gzip") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_whatever_fails_the_response_goes_on(stream, monkeypatch, caplog):
    server = Server()
    monkeypatch.setattr(ValueCollector, "known", lambda *_: 1 / 0)
    for _ in range(2):
        response = server.post(stream=stream, **ASK)
        chunks = chunks_of(response) if stream else [response.json()]
        pieces = [c for chunk in chunks for c in chunk["choices"] if "guided_decode" in c]
        assert pieces
        assert all(c["guided_decode"] is c["token_ids"] is None for c in pieces)
    assert response.status_code == 200
    assert caplog.text.count("they could not be put into one: ZeroDivisionError") == 1


def test_what_is_no_json_goes_on_as_it_came():
    server = Server()

    async def broken(request):
        await request.json()
        return Response("{what", media_type="application/json")

    server.vllm.router.routes[:] = [Route(PATHS[0], broken, methods=["POST"])]
    assert server.post(**ASK).text == "{what"


def test_hidden_tokens_have_no_values():
    server = Server()

    async def hidden(request):
        await request.json()
        return JSONResponse({"choices": [{"index": 0, "token_ids": None}]})

    server.answer = hidden
    server.vllm.router.routes[:] = [Route(PATHS[0], hidden, methods=["POST"])]
    assert choices_of(server.post(**ASK)) == [
        {"index": 0, "token_ids": None, "guided_decode": None}
    ]


def test_nothing_is_kept_of_a_client_that_leaves():
    server = Server()
    begun = asyncio.Event()

    async def goes_on_for_ever(request):
        body = await request.json()
        server.write(body, SAMPLES[0])
        begun.set()
        await asyncio.Event().wait()

    server.vllm.router.routes[:] = [Route(PATHS[0], goes_on_for_ever, methods=["POST"])]

    async def leave():
        transport = httpx.ASGITransport(app=server.vllm)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            task = asyncio.create_task(client.post(PATHS[0], json=ASK))
            await asyncio.wait_for(begun.wait(), PATIENCE)
            assert len(server.values._collector) == 1
            task.cancel()
            await asyncio.wait({task})
        assert len(server.values._collector) == 0

    asyncio.run(leave())


def collector(engine, **own):
    async def ask(names):
        return await engine.collective_rpc("guided_decode_values", args=(names,))

    return ValueCollector(ask, **own)


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
        await asyncio.sleep(0)
        assert engine.calls == 1
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


def test_a_response_waits_so_long_and_no_longer():
    async def hung():
        engine = Engine()
        engine.hangs = True
        found = collector(engine, patience=0.01)
        found.open("a")
        known = await asyncio.wait_for(found.known("a", [b"x"], [4]), PATIENCE)
        assert known.lacks([b"x"], [4])
        assert engine.calls == 1

    asyncio.run(hung())


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
    for _ in range(1000):
        store.add("e", one)
    assert store.bytes <= 3 * one.size
    assert caplog.text.count("values that no client fetched are dropped") == 1


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


def test_a_handles_digest_is_that_of_its_tokens_whatever_becomes_of_it():
    text, handle = HandleText(), PrefixHandle(PROMPT)
    assert text.digest(handle) == GrowingText(PROMPT).digest()
    handle.append(4)
    assert text.digest(handle) == GrowingText([*PROMPT, 4]).digest()
    assert text.digest(handle) == GrowingText([*PROMPT, 4]).digest()
    for tokens in ([*PROMPT, 5, 6], PROMPT[:2], [1, 2, 3, 4, 5]):
        handle.sync(tokens)
        assert text.digest(handle) == GrowingText(tokens).digest()
