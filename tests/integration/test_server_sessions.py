"""SGLang's sessions, generation on hold, its parsers as routes, and prompt scores with their rivals."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import httpx
import pytest
from caesura.runtime.api import Service
from caesura.runtime.server import ServerConfig, create_app
from fastapi import FastAPI

from tests.integration.server_client import (
    QUESTION,
    TOOLS,
    client_of,
    embedded_service,
    events_of,
    nothing_left,
    post,
    run,
)
from tests.integration.server_scripted import ScriptedService

TEXT = "What is 3 plus 4? The answer is"


def greedy(**params: Any) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True, **params}


@pytest.mark.parametrize("stream", [False, True])
def test_a_session_keeps_the_tokens(stream: bool) -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        session = await post(client, "/open_session", {"capacity_of_str_len": 1000})
        assert isinstance(session, str)

        async def ask(text: str, **params: Any) -> dict[str, Any]:
            body = {"text": text, "sampling_params": greedy(), "session_params": {"id": session, **params}}
            if stream:
                answer = await client.post("/generate", json={**body, "stream": True})
                return list(events_of(answer.text))[-1]
            answer_: dict[str, Any] = await post(client, "/generate", body)
            return answer_

        ids = (await post(client, "/tokenize", {"prompt": TEXT * 3}))["tokens"]
        first = await ask(TEXT * 3)
        more = (await post(client, "/tokenize", {"prompt": " And"}))["tokens"]
        second = await ask(" And", rid=first["meta_info"]["id"])
        whole = [*ids, *first["output_ids"], *more]
        assert second["meta_info"]["prompt_tokens"] == len(whole)
        assert second["meta_info"]["cached_tokens"] >= len(whole) - len(more) - 16, "all but an unfinished page"
        alone = await post(client, "/generate", {"input_ids": whole, "sampling_params": greedy()})
        assert alone["output_ids"] == second["output_ids"]
        branch = await ask(" And", rid=first["meta_info"]["id"], drop_previous_output=True)
        assert branch["meta_info"]["prompt_tokens"] == len(ids) + len(more)
        cut = await ask(" And", rid=second["meta_info"]["id"], offset=10, replace=True)
        assert cut["meta_info"]["prompt_tokens"] == 10 + len(more)
        for wrong in ({"id": "nope"}, {"id": session, "rid": "nope"}):
            answer = await client.post("/generate", json={"text": "x", "session_params": wrong, "stream": stream})
            assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("session_params.")
        assert (await post(client, "/close_session", {"session_id": session}))["closed"] is True
        gone = {"text": "x", "session_params": {"id": session}}
        assert (await client.post("/generate", json=gone)).status_code == 400

    run(test)


def test_what_a_session_request_cannot_be() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        await post(client, "/open_session", {"session_id": "s", "streaming": True})
        assert (await client.post("/open_session", json={"session_id": "s"})).status_code == 400
        params = {"session_params": {"id": "s"}}
        for body in (
            {"text": ["x"]}, {"input_ids": [[1]]}, {"text": "x", "sampling_params": {"n": 2}},
            {"text": "x", "session_id": "s"}, {"text": "x", "session_params": {"id": "s", "offset": 1.5}},
            {"text": "x", "session_params": {"id": "s", "replace": True}},
        ):  # fmt: skip
            answer = await client.post("/generate", json={**params, **body})
            assert answer.status_code == 400, body
        # a request that fails leaves the session as it was
        await post(client, "/generate", {**params, "text": TEXT, "sampling_params": greedy()})
        failed = {**params, "text": "x", "sampling_params": {"max_new_tokens": 100_000}}
        assert (await client.post("/generate", json=failed)).status_code == 400
        after = await post(client, "/generate", {**params, "text": " x", "sampling_params": greedy()})
        ids = (await post(client, "/tokenize", {"prompt": TEXT}))["tokens"]
        assert after["meta_info"]["prompt_tokens"] > len(ids) + 8

    run(test)


@pytest.mark.parametrize("wrong", [{"logprob_start_len": 999}, {"sampling_params": {"max_new_tokens": 100_000}}])
def test_a_refused_replacement_replaces_nothing(wrong: dict[str, Any]) -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        await post(client, "/open_session", {"session_id": "s"})

        async def ask(name: str, more: dict[str, Any], **params: Any) -> httpx.Response:
            body = {"text": TEXT, "rid": name, "sampling_params": greedy(), **more}
            return await client.post("/generate", json={**body, "session_params": {"id": "s", **params}})

        assert (await ask("a", {})).status_code == 200
        assert (await ask("b", {}, rid="a")).status_code == 200
        assert (await ask("c", wrong, rid="a", replace=True)).status_code == 400
        assert (await ask("d", {}, rid="b")).status_code == 200, "it is still there"
        assert (await ask("c", {}, rid="a", replace=True)).status_code == 200
        assert (await ask("e", {}, rid="b")).status_code == 400

    run(test)


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_generation_on_hold(mode: str) -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        body = {"text": TEXT, "sampling_params": greedy(max_new_tokens=300)}
        wanted = (await post(client, "/generate", body))["output_ids"]
        service = embedded_service()
        running = asyncio.ensure_future(post(client, "/generate", body))
        while not service.stats()["contexts"]["running"]:
            await asyncio.sleep(0.002)
        try:
            await post(client, "/pause_generation", {"mode": mode})
            steps = service.stats()["steps"]
            waiting = asyncio.ensure_future(post(client, "/generate", body))
            await asyncio.sleep(0.1)
            assert not waiting.done() and service.stats()["steps"] == steps
            info = (await client.get("/server_info")).json()
            assert info["generation_paused"] == mode
            if mode == "abort":
                reason = (await running)["meta_info"]["finish_reason"]
                assert reason["type"] == "abort"
            flushed = await client.post("/flush_cache")
            assert flushed.status_code == (200 if mode == "retract" else 400)
        finally:
            await post(client, "/continue_generation", {})
        assert (await waiting)["output_ids"] == wanted
        if mode != "abort":
            assert (await running)["output_ids"] == wanted
        assert (await client.post("/pause_generation", json={"mode": "sleep"})).status_code == 400
        await nothing_left(service)

    run(test)


class Replaceable(ScriptedService):
    """An engine that can be replaced by one with a smaller pool."""

    max_context_tokens = 4096

    async def read_stats(self) -> dict[str, Any]:
        return {"max_context_tokens": self.max_context_tokens}

    async def hold(self, *, retract: bool) -> None:
        """Nothing runs anyway."""


def test_what_is_known_of_an_engine_ends_with_it() -> None:
    async def main() -> None:
        service = Replaceable()
        app = create_app(cast(Service, service), ServerConfig())
        async with client_of(app) as client:

            async def known() -> tuple[str | None, int]:
                info, card = (await client.get("/server_info")).json(), (await client.get("/v1/models")).json()
                return info["generation_paused"], card["data"][0]["max_model_len"]

            await post(client, "/pause_generation", {"mode": "retract"})
            assert await known() == ("retract", 4096)
            service.life, service.max_context_tokens = 1, 512
            assert await known() == (None, 512)
            await post(client, "/pause_generation", {"mode": "in_place"})
            assert await known() == ("in_place", 512)

    asyncio.run(main())


def test_prompt_scores_come_with_the_likeliest_tokens() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        for start in (0, 3):
            body = {
                "text": TEXT, "sampling_params": greedy(max_new_tokens=1), "return_logprob": True,
                "logprob_start_len": start, "top_logprobs_num": 2, "return_text_in_logprobs": True,
            }  # fmt: skip
            meta = (await post(client, "/generate", body))["meta_info"]
            tops, values = meta["input_top_logprobs"], meta["input_token_logprobs"]
            assert len(tops) == len(values) == meta["prompt_tokens"] - start
            assert (tops[0] is None) == (start == 0)
            for top, (value, _, _) in list(zip(tops, values, strict=True))[1:]:
                assert len(top) == 2 and top[0][0] >= top[1][0] and top[0][0] >= value - 1e-5
                assert all(isinstance(text, str) for _, _, text in top)

    run(test)


def test_parsers_as_routes_and_what_the_server_tells() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        text = 'Hm.\n<tool_call>\n{"name": "calculator", "arguments": {"expression": "1"}}\n</tool_call>'
        found = await post(client, "/parse_function_call", {"text": text, "tools": TOOLS})
        call = {"tool_index": 0, "name": "calculator", "parameters": '{"expression": "1"}'}
        assert found == {"normal_text": "Hm.", "calls": [call]}
        other = {"text": "[calculator(expression='1')]", "tools": TOOLS, "tool_call_parser": "pythonic"}
        assert (await post(client, "/parse_function_call", other))["calls"][0]["name"] == "calculator"
        assert (await client.post("/parse_function_call", json={**other, "tool_call_parser": "x"})).status_code == 400
        thought = {"text": "<think>a</think>b", "reasoning_parser": "qwen3"}
        assert await post(client, "/separate_reasoning", thought) == {"reasoning_text": "a", "text": "b"}
        plain = {"text": "<think>a</think>b"}
        assert (await post(client, "/separate_reasoning", plain))["reasoning_text"] == "", "this model does not think"
        limit = embedded_service().stats()["max_context_tokens"]
        assert (await client.get("/v1/models")).json()["data"][0]["max_model_len"] == limit
        info = (await client.get("/get_server_info")).json()
        assert info["context_length"] == limit and info["max_total_num_tokens"] >= limit
        for path in ("/start_profile", "/stop_profile"):
            assert (await client.post(path)).status_code == (await client.get(path)).status_code == 200
        # without a limit of one's own an answer ends where the context does
        long = {"role": "user", "content": "word " * 450}
        body = {"messages": [long, QUESTION], "ignore_eos": True}
        usage = (await post(client, "/v1/chat/completions", body))["usage"]
        assert usage["total_tokens"] == min(limit, usage["prompt_tokens"] + app.state.server.config.default_max_tokens)

    run(test)


def test_what_nobody_comes_back_for_goes_without_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caesura.runtime.server.state.SWEEP_S", 0.02)

    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        state = app.state.server
        async with app.router.lifespan_context(app):
            await post(client, "/v1/contexts", {"pieces": [{"text": TEXT}]})
            await post(client, "/v1/responses", {"input": "hi", "max_output_tokens": 1})
            await post(client, "/open_session", {})
            body = {"messages": [QUESTION], "tools": TOOLS, "temperature": 0, "tool_choice": "required"}
            await post(client, "/v1/chat/completions", body)
            stores = (state.contexts, state.responses, state.sessions, state.kept)
            for _ in range(500):
                if not any(len(store) for store in stores):
                    break
                await asyncio.sleep(0.01)
            assert [len(store) for store in stores] == [0, 0, 0, 0]

    run(test, context_ttl_s=0.2, tool_wait_s=0.2)
