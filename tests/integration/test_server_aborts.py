"""An abort is an end like any other: of what has not begun, of what is kept, of what a named context computes."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from caesura.runtime.handle import ContextHandle
from fastapi import FastAPI

from tests.integration.server_client import QUESTION, TOOLS, Held, answered, embedded_service, nothing_left, post, run
from tests.integration.test_server_disconnect import BODIES


def ends_of(body: Any) -> set[str]:
    """How the choices of an answer ended, whatever the protocol."""
    if isinstance(body, list):
        return {one["meta_info"]["finish_reason"]["type"] for one in body}
    return {choice["finish_reason"] for choice in body["choices"]} if "choices" in body else {body["status"]}


@pytest.mark.parametrize("where", ["open", "append", "prefill"])
@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/chat/completions", {"n": 2}),
        ("/v1/completions", {"echo": True, "logprobs": 1}),
        (
            "/generate",
            {"return_logprob": True, "logprob_start_len": 0, "sampling_params": {"n": 2, "max_new_tokens": 1500}},
        ),
        ("/v1/responses", {"input": "Go on.", "max_output_tokens": 1500, "ignore_eos": True}),
    ],
)
def test_an_abort_of_what_has_not_begun_is_an_end_like_any_other(
    path: str, more: dict[str, Any], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = embedded_service()

    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        held = None if where == "prefill" else Held(monkeypatch, *places[where])
        try:
            if held is None:
                await service.hold(retract=False)
            running = asyncio.ensure_future(client.post(path, json={**BODIES.get(path, {}), **more}))
            if held is not None:
                await held.reached()
            while held is None and not service.stats()["contexts"]["queued"]:
                await asyncio.sleep(0.002)
            assert (await post(client, "/abort_request", {"abort_all": True}))["aborted"] == 1
        finally:
            if held is None:
                await service.go_on()
            else:
                held.go_on.set()
        answer = await asyncio.wait_for(running, 20)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert ends_of(body) == {"cancelled" if path == "/v1/responses" else "abort"}
        if path == "/v1/responses":
            assert (await client.get(f"{path}/{body['id']}")).json()["status"] == "cancelled"
        await nothing_left(service)

    places = {"open": (service, "open"), "append": (ContextHandle, "append")}
    run(test)


def test_an_abort_while_an_answer_is_kept_tells_what_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        held = Held(monkeypatch, ContextHandle, "token_ids")
        body = {"input": "Go on.", "max_output_tokens": 7, "ignore_eos": True}
        running = asyncio.ensure_future(client.post("/v1/responses", json=body))
        await held.reached()
        assert (await post(client, "/abort_request", {"abort_all": True}))["aborted"] == 1
        held.go_on.set()
        answer = (await asyncio.wait_for(running, 20)).json()
        assert (answer["status"], answer["usage"]["output_tokens"]) == ("cancelled", 7)

    run(test)


@pytest.mark.parametrize(("verb", "body"), [("prefill", {}), ("score", {"start": 1}), ("score", {"texts": ["x"]})])
def test_an_abort_of_what_a_context_computes_is_an_end_like_any_other(verb: str, body: dict[str, Any]) -> None:
    service = embedded_service()

    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        made = await post(client, "/v1/contexts", {"pieces": [{"text": "What is 3 plus 4?"}]})
        path = f"/v1/contexts/{made['id']}"
        await service.hold(retract=False)
        try:
            running = asyncio.ensure_future(client.post(f"{path}/{verb}", json=body))
            while not service.stats()["contexts"]["queued"]:
                await asyncio.sleep(0.002)
            assert (await post(client, "/abort_request", {"abort_all": True}))["aborted"] == 1
            answer = await asyncio.wait_for(running, 20)
        finally:
            await service.go_on()
        assert (answer.status_code, answer.json()) == (200, {**made, "reason": "abort"})
        await post(client, f"{path}/{verb}", body)

    run(test)


def test_an_abort_before_a_paused_context_goes_on_leaves_it_for_the_next_try(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        chat, kept = "/v1/chat/completions", app.state.server.kept
        ask = {"messages": [QUESTION], "tools": TOOLS, "temperature": 0}
        message = (await post(client, chat, ask))["choices"][0]["message"]
        body = {**ask, "messages": [QUESTION, *answered(message)]}
        with monkeypatch.context() as patch:
            held = Held(patch, kept, "expire")
            running = asyncio.ensure_future(client.post(chat, json=body))
            await held.reached()
            assert (await post(client, "/abort_request", {"abort_all": True}))["aborted"] == 1
            held.go_on.set()
            assert ends_of((await running).json()) == {"abort"}
        answer = await post(client, chat, body)
        assert "1911492" in answer["choices"][0]["message"]["content"]
        assert (kept.continued, kept.rebuilt) == (1, 0)

    run(test)
