"""Values in the responses of a server: whole, streamed, compressed, failing."""

from __future__ import annotations

import asyncio
import json
import zlib
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="needs fastapi, which comes with vLLM")

import httpx
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from guided_decode.integrations.vllm.client_values.collector import ValueCollector
from guided_decode.integrations.vllm.client_values.names import NAMES
from guided_decode.integrations.vllm.client_values.worker import (
    ValuesOfWorker,
    refuse_unreadable,
)
from guided_decode.integrations.vllm.request import check_request
from tests import PATIENCE
from tests.integrations.vllm.client_values.served import (
    ASK,
    PATHS,
    PROMPT,
    SAMPLES,
    Server,
    choices_of,
    chunks_of,
    shown,
)


@pytest.mark.parametrize("path", PATHS)
def test_each_choice_has_a_value_and_an_advantage_a_token(path):
    server = Server()
    choices = choices_of(server.post(path, **ASK))
    assert [choice["guided_decode"] for choice in choices] == [shown(s) for s in SAMPLES]
    # The token ids were for us alone.
    assert all(choice["token_ids"] is None for choice in choices)
    assert len(server.engine.store) == len(server.values._collector) == 0
    assert not NAMES._names
    assert not NAMES._served


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
        ({**ASK, "use_beam_search": True}, "vLLM's beam search drops vllm_xargs"),
        ({**ASK, "use_beam_search": "yes"}, "vLLM's beam search drops vllm_xargs"),
        ({**ASK, "prompt": "x", "echo": True}, "with them vLLM echoes no text"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused(more, message):
    server = Server()
    response = server.post("/v1/completions", **more)
    assert response.status_code == 400
    assert message in response.text
    assert not server.seen


def test_what_vllm_takes_for_false_is_false():
    off = {"use_beam_search": "false", "echo": "0", "return_token_ids": "no"}
    (first, _) = choices_of(Server().post("/v1/completions", **ASK, prompt="x", **off))
    assert first["guided_decode"] == shown(SAMPLES[0])
    assert first["token_ids"] is None


OWN = '{"vllm_xargs": {"guide_values": 1, "guide_values_id": "0123456789abcdef"}}'


@pytest.mark.parametrize("path", [*PATHS, "/v1/responses"])
@pytest.mark.parametrize("body", [OWN, OWN.replace("_", "\\u005f").replace("vllm\\u005f", "vllm_")])
def test_a_name_of_the_clients_own_is_refused_on_every_route(path, body):
    server = Server()
    response = server.post(path, content=body)
    assert response.status_code == 400
    assert "guide_values_id is for engines in process" in response.text
    assert not server.seen
    # In process, where nobody is served, it is the caller's to choose.
    given = json.loads(OWN)["vllm_xargs"]
    check_request(SimpleNamespace(extra_args=given, stop_token_ids=None), None)


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
