"""A server of completions in this process, for tests: exact, and as bad as they ask for."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from guided_decode.search import Continuation, Sampling
from tests.search.quiet_server import QuietHandler, QuietServer

MODEL = "policy"


@dataclass
class Bad:
    """An answer as servers should not give it. after: seconds before it comes."""

    status: int = 200
    text: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    after: float = 0.0
    cut: bool = False


class CompletionServer:
    """vLLM's completions over HTTP, of a model that is any object.

    model: draw(prefix, max_tokens, sampling, seed) -> Continuation and log_probs(prefix) -> list of
    the whole distribution. tokenizer: for text. behave: (number of the request, its body) -> Bad,
    or None for the right answer; and what it does to that one. plain: OpenAI's fields alone, no
    token ids. max_logprobs: −1 is all. lists: its models.
    """

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.behave = options.pop("behave", lambda number, body: None)
        self.change = options.pop("change", lambda body, answer: answer)
        self.plain = options.pop("plain", False)
        self.lists = options.pop("lists", True)
        self.names = options.pop("names", [MODEL])
        self.max_model_len = options.pop("max_model_len", 4096)
        self.max_logprobs = options.pop("max_logprobs", 20)
        self.key = options.pop("key", None)
        assert not options
        self.bodies: list[dict[str, Any]] = []
        self.most, self._now, self._lock = 0, 0, threading.Lock()

    @contextlib.contextmanager
    def running(self) -> Iterator[CompletionServer]:
        http = QuietServer(("127.0.0.1", 0), self._handler())
        thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{http.server_address[1]}"
        try:
            yield self
        finally:
            http.shutdown()
            http.server_close()

    def asked(self) -> list[dict[str, Any]]:
        """The requests since the last time that this was called."""
        with self._lock:
            bodies, self.bodies = self.bodies, []
        return bodies

    def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        """The right answer: its status, and JSON."""
        prompt = body["prompt"]
        ids = self.tokenizer.encode(prompt, add_special_tokens=False) if isinstance(
            prompt, str) else prompt  # fmt: skip
        if body["model"] not in self.names:
            return 404, {"error": {"message": f"The model {body['model']} does not exist."}}
        if len(ids) + body["max_tokens"] > self.max_model_len:
            return 400, {"error": {"message": f"maximum context length is {self.max_model_len}"}}
        wanted = body["logprobs"]
        if self.max_logprobs != -1 and not 0 <= wanted <= self.max_logprobs:
            return 400, {"error": {"message": f"Requested sample logprobs of {wanted}, which is "
                                   f"greater than max allowed: {self.max_logprobs}"}}  # fmt: skip
        how = Sampling(body["temperature"], body["top_p"], tuple(body.get("stop", ())))
        drawn = self.model.draw(tuple(ids), body["max_tokens"], how, body.get("seed", 0))
        return 200, self._choice(body, ids, drawn, wanted)

    def _choice(self, body: Any, ids: Any, drawn: Continuation, wanted: int) -> Any:
        tokens = list(drawn.tokens)
        named = body.get("return_tokens_as_token_ids") and not self.plain

        def name(token: int) -> str:
            return f"token_id:{token}" if named else self.tokenizer.decode([token])

        top: list[Any] = [{} for _ in tokens]
        whole = self.model.log_probs(tuple(ids)) if wanted else []
        order = sorted(range(len(whole)), key=lambda i: -whole[i])
        for i in order if wanted == -1 else order[:wanted]:
            top[0][name(i)] = max(whole[i], -9999.0)
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        choice = {
            "index": 0, "text": text, "finish_reason": "length" if drawn.reason == "length" else
            "stop", "logprobs": {"tokens": [name(t) for t in tokens],
                                 "token_logprobs": list(drawn.log_probs), "top_logprobs": top},
        }  # fmt: skip
        if not self.plain:
            stop = next(iter(body.get("stop", ())), None) if drawn.reason == "stop" else None
            choice |= {"stop_reason": stop}
            if body.get("return_token_ids"):
                choice |= {"token_ids": tokens, "prompt_token_ids": list(ids)}
        return {"object": "text_completion", "model": MODEL, "choices": [choice],
                "usage": {"prompt_tokens": len(ids), "completion_tokens": len(tokens)}}  # fmt: skip

    def _handler(server: Any) -> type[QuietHandler]:
        class Handler(QuietHandler):
            def do_GET(self) -> None:
                found = [{"id": name, "max_model_len": server.max_model_len}
                         for name in server.names]  # fmt: skip
                if not server.lists:
                    self.send(404, json.dumps({"detail": "Not Found"}))
                elif server._allows(self):
                    self.send(200, json.dumps({"object": "list", "data": found}))

            def do_POST(self) -> None:
                body = self.json_body()
                with server._lock:
                    server.bodies.append(body)
                    number = len(server.bodies)
                    server._now += 1
                    server.most = max(server.most, server._now)
                try:
                    self.reply(number, body)
                finally:
                    with server._lock:
                        server._now -= 1

            def reply(self, number: int, body: Any) -> None:
                if not server._allows(self):
                    return
                bad = server.behave(number, body)
                if bad is None:
                    status, answer = server.answer(body)
                    self.send(status, json.dumps(server.change(body, answer)))
                    return
                time.sleep(bad.after)
                if bad.cut:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                self.send(bad.status, bad.text, bad.headers)

            def send(self, status: int, text: str, headers: Any = ()) -> None:
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(text.encode())))
                    for name, value in dict(headers).items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(text.encode())

        return Handler

    def _allows(self, handler: Any) -> bool:
        if self.key is None or handler.headers.get("Authorization") == f"Bearer {self.key}":
            return True
        # A careless server repeats what it was given.
        said = f"Unauthorized: {handler.headers.get('Authorization')}"
        handler.send(401, json.dumps({"error": {"message": said}}))
        return False
