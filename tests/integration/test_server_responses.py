"""The Responses API on the embedded model, every answer and event checked by OpenAI's own types."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import msgspec
import pytest
from caesura.runtime.embedded.calculator import calculate
from fastapi import FastAPI
from openai import BadRequestError, NotFoundError
from openai.types.responses.response_item_list import ResponseItemList
from pydantic import BaseModel, Field

from tests.integration.server_client import CALCULATOR_TOOL, QUESTION, embedded_service, nothing_left, post, run
from tests.integration.server_openai import openai_of
from tests.integration.server_types import checked

ROUTE = "/v1/responses"
TOOLS: list[Any] = [{"type": "function", **CALCULATOR_TOOL["function"]}]
ASK: dict[str, Any] = {"model": "any", "input": QUESTION["content"], "tools": TOOLS, "temperature": 0}


def results_of(response: dict[str, Any]) -> list[dict[str, Any]]:
    """The calculator's outputs for a response's calls."""
    calls = [item for item in response["output"] if item["type"] == "function_call"]
    assert calls
    return [
        {
            "type": "function_call_output",
            "call_id": call["call_id"],
            "output": str(calculate(json.loads(call["arguments"])["expression"])),
        }
        for call in calls
    ]


def events_of(text: str) -> list[dict[str, Any]]:
    """A stream's events: typed, named after their type, numbered without gaps, ended by [DONE]."""
    blocks = text.strip().split("\n\n")
    assert blocks.pop() == "data: [DONE]"
    events = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        found = checked(json.loads(data.removeprefix("data: ")))
        assert found["type"] == name.removeprefix("event: ") and found["sequence_number"] == number
        events.append(found)
    return events


def rebuilt(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output that a stream's own deltas make."""
    items: list[dict[str, Any]] = []
    texts: dict[str, str] = {}
    for found in events:
        kind = found["type"]
        if kind == "response.output_item.added":
            assert found["output_index"] == len(items)
            items.append(found["item"])
            texts[found["item"]["id"]] = ""
        elif kind.endswith(".delta"):
            assert found["item_id"] == items[-1]["id"], "one item at a time"
            texts[found["item_id"]] += found["delta"]
        elif kind in ("response.output_text.done", "response.reasoning_text.done"):
            assert found["text"] == texts[found["item_id"]]
        elif kind == "response.function_call_arguments.done":
            assert found["arguments"] == texts[found["item_id"]]
        elif kind == "response.output_item.done":
            items[found["output_index"]] = found["item"]
    return items


@pytest.mark.parametrize("how", ["previous_response_id", "items"])
def test_a_function_call_pauses_and_its_output_goes_on(how: str) -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        given: list[dict[str, Any]] = [QUESTION]
        previous: dict[str, Any] = {}
        known = 0
        for turn in range(4):
            body = {**ASK, "input": given, "tool_choice": "required", "parallel_tool_calls": False, **previous}
            body["store"] = how == "previous_response_id"
            answer = await post(client, ROUTE, body)
            usage = answer["usage"]
            assert known - usage["input_tokens_details"]["cached_tokens"] in (0, 1), turn
            known = usage["total_tokens"]
            stats = embedded_service().stats()
            assert stats["contexts"] == {"queued": 0, "running": 0, "paused": 1}, "paused, not finished"
            if how == "previous_response_id":
                previous, given = {"previous_response_id": answer["id"]}, results_of(answer)
            else:
                given = [*given, *answer["output"], *results_of(answer)]
        assert app.state.server.kept.continued == 3
        assert app.state.server.kept.rebuilt == 0
        assert len(app.state.server.responses) == (4 if previous else 0)

    run(test)


def test_a_stream_and_a_whole_answer_agree() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        for more in ({}, {"tools": [], "include": ["message.output_text.logprobs"], "top_logprobs": 2}):
            body = {**ASK, **more}
            whole = await post(client, ROUTE, body)
            events = events_of((await client.post(ROUTE, json={**body, "stream": True})).text)
            kinds = [found["type"] for found in events]
            assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
            assert events[0]["response"]["output"] == [] and events[0]["response"]["status"] == "in_progress"
            assert kinds[-1] == "response.completed"
            last = events[-1]["response"]
            assert rebuilt(events) == last["output"]
            without = [[{**item, "id": "", "call_id": ""} for item in one["output"]] for one in (whole, last)]
            assert without[0] == without[1]
            assert last["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
            if more:
                part = whole["output"][0]["content"][0]
                assert "".join(token["token"] for token in part["logprobs"]).startswith(part["text"])
                assert all(len(token["top_logprobs"]) == 2 for token in part["logprobs"])

    run(test)


def test_a_conversation_goes_on_by_the_id_of_the_last_response() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        first = await post(client, ROUTE, {"input": "What is 3 + 4?", "instructions": "Be kind.", "temperature": 0})
        body = {"input": "And 5 + 6?", "previous_response_id": first["id"], "temperature": 0, "max_output_tokens": 4}
        service = embedded_service()
        answer = first["output"][0]["content"][0]["text"]
        asked = {"role": "user", "content": "And 5 + 6?"}
        same = await post(client, ROUTE, {**body, "instructions": "Be kind."})
        assert app.state.server.kept.rebuilt == 1, "its tokens, token by token"
        new = service.template.following([asked])
        size = sum(len(service.tokenizer.encode(p.text, allow_special=p.special, continuation=True)) for p in new)
        assert same["usage"]["input_tokens"] == first["usage"]["total_tokens"] + size
        cached = same["usage"]["input_tokens_details"]["cached_tokens"]
        assert first["usage"]["total_tokens"] - cached < 16, "all but an unfinished page"
        # instructions do not carry over: other ones make another prompt
        other = await post(client, ROUTE, body)
        assert app.state.server.kept.rebuilt == 1
        said = [{"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": answer}, asked]
        chat = await post(client, "/v1/chat/completions", {"messages": said, "temperature": 0, "max_tokens": 4})
        assert other["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
        assert other["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
        assert (other["status"], other["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        assert other["output"][0]["status"] == "incomplete"

    run(test)


def test_a_chain_of_responses_is_counted_for_what_it_holds() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        more: dict[str, Any] = {}
        for _ in range(5):
            answer = await post(client, ROUTE, {"input": "word " * 40, "max_output_tokens": 4, **more})
            more = {"previous_response_id": answer["id"]}
        for one, _ in app.state.server.responses._stored.values():
            held = len(msgspec.json.encode([one.body, one.messages])) + 4 * len(one.answer.token_ids)
            assert 0.8 * held < one.num_bytes < 1.2 * held, "not also for all before it"

    run(test)


def test_what_is_stored_is_ones_own_and_can_be_deleted() -> None:
    ann, bob = ({"authorization": f"Bearer key-{name}-000"} for name in ("ann", "bob"))

    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        made = await post(client, ROUTE, ASK, headers=ann)
        path = f"{ROUTE}/{made['id']}"
        assert checked((await client.get(path, headers=ann)).json()) == made
        items = (await client.get(f"{path}/input_items", headers=ann)).json()
        ResponseItemList.model_validate(items)
        assert items["data"][0]["content"] == [{"type": "input_text", "text": QUESTION["content"]}]
        for method, where in (("GET", path), ("DELETE", path), ("GET", f"{path}/input_items")):
            assert (await client.request(method, where, headers=bob)).status_code == 404
        again = {**ASK, "input": "And?", "previous_response_id": made["id"]}
        theirs = await client.post(ROUTE, json=again, headers=bob)
        assert theirs.status_code == 400 and theirs.json()["error"]["code"] == "previous_response_not_found"
        assert (await client.post(f"{path}/cancel", headers=ann)).status_code == 400, "it has ended"
        assert len(app.state.server.kept) == 1
        assert (await client.delete(path, headers=ann)).json()["deleted"] is True
        await nothing_left(embedded_service())
        assert (await client.get(path, headers=ann)).status_code == 404
        secret = await post(client, ROUTE, {**ASK, "tools": [], "store": False}, headers=ann)
        assert (await client.get(f"{ROUTE}/{secret['id']}", headers=ann)).status_code == 404

    run(test, api_keys=("key-ann-000", "key-bob-000"))


def test_a_response_can_be_cancelled_while_it_is_made() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        body = {"input": "Go on.", "max_output_tokens": 1900, "ignore_eos": True}
        running = asyncio.ensure_future(client.post(ROUTE, json=body))
        board = app.state.server.board
        while not len(board):
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)
        ((_, name),) = board._at_work
        assert (await client.post(f"{ROUTE}/resp_made_up/cancel")).status_code == 404
        assert (await post(client, f"{ROUTE}/resp_{name}/cancel", {}))["status"] == "cancelled"
        answer = checked((await running).json())
        assert answer["status"] == "cancelled" and answer["id"] == f"resp_{name}"
        await nothing_left(embedded_service())

    run(test)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"tools": [{"type": "function"}]}, "without a name"),
        ({"tool_choice": "required"}, "no tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "nope"}}, "nope"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x/"}]}]}, "input_image"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "item_reference"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "No tool call found"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}]}, "No tool output"),
        ({"input": []}, "input"),
        ({"previous_response_id": "resp_made_up"}, "not found"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"max_output_tokens": 100_000}, "limit is"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "schema"),
        ({"n": 2}, "one choice"),
    ],
)
def test_what_cannot_be_done_is_a_400_that_says_so(body: dict[str, Any], word: str) -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        for stream in (False, True):
            answer = await client.post(ROUTE, json={"input": "hi", "stream": stream, **body})
            assert answer.status_code == 400, answer.text
            assert word in answer.json()["error"]["message"]

    run(test)


def test_a_conversation_too_long_loses_its_oldest_turns_only_when_asked() -> None:
    turns = [{"role": role, "content": "word " * 300} for role in ("user", "assistant") * 5]
    body = {"input": [{"role": "system", "content": "Be kind."}, *turns, QUESTION], "max_output_tokens": 8}

    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        assert (await client.post(ROUTE, json=body)).status_code == 400
        answer = await post(client, ROUTE, {**body, "truncation": "auto"})
        assert 300 < answer["usage"]["input_tokens"] <= 2048 - 8
        free = await post(client, ROUTE, {"input": body["input"], "truncation": "auto"})
        assert free["usage"]["input_tokens"] <= 2048 - 512, "without a limit of the client's an answer needs room too"

    run(test)


def test_a_conversation_continued_by_its_last_answer_loses_its_oldest_turns_as_well() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        more: dict[str, Any] = {}
        sizes = []
        for _ in range(6):
            body = {"input": "word " * 450, "max_output_tokens": 8, "truncation": "auto", "temperature": 0, **more}
            answer = await post(client, ROUTE, body)
            sizes.append(answer["usage"]["input_tokens"])
            more = {"previous_response_id": answer["id"]}
        assert sizes[0] < sizes[1] and max(sizes) <= 2048 - 8

    run(test)


class Sum(BaseModel):
    total: int = Field(ge=0, le=99)  # bounded: what else the model may write has no end


def test_the_clients_own_helpers() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        async with openai_of(app) as openai:
            parsed = await openai.responses.parse(model="any", input="3 + 4?", text_format=Sum, temperature=0)
            assert isinstance(parsed.output_parsed, Sum)
            async with openai.responses.stream(**ASK) as stream:
                kinds = [found.type async for found in stream]
                final = await stream.get_final_response()
            assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
            call = final.output[0]
            assert call.type == "function_call" and json.loads(call.arguments) == {"expression": "4827 * 396"}
            after = await openai.responses.create(
                model="any",
                previous_response_id=final.id,
                input=[{"type": "function_call_output", "call_id": call.call_id, "output": "1911492"}],
                tools=TOOLS,
                temperature=0,
            )
            assert "1911492" in after.output_text
            assert (await openai.responses.retrieve(after.id)).output_text == after.output_text
            await openai.responses.delete(after.id)
            with pytest.raises(NotFoundError):
                await openai.responses.retrieve(after.id)
            with pytest.raises(BadRequestError, match="background"):
                await openai.responses.create(model="any", input="x", background=True)
            chat = await openai.chat.completions.parse(
                model="any", messages=[{"role": "user", "content": "3 + 4?"}], response_format=Sum, temperature=0
            )
            assert isinstance(chat.choices[0].message.parsed, Sum)

    run(test)
