"""A server as vLLM's, without a model: its responses, its worker's store, the middleware."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import httpx
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from guided_decode.integrations.vllm.client_values.collector import ValueCollector
from guided_decode.integrations.vllm.client_values.middleware import ValuesToClient
from guided_decode.integrations.vllm.client_values.records import record
from guided_decode.integrations.vllm.client_values.store import ValueStore
from guided_decode.integrations.vllm.client_values.texts import GrowingText
from guided_decode.integrations.vllm.client_values.worker import EXTENSION
from guided_decode.integrations.vllm.request import check_request

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
        self.wakes = asyncio.Event()
        parallel = SimpleNamespace(data_parallel_size=1, worker_extension_cls=EXTENSION)
        self.vllm_config = SimpleNamespace(parallel_config=parallel)

    async def collective_rpc(self, method, args=()):
        assert method == "guided_decode_values"
        self.calls += 1
        if self.fails:
            raise RuntimeError("the engine is dead")
        if self.hangs:
            await self.wakes.wait()
        await asyncio.sleep(0)
        # As of two ranks, one of which scores nothing.
        return [self.store.take(*args), b""]


def collector(engine, **own):
    async def ask(names):
        return await engine.collective_rpc("guided_decode_values", args=(names,))

    return ValueCollector(ask, **own)


class Server:
    """vLLM's two responses with choices, as it writes them, behind the middleware."""

    def __init__(self, engine=None):
        self.engine = engine or Engine()
        self.seen = []
        self.scored = True
        paths = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
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
        try:
            # As vLLM checks parameters, on whichever thread.
            given = SimpleNamespace(extra_args=body.get("vllm_xargs"), stop_token_ids=None)
            await asyncio.get_running_loop().run_in_executor(None, check_request, given, None)
        except ValueError as error:
            return JSONResponse({"error": {"message": str(error)}}, 400)
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

    def post(self, path="/v1/chat/completions", *, content=None, **body):
        """content: the body as it is; else it is the JSON of the rest."""
        content = json.dumps(body) if content is None else content

        async def posted():
            transport = httpx.ASGITransport(app=self.vllm)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                return await client.post(path, content=content)

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
