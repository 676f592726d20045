"""Requests that want vLLM's beams and guidance: refused as their body is read, others untouched."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("fastapi", reason="needs fastapi, which comes with vLLM")

import httpx
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse
from starlette.routing import Route

from guided_decode.integrations.vllm.beam_refusal import RefuseGuidedBeams, refusal_of
from guided_decode.integrations.vllm.server_config import CONFIG_VARIABLE

BEAMS = {"use_beam_search": True, "n": 2}


async def answer(request: HttpRequest) -> JSONResponse:
    """An application that says how much it read."""
    if request.headers.get("authorization") == "wrong":
        return JSONResponse({}, 401)
    return JSONResponse({"read": len(await request.body())})


async def posted(content, **headers):
    app = RefuseGuidedBeams(Starlette(routes=[Route("/v1/completions", answer, methods=["POST"])]))
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
        return await client.post("/v1/completions", content=content, headers=headers)


def ask(content, **headers):
    import asyncio

    return asyncio.run(posted(content, **headers))


@pytest.mark.parametrize("flag", [True, 1, "true"])
@pytest.mark.parametrize("keys", [{"guide": 1}, {"guide_beta": 1e9}, {"guide": 0, "guide_x": 1}])
def test_beams_with_guidance_are_refused(flag, keys):
    body = json.dumps({"use_beam_search": flag, "vllm_xargs": keys}).encode()
    response = ask(body)
    assert response.status_code == 400
    assert "vLLM's beam search drops vllm_xargs" in response.text


@pytest.mark.parametrize(
    "body",
    [
        {"vllm_xargs": {"guide": 1}},
        BEAMS,
        BEAMS | {"vllm_xargs": {"guide": 0}},
        BEAMS | {"vllm_xargs": {"other": 1}},
        BEAMS | {"vllm_xargs": 3},
        {"use_beam_search": False, "vllm_xargs": {"guide": 1}},
        {"use_beam_search": [], "vllm_xargs": {"guide": 1}},
        {"prompt": '"use_beam_search": true', "vllm_xargs": {"guide": 1}},
        [BEAMS],
    ],
)
def test_others_are_read_as_they_came(body):
    content = json.dumps(body).encode()
    assert ask(content).json() == {"read": len(content)}


@pytest.mark.parametrize(
    "content", [b"", b'{"use_beam_search": ', b"[" * 100_000 + b"use_beam_search"]
)
def test_what_is_no_json_is_the_applications_to_refuse(content):
    assert ask(content).json() == {"read": len(content)}


@pytest.mark.parametrize("size", [1, 7, 16, 1000])
def test_the_name_may_come_in_pieces(size):
    content = json.dumps(BEAMS | {"vllm_xargs": {"guide": 1}}).encode()

    async def pieces():
        for start in range(0, len(content), size):
            yield content[start : start + size]

    assert ask(pieces()).status_code == 400


def test_who_may_not_ask_is_told_that_first():
    body = json.dumps(BEAMS | {"vllm_xargs": {"guide": 1}}).encode()
    assert ask(body, authorization="wrong").status_code == 401


def test_a_server_that_guides_by_default_serves_plain_beams_on_request_only(monkeypatch):
    monkeypatch.setenv(CONFIG_VARIABLE, '{"scorer": "critic", "guide_by_default": true}')
    response = ask(json.dumps(BEAMS).encode())
    assert response.status_code == 400
    assert "guides by default" in response.text
    assert ask(json.dumps(BEAMS | {"vllm_xargs": {"guide": 0}}).encode()).status_code == 200


def test_a_reason_does_not_repeat_a_clients_megabytes():
    reason = refusal_of(BEAMS | {"vllm_xargs": {"guide_" + "x" * 10**6: 1}}, by_default=False)
    assert len(reason) < 500
