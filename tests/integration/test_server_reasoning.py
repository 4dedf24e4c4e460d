"""Thinking comes apart from the answer: in chats and responses, streaming or not, with tools and without."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import httpx
import pytest
from caesura.runtime.api import Service
from caesura.runtime.server import ServerConfig, create_app

from tests.integration.server_client import TOOLS, answered, client_of, events_of, post
from tests.integration.server_scripted import ScriptedService
from tests.integration.test_server_responses import events_of as response_events
from tests.integration.test_server_responses import rebuilt

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
MESSAGES = [{"role": "user", "content": "What is 6 * 7?"}]
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "6 * 7"}}\n</tool_call>'


def serving(service: ScriptedService, test: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    async def main() -> None:
        app = create_app(cast(Service, service), ServerConfig())
        async with client_of(app) as client:
            await test(client)
        await app.state.server.close()

    asyncio.run(main())


async def streamed(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(deltas, the last event) of a chat's stream."""
    more = {"stream": True, "stream_options": {"include_usage": True}}
    events = list(events_of((await client.post(CHAT, json={**body, **more})).text))
    return [found["choices"][0]["delta"] for found in events[:-1]], events[-1]


@pytest.mark.parametrize(("opened", "opening"), [(False, "<think>\n"), (True, "")])
def test_thinking_has_a_field_of_its_own(opened: bool, opening: str) -> None:
    text = f"{opening}six sevens\nare 42\n</think>\n\nIt is 42."
    body = {"messages": MESSAGES}

    async def test(client: httpx.AsyncClient) -> None:
        answer = await post(client, CHAT, body)
        message = answer["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("six sevens\nare 42", "It is 42.")
        details = answer["usage"]["completion_tokens_details"]
        assert 0 < details["reasoning_tokens"] < answer["usage"]["completion_tokens"]
        deltas, last = await streamed(client, body)
        thinking = [delta["reasoning_content"] for delta in deltas if "reasoning_content" in delta]
        assert len(thinking) > 2 and "".join(thinking) == message["reasoning_content"]
        assert "".join(delta.get("content") or "" for delta in deltas) == message["content"]
        firsts = [next(iter(delta)) for delta in deltas if set(delta) & {"reasoning_content", "content"}]
        assert firsts.index("content", 1) > firsts.index("reasoning_content")
        assert last["usage"]["completion_tokens_details"] == details
        deltas, _ = await streamed(client, {**body, "stream_reasoning": False})
        assert [d["reasoning_content"] for d in deltas if "reasoning_content" in d] == ["six sevens\nare 42"]
        plain = await post(client, CHAT, {**body, "separate_reasoning": False})
        assert plain["choices"][0]["message"]["content"] == text
        assert "reasoning_content" not in plain["choices"][0]["message"]

    serving(ScriptedService(*[text] * 4, opened=opened), test)


def test_an_answer_without_thinking_stays_whole() -> None:
    async def test(client: httpx.AsyncClient) -> None:
        message = (await post(client, CHAT, {"messages": MESSAGES}))["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == (None, "Say <think> or </think>.")
        # the template closes the thinking itself, so the answer begins at once
        off = {"messages": MESSAGES, "chat_template_kwargs": {"enable_thinking": False}}
        message = (await post(client, CHAT, off))["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == (None, "42")

    serving(ScriptedService("Say <think> or </think>.", "42", opened=False), test)


def test_a_call_after_thinking_pauses_and_goes_on() -> None:
    service = ScriptedService(f"<think>\nuse it\n</think>\n\n{CALL}", "42")

    async def test(client: httpx.AsyncClient) -> None:
        body = {"messages": MESSAGES, "tools": TOOLS}
        one = (await post(client, CHAT, body))["choices"][0]
        message = one["message"]
        assert one["finish_reason"] == "tool_calls"
        assert message["reasoning_content"] == "use it" and message["content"] is None
        before = len(service.handles[0].tokens)
        after = await post(client, CHAT, {**body, "messages": [*MESSAGES, *answered(message)]})
        assert after["choices"][0]["message"]["content"] == "42"
        assert len(service.handles) == 1 and service.handles[0].num_tokens > before, "in the same context"
        assert "use it" in service.prompt(0)

    serving(service, test)


def test_a_call_that_was_only_thought_of_is_none() -> None:
    async def test(client: httpx.AsyncClient) -> None:
        one = (await post(client, CHAT, {"messages": MESSAGES, "tools": TOOLS}))["choices"][0]
        assert one["finish_reason"] == "stop" and "tool_calls" not in one["message"]
        assert CALL in one["message"]["reasoning_content"] and one["message"]["content"] == "No."

    serving(ScriptedService(f"<think>maybe {CALL}?</think>No."), test)


def test_a_response_has_an_item_of_reasoning() -> None:
    text = f"<think>\nhm\n</think>\n\nLet me see.\n{CALL}"
    tools = [{"type": "function", **TOOLS[0]["function"]}]

    async def test(client: httpx.AsyncClient) -> None:
        body = {"input": "6 * 7?", "tools": tools}
        answer = await post(client, RESPONSES, body)
        assert [item["type"] for item in answer["output"]] == ["reasoning", "message", "function_call"]
        assert answer["output"][0]["content"] == [{"type": "reasoning_text", "text": "hm"}]
        assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
        events = response_events((await client.post(RESPONSES, json={**body, "stream": True})).text)
        assert rebuilt(events) == events[-1]["response"]["output"]
        assert [item["type"] for item in events[-1]["response"]["output"]] == ["reasoning", "message", "function_call"]
        # a plain answer that began with thinking: the template decides what becomes of it
        first = await post(client, RESPONSES, {"input": "6 * 7?"})
        await post(client, RESPONSES, {"input": "And?", "previous_response_id": first["id"]})
        assert "<think>\nhm\n</think>" in service.prompt(-1)

    service = ScriptedService(text, text, "<think>hm</think>42", "43")
    serving(service, test)


@pytest.mark.parametrize("opened", [False, True])
def test_a_grammar_begins_where_the_thinking_ends(opened: bool) -> None:
    opening = "" if opened else "<think>"
    text = f'{opening}say it\n</think>\n\n{{"a": 1}}'
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    service = ScriptedService(text, f"{opening}hm</think>{CALL}", "42", "42", opened=opened)

    async def test(client: httpx.AsyncClient) -> None:
        message = (await post(client, CHAT, {"messages": MESSAGES, "response_format": form}))["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("say it", '{"a": 1}')
        body = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "required"}
        called = (await post(client, CHAT, body))["choices"][0]
        assert called["finish_reason"] == "tool_calls" and called["message"]["reasoning_content"] == "hm"
        for more in ({"separate_reasoning": False}, {"chat_template_kwargs": {"enable_thinking": False}}):
            await post(client, CHAT, {"messages": MESSAGES, "regex": "42", **more})
        held = [params.constraint.source if params.constraint else "" for params in service.asked]
        assert "thinking" in held[0] and ("held |" in held[0]) != opened
        assert held[1:] == ["", "42", "42"], (
            "calls are the engine's to hold; the others are held from the first token on"
        )

    serving(service, test)
