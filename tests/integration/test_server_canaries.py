"""SEC-16: two hundred clients at once, each with a secret of its own. None sees another's, whoever shares a key or a
prefix with whom; what one key holds, another cannot reach by its name."""

from __future__ import annotations

import asyncio
import json
import random
import re
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from tests.integration.server_hostile import with_remote

NUM_CLIENTS = 200
KEYS = [f"sk-canary-{number:04d}" for number in range(10)]
SHARED = "You are one of many. Everybody who works here begins with these very words. "
CANARY = re.compile(r"canary[0-9a-f]{12}")


def streamed_text(text: str) -> str:
    """What a stream says, its pieces put together choice by choice."""
    said: dict[int, str] = {}
    for line in text.split("\n"):
        if not line.startswith("data: {"):
            continue
        event = json.loads(line[6:])
        for one in event.get("choices", ()):
            piece = one.get("delta", one)
            said[one["index"]] = said.get(one["index"], "") + (piece.get("content") or piece.get("text") or "")
        if "choices" not in event:  # SGLang's events say everything anew
            said[0] = event.get("text") or ""
    return "\n".join(said.values())


class Client:
    """One client with its secret. Every answer it gets may hold this secret and no other."""

    def __init__(self, http: httpx.AsyncClient, key: str, secret: str) -> None:
        self._http = http
        self._headers = {"authorization": f"Bearer {key}"}
        self.key = key
        self.secret = secret
        self.sightings = 0

    async def ask(self, method: str, path: str, body: dict[str, Any] | None = None, status: int = 200) -> str:
        answer = await self._http.request(method, path, json=body, headers=self._headers)
        assert answer.status_code == status, (path, answer.text[:300])
        seen = set(CANARY.findall(answer.text)) | set(CANARY.findall(streamed_text(answer.text)))
        assert seen <= {self.secret}, (path, self.secret, seen)
        self.sightings += bool(seen)
        return answer.text

    async def post(self, path: str, body: dict[str, Any], status: int = 200) -> Any:
        return json.loads(await self.ask("POST", path, body, status))


async def chats(client: Client, stream: bool) -> None:
    system = {"role": "system", "content": SHARED}
    user = {"role": "user", "content": f"My secret is {client.secret}."}
    body = {"messages": [system, user], "regex": client.secret, "stream": stream, "max_tokens": 40}
    text = await client.ask("POST", "/v1/chat/completions", body)
    if not stream:
        assert json.loads(text)["choices"][0]["message"]["content"] == client.secret


async def completes(client: Client, stream: bool) -> None:
    body = {"prompt": SHARED + client.secret, "echo": True, "max_tokens": 4, "n": 2, "stream": stream}
    assert client.secret in await client.ask("POST", "/v1/completions", body)


async def generates(client: Client, stream: bool) -> None:
    params = {"max_new_tokens": 24, "regex": f"{client.secret} [a-z]{{1,4}}"}
    body = {"text": SHARED, "sampling_params": params, "stream": stream}
    assert client.secret in await client.ask("POST", "/generate", body)


async def calls_a_tool(client: Client, stream: bool) -> None:
    """The secret is in the tool, in its arguments and in its result; the context pauses in between."""
    only = {"type": "string", "enum": [client.secret]}
    schema = {"type": "object", "properties": {"word": only}, "required": ["word"]}
    tool = {"type": "function", "function": {"name": "look", "description": client.secret, "parameters": schema}}
    ask = {"messages": [{"role": "user", "content": SHARED}], "tools": [tool]}
    answer = await client.post("/v1/chat/completions", {**ask, "tool_choice": "required", "max_tokens": 300})
    message = answer["choices"][0]["message"]
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"word": client.secret}
    results = [{"role": "tool", "tool_call_id": call["id"], "content": client.secret} for call in message["tool_calls"]]
    body = {"messages": [*ask["messages"], message, *results], "max_tokens": 6}
    await client.ask("POST", "/v1/chat/completions", {**body, "tools": [tool], "stream": stream})


async def holds_a_context(client: Client, stream: bool) -> str:
    made = await client.post("/v1/contexts", {"pieces": [{"text": SHARED + client.secret}]}, 201)
    path = f"/v1/contexts/{made['id']}"
    await client.ask("POST", f"{path}/generate", {"max_new_tokens": 5, "stream": stream})
    fork = (await client.post(f"{path}/fork", {"count": 1}, 201))["contexts"][0]["id"]
    await client.post(f"{path}/pause", {"calls": [{"tool": client.secret}]})
    tokens = await client.post(
        "/detokenize", {"tokens": json.loads(await client.ask("GET", f"{path}/tokens"))["token_ids"]}
    )
    assert SHARED + client.secret in tokens["text"]
    await client.ask("DELETE", f"/v1/contexts/{fork}")
    return path


async def holds_a_session(client: Client, stream: bool) -> None:
    """The second request is a continuation of the first, which only the server still has."""
    session = json.loads(await client.ask("POST", "/open_session", {}))
    said = {"session_params": {"id": session}, "text": SHARED + client.secret, "sampling_params": {"max_new_tokens": 3}}
    answer = await client.post("/generate", said)
    params = {"max_new_tokens": 40, "regex": client.secret}
    more = {"id": session, "rid": answer["meta_info"]["id"]}
    await client.ask("POST", "/generate", {"session_params": more, "text": "again ", "sampling_params": params})
    await client.ask("POST", "/close_session", {"session_id": session})


async def responds(client: Client, stream: bool) -> str:
    """A stored response, gone on from by its id."""
    first = await client.post("/v1/responses", {"input": SHARED + client.secret, "max_output_tokens": 4})
    body = {"input": client.secret, "previous_response_id": first["id"], "max_output_tokens": 4, "stream": stream}
    await client.ask("POST", "/v1/responses", body)
    path = f"/v1/responses/{first['id']}"
    assert client.secret in await client.ask("GET", path + "/input_items")
    return path


SCENES = (chats, completes, generates, calls_a_tool, holds_a_context, holds_a_session, responds)


@pytest.mark.parametrize("seed", [1])
def test_sec_16_two_hundred_clients_see_their_own_secrets_alone(seed: int) -> None:
    draw = random.Random(seed)

    async def test(app: FastAPI, http: httpx.AsyncClient) -> None:
        secrets = [f"canary{draw.getrandbits(48):012x}" for _ in range(NUM_CLIENTS)]
        clients = [Client(http, KEYS[number % len(KEYS)], secret) for number, secret in enumerate(secrets)]
        scenes = [SCENES[number // len(KEYS) % len(SCENES)] for number in range(NUM_CLIENTS)]
        order = draw.sample(range(NUM_CLIENTS), NUM_CLIENTS)
        work = {number: scenes[number](clients[number], bool(number % 3)) for number in order}
        found = dict(zip(work, await asyncio.gather(*work.values()), strict=True))
        assert all(client.sightings for client in clients), "a test that saw no secret at all would prove nothing"
        paths = {path: clients[number].key for number, path in found.items() if path is not None}
        assert len(paths) == sum(scene in (holds_a_context, responds) for scene in scenes)
        for path, key in paths.items():
            stranger = Client(http, next(other for other in KEYS if other != key), "none")
            tails = ("/tokens", "/decisions") if "contexts" in path else ("/input_items",)
            for method, url in (("GET", path), *(("GET", path + tail) for tail in tails), ("DELETE", path)):
                await stranger.ask(method, url, status=404)
            going_on = {"input": "x", "previous_response_id": path.rsplit("/", 1)[1]}
            await stranger.ask("POST", "/v1/responses", going_on, status=400)
        for path, key in paths.items():
            await Client(http, key, "none").ask("DELETE", path)

    with_remote(test, api_keys=tuple(KEYS))


def test_sec_16_a_tool_call_is_gone_on_with_by_its_own_key_alone() -> None:
    """With the id of another key's call one gets a conversation of one's own, rendered anew: no context, no tokens."""
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}

    async def test(app: FastAPI, http: httpx.AsyncClient) -> None:
        mine, other = Client(http, KEYS[0], "none"), Client(http, KEYS[1], "none")
        ask = {"messages": [{"role": "user", "content": SHARED}], "tools": [tool], "max_tokens": 300}
        ask["parallel_tool_calls"] = False  # one result goes on with one call
        path = "/v1/chat/completions"
        message = (await mine.post(path, {**ask, "tool_choice": "required"}))["choices"][0]["message"]
        result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "7"}
        body = {**ask, "messages": [*ask["messages"], message, result], "max_tokens": 2}
        kept = app.state.server.kept
        theirs = await other.post(path, body)
        assert theirs["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert (kept.continued, kept.rebuilt) == (0, 0)
        own = await mine.post(path, body)
        assert own["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        assert (kept.continued, kept.rebuilt) == (1, 0)

    with_remote(test, api_keys=tuple(KEYS))
