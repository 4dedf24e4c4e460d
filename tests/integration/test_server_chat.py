"""Chat completions on the embedded model: OpenAI's shapes, tools by grammar, and the tool call that is a pause."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import httpx
import pytest
from caesura.runtime.server.kept import KeptContext
from fastapi import FastAPI

from tests.integration.server_client import (
    QUESTION,
    TOOLS,
    answered,
    embedded_service,
    events_of,
    nothing_left,
    post,
    run,
)

CHAT = "/v1/chat/completions"
ASK = {"model": "any", "messages": [QUESTION], "tools": TOOLS, "temperature": 0}
OTHER_TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "enum": ["a", "b"]}},
            "required": ["word"],
        },
    },
}


def whole_from(events: list[dict[str, Any]]) -> tuple[dict[int, dict[str, Any]], dict[str, Any] | None]:
    """Put a stream together as clients do: (choices by index, usage)."""
    choices: dict[int, dict[str, Any]] = defaultdict(
        lambda: {"content": "", "calls": {}, "reason": None, "logprobs": []}
    )
    usage = None
    for event in events:
        usage = event.get("usage") or usage
        for part in event["choices"]:
            choice = choices[part["index"]]
            delta = part["delta"]
            assert choice["reason"] is None, "nothing may follow the finish"
            choice["content"] += delta.get("content") or ""
            choice["logprobs"] += (part["logprobs"] or {}).get("content") or []
            choice["reason"] = part["finish_reason"]
            assert len({call["index"] for call in delta.get("tool_calls", [])}) == len(delta.get("tool_calls", []))
            for call in delta.get("tool_calls", []):
                into = choice["calls"].setdefault(call["index"], {"arguments": ""})
                for key in ("id", "type"):
                    assert not (key in call and key in into), "id and type come once"
                    into.update({key: call[key]} if key in call else {})
                into.update({"name": call["function"]["name"]} if "name" in call["function"] else {})
                into["arguments"] += call["function"].get("arguments", "")
    return dict(choices), usage


def test_an_agent_loop_of_five_rounds_computes_only_the_results() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        messages: list[dict[str, Any]] = [QUESTION]
        known = 0
        for _ in range(6):
            body = {**ASK, "messages": messages, "tool_choice": "required", "parallel_tool_calls": False}
            answer = await post(client, CHAT, body)
            usage = answer["usage"]
            # everything of the conversation but the newest result was computed before, except for the call's last
            # token when the grammar ended it; not even page rounding is lost
            assert known - usage["prompt_tokens_details"]["cached_tokens"] in (0, 1)
            assert answer["choices"][0]["finish_reason"] == "tool_calls"
            known = usage["total_tokens"]
            stats = embedded_service().stats()
            assert stats["contexts"] == {"queued": 0, "running": 0, "paused": 1}, "paused, not finished"
            messages += answered(answer["choices"][0]["message"])
        assert app.state.server.kept.continued == 5
        assert app.state.server.kept.rebuilt == 0

    run(test)


def test_the_resumed_prompt_is_a_token_exact_continuation() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        first = (await post(client, CHAT, ASK))["choices"][0]["message"]
        kept: KeptContext = next(iter(app.state.server.kept._kept.values()))
        written = list(kept.token_ids)
        second = await post(client, CHAT, {**ASK, "messages": [QUESTION, *answered(first)]})
        assert "1911492" in second["choices"][0]["message"]["content"]
        service = embedded_service()
        results = service.template.tool_results([("calculator", "1911492")], tools=TOOLS)
        new = sum(len(service.tokenizer.encode(p.text, allow_special=p.special, continuation=True)) for p in results)
        assert second["usage"]["prompt_tokens"] == len(written) + new
        # the same request again: the context has gone on, but its tokens are still there
        again = await post(client, CHAT, {**ASK, "messages": [QUESTION, *answered(first)]})
        assert app.state.server.kept.rebuilt == 1
        assert again["choices"][0]["message"] == second["choices"][0]["message"]
        assert again["usage"]["prompt_tokens"] == second["usage"]["prompt_tokens"]

    run(test)


@pytest.mark.parametrize("change", ["system", "arguments", "content", "tools", "id", "missing", "user"])
def test_an_edited_conversation_is_rendered_anew(change: str) -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        message = (await post(client, CHAT, ASK))["choices"][0]["message"]
        messages = [QUESTION, *answered(message)]
        body = {**ASK, "messages": messages}
        call = message["tool_calls"][0]
        if change == "system":
            messages.insert(0, {"role": "system", "content": "Answer in verse."})
        elif change == "arguments":
            call["function"]["arguments"] = '{"expression": "1 + 1"}'
        elif change == "content":
            message["content"] = "Let me see."
        elif change == "tools":
            body["tools"] = [*TOOLS, OTHER_TOOL]
        elif change == "id":
            call["id"] = messages[-1]["tool_call_id"] = "call_made_up"
        elif change == "missing":
            messages.pop()
        else:
            messages.append({"role": "user", "content": "And?"})
        await post(client, CHAT, body)
        assert app.state.server.kept.continued == app.state.server.kept.rebuilt == 0

    run(test)


def test_another_key_cannot_go_on_nor_see_what_is_cached() -> None:
    ann, bob = ({"authorization": f"Bearer key-{name}-000"} for name in ("ann", "bob"))

    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        first = await post(client, CHAT, ASK, headers=ann)
        body = {**ASK, "messages": [QUESTION, *answered(first["choices"][0]["message"])]}
        theirs = await post(client, CHAT, body, headers=bob)
        assert theirs["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        salted = await post(client, CHAT, {**body, "cache_salt": "s"}, headers=ann)
        assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert app.state.server.kept.continued == 0
        mine = await post(client, CHAT, body, headers=ann)
        assert mine["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        assert app.state.server.kept.continued == 1

    run(test, api_keys=("key-ann-000", "key-bob-000"))


def test_a_context_whose_client_never_returns_expires() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        message = (await post(client, CHAT, ASK))["choices"][0]["message"]
        await nothing_left(embedded_service())  # the engine's own deadline, though no request comes
        answer = await post(client, CHAT, {**ASK, "messages": [QUESTION, *answered(message)]})
        assert "1911492" in answer["choices"][0]["message"]["content"]
        assert len(app.state.server.kept) == 0

    run(test, tool_wait_s=0.3)


def test_a_context_waits_for_tools_longer_than_a_request_may_take() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        await post(client, CHAT, ASK)
        left_s = embedded_service().call_now(lambda engine: (engine.next_deadline() or 0.0) - engine.clock.now())
        assert 500 < left_s <= 600

    run(test, tool_wait_s=600, request_deadline_s=60)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "reason", "names"),
    [
        ("auto", "tool_calls", ["calculator"]),
        ("required", "tool_calls", ["calculator"]),
        ({"type": "function", "function": {"name": "lookup"}}, "stop", ["lookup"]),
        ("none", None, []),
    ],
)
def test_tool_choice_and_the_finish_reason_table(
    choice: Any, reason: str | None, names: list[str], stream: bool
) -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        body = {**ASK, "tools": [*TOOLS, OTHER_TOOL], "tool_choice": choice, "stream": stream, "max_tokens": 64}
        if choice == "required":
            body["tools"] = TOOLS
        answer = await client.post(CHAT, json=body)
        assert answer.status_code == 200, answer.text
        if stream:
            choices, _ = whole_from(list(events_of(answer.text)))
            calls = [call for _, call in sorted(choices[0]["calls"].items())]
            found = choices[0]["reason"]
        else:
            one = answer.json()["choices"][0]
            calls = [{"id": call["id"], **call["function"]} for call in one["message"].get("tool_calls", [])]
            found = one["finish_reason"]
        assert sorted({call["name"] for call in calls}) == names
        assert len({call["id"] for call in calls}) == len(calls)
        for call in calls:
            arguments = json.loads(call["arguments"])
            assert call["name"] != "lookup" or arguments["word"] in ("a", "b")
        assert found == reason if reason else found in ("stop", "length")

    run(test)


def test_parallel_calls_and_their_results() -> None:
    question = {"role": "user", "content": "What are 48 * 39 and 17 * 23?"}

    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        answer = await post(client, CHAT, {**ASK, "messages": [question]})
        message = answer["choices"][0]["message"]
        assert len(message["tool_calls"]) == 2
        results = answered(message)
        results[1:] = results[:0:-1]  # results may come in any order
        after = await post(client, CHAT, {**ASK, "messages": [question, *results]})
        assert app.state.server.kept.continued == 1
        assert after["usage"]["prompt_tokens_details"]["cached_tokens"] >= answer["usage"]["total_tokens"] - 1
        streamed = await client.post(CHAT, json={**ASK, "messages": [question], "stream": True})
        choices, _ = whole_from(list(events_of(streamed.text)))
        wanted = [call["function"] for call in message["tool_calls"]]
        got = [{"name": c["name"], "arguments": c["arguments"]} for _, c in sorted(choices[0]["calls"].items())]
        assert got == wanted

    run(test)


def test_a_call_cut_off_by_the_limit_is_no_pause() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        answer = await post(client, CHAT, {**ASK, "max_tokens": 12})
        assert answer["choices"][0]["finish_reason"] == "length"
        assert len(app.state.server.kept) == 0

    run(test)
