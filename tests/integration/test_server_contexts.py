"""Contexts that clients hold: cut off, refused, or asked for at once, they stay what the client thinks they are."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from caesura.runtime.executors.base import SampledToken
from caesura.runtime.generation import Generation, TokenChunk
from caesura.runtime.handle import ContextHandle
from caesura.runtime.sampling import SamplerState, SamplingParams
from caesura.runtime.text.tool_events import ToolFormat
from fastapi import FastAPI

from tests.integration.server_client import Held, embedded_service, post, run
from tests.integration.test_server_disconnect import leave

CONTEXTS = "/v1/contexts"
TEXT = "What is 3 plus 4? The answer is"
LONG = {"max_new_tokens": 1500, "ignore_eos": True}


async def made(client: httpx.AsyncClient) -> tuple[str, int]:
    """The path and the length of a new context."""
    body = await post(client, CONTEXTS, {"pieces": [{"text": TEXT}]})
    return f"{CONTEXTS}/{body['id']}", body["num_tokens"]


async def tokens_of(client: httpx.AsyncClient, path: str) -> list[int]:
    found: list[int] = (await client.get(f"{path}/tokens")).json()["token_ids"]
    return found


@pytest.mark.parametrize("how", ["abort", "leave"])
def test_a_context_whose_generation_was_cut_off_knows_its_length(how: str) -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        path, before = await made(client)
        if how == "leave":
            await leave(app, f"{path}/generate", LONG, after_events=5, after_s=10)
            length = (await client.get(path)).json()["num_tokens"]
        else:
            running = asyncio.ensure_future(post(client, f"{path}/generate", {**LONG, "stream": False}))
            while not embedded_service().stats()["contexts"]["running"]:
                await asyncio.sleep(0.002)
            await asyncio.sleep(0.1)
            await post(client, "/abort_request", {"abort_all": True})
            length = (await running)["num_tokens"]
        assert length == len(await tokens_of(client, path)) > before
        assert (await post(client, f"{path}/snapshot", {"name": "cut"}))["snapshots"] == {"cut": length}
        held = {"constraint": {"kind": "regex", "source": "abc def"}, "stop": ["def"], "stream": False}
        more = await post(client, f"{path}/generate", held)
        assert more["kept_token_ids"] == (await tokens_of(client, path))[length:], "what is new, and no more"

    run(test)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 10_000},
        {"constraint": {"kind": "regex", "source": "("}},
        {"stop_regex": ["("]},
        {"logit_bias": {"1048576": 1.0}},
        {"tool_choice": "calculator"},
    ],
)
def test_a_generation_that_is_refused_appends_nothing(wrong: dict[str, Any], stream: bool) -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        path, before = await made(client)
        spec = {"pieces": [{"text": " and more"}], "stream": stream, **wrong}
        for _ in range(2):
            assert (await client.post(f"{path}/generate", json=spec)).status_code == 400
            assert (await client.get(path)).json()["num_tokens"] == len(await tokens_of(client, path)) == before

    run(test)


@pytest.mark.parametrize("piece", [{"token_ids": [1 << 20]}, {"text": "word " * 5000}])
def test_results_that_are_refused_do_not_end_the_pause(piece: dict[str, Any]) -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        def is_waiting() -> bool:
            return embedded_service().call_now(
                lambda engine: any(c.pause.calls for c in engine.scheduler.contexts.values())
            )

        path, before = await made(client)
        await post(client, f"{path}/pause", {"calls": [{"tool": "slow"}]})
        answer = await client.post(f"{path}/resume", json={"pieces": [piece]})
        assert answer.status_code == 400 and is_waiting()
        resumed = await post(client, f"{path}/resume", {"pieces": [{"text": " 7"}]})
        assert resumed["num_tokens"] == len(await tokens_of(client, path)) > before and not is_waiting()

    run(test)


def test_requests_at_the_same_time_share_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        with monkeypatch.context() as patch:
            held = Held(patch, embedded_service(), "open")
            asked = [asyncio.ensure_future(client.post(CONTEXTS, json={})) for _ in range(5)]
            await held.reached()
            await asyncio.sleep(0.05)
            held.go_on.set()
            assert sorted([(await one).status_code for one in asked]) == [201, 201, 429, 429, 429]
        first, second = list(app.state.server.contexts._named)
        await client.delete(f"{CONTEXTS}/{second}")
        with monkeypatch.context() as patch:
            held = Held(patch, ContextHandle, "fork")
            forking = asyncio.ensure_future(client.post(f"{CONTEXTS}/{first}/fork", json={}))
            await held.reached()
            assert (await client.post(CONTEXTS, json={})).status_code == 429
            held.go_on.set()
            assert (await forking).status_code == 201

    run(test, max_contexts_per_key=2)


@pytest.mark.parametrize("what", ["open", "fork"])
def test_a_client_that_leaves_while_contexts_are_made_leaves_none(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        service, contexts, path = embedded_service(), app.state.server.contexts, CONTEXTS
        if what == "fork":
            path = (await made(client))[0] + "/fork"
        before = len(contexts)
        gone = asyncio.Event()
        with monkeypatch.context() as patch:
            held = Held(patch, ContextHandle if what == "fork" else service, what)
            body = {"count": 2} if what == "fork" else {"pieces": [{"text": TEXT}]}
            leaving = asyncio.ensure_future(leave(app, path, body, after_events=10_000, after_s=10, gone=gone))
            await held.reached()
            gone.set()
            await asyncio.sleep(0.05)
            held.go_on.set()
            await leaving
        assert len(contexts) == before
        for _ in range(200):
            if sum(service.stats()["contexts"].values()) == before:
                break
            await asyncio.sleep(0.01)
        assert sum(service.stats()["contexts"].values()) == before

    run(test)


def test_a_context_that_has_ended_is_gone_whatever_is_asked_of_it() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        asks: list[tuple[str, str, dict[str, Any]]] = [
            ("GET", "", {}), ("POST", "/snapshot", {"name": "x"}), ("POST", "/append", {}), ("GET", "/decisions", {}),
        ]  # fmt: skip
        for method, verb, body in asks:
            made = await post(client, CONTEXTS, {"pieces": [{"text": TEXT}], "deadline_s": 0.05})
            handle = app.state.server.contexts.get("", made["id"]).handle
            while handle.is_open:
                await asyncio.sleep(0.01)
            answer = await client.request(method, f"{CONTEXTS}/{made['id']}{verb}", json=body or None)
            assert answer.status_code == 410, (method, verb)

    run(test)


@pytest.mark.parametrize("begun", ['\n<tool_call>\n{"na', '\n<tool_call>\n{"name": "calculator", "arguments": {"ex'])
def test_a_further_call_that_was_cut_off_is_no_end_in_calls(begun: str) -> None:
    """Also where the client reads the reason alone."""
    text = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "1"}}\n</tool_call>' + begun
    tokenizer = embedded_service().tokenizer
    ids = tokenizer.encode(text, allow_special=True)
    chunks: list[TokenChunk] = []
    params = SamplingParams(max_new_tokens=len(ids), temperature=0.0, skip_special_tokens=False)
    generation = Generation(
        params, SamplerState(params, 0), tokenizer, frozenset(), 5, chunks.append, ToolFormat.HERMES, ("calculator",)
    )
    for token in ids:
        ending = generation.push(SampledToken(token))
    assert ending is not None
    calls = generation.calls(ending)
    generation.finish(ending, calls, 0)
    finish = chunks[-1].finish
    assert finish is not None and finish.cut_off
    assert ([call.name for call in finish.tool_calls], finish.reason) == (["calculator"], "length")
