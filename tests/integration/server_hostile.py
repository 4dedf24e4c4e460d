"""What the hardening tests share: an engine in a process of its own behind the application, hostile values, every
field of every route as the OpenAPI document tells it, and what an answer must look like whatever was asked."""

from __future__ import annotations

import asyncio
import atexit
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import Any

import httpx
from caesura.runtime.config import EngineConfig
from caesura.runtime.ipc.client import EngineClient
from caesura.runtime.server import ServerConfig, create_app
from caesura.scheduler.profile import CostProfile
from fastapi import FastAPI

from tests.integration.server_client import client_of

PROFILE = CostProfile(0.001, 1e-5, 0.0, 1e-4, 1e-6, 256)
HOLE = "@HOLE@"
INSIDE = re.compile(r"/home/|/tmp/|/usr/|/proc/|/var/|ipc:|Traceback|\.py\b|\bpid\b|0x[0-9a-f]{6,}|site-packages")


def nested(depth: int, opening: str = "[", closing: str = "]", core: str = "1") -> str:
    """JSON of that depth."""
    return opening * depth + core + closing * depth


NUMBERS = ["-1", "0", "1", "2147483648", "9223372036854775808", "-9223372036854775809", "1e308", "-1e308", "1e999",
           "5e-324", "-0.0", "0.5", "9" * 5000, "NaN", "Infinity", "-Infinity"]  # fmt: skip
STRINGS = ['""', '"x"', '"' + "x" * 100_000 + '"', r'"\ud800"', r'"\udc00\ud800 x"', r'"\u0000"', '"\U0010ffff"',
           r'"\r\nX: y"', '"../../../etc/passwd"', '"<|im_start|>system"', '"{{ 7*7 }}"']  # fmt: skip
SHAPES = ["null", "true", "[]", "{}", "[null]", "[-1]", '["x","x"]', '{"a":1}', '{"a":null,"a":[1]}',
          nested(50), nested(64), nested(10_000), nested(10_000, '{"a":', "}"), "1 2", "", "'x'"]  # fmt: skip
VALUES = [text.encode() for text in (*NUMBERS, *STRINGS, *SHAPES)] + [b'"\xff\xfe"', b'"\x00"', b'"\xed\xa0\x80"']

# What a request needs beside the field at test, so that a value that is taken is taken all the way.
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
BASES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/responses": {"input": "a", "max_output_tokens": 1},
    "/generate": {"text": "a", "sampling_params": {"max_new_tokens": 1}},
    "/v1/contexts/{context_id}/generate": {"max_new_tokens": 1, "stream": False},
    "/v1/contexts/{context_id}/pause": {"calls": [{"tool": "t"}]},
    "/v1/contexts/{context_id}/progress": {"fraction": 0.5},
}
RICH: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"logprobs": True, "tools": [_TOOL], "stream": True},
    "/v1/completions": {"logprobs": 1, "echo": True, "n": 2, "stream": True},
    "/generate": {"return_logprob": True, "logprob_start_len": 0, "stream": True},
    "/v1/contexts/{context_id}/generate": {"tools": [_TOOL], "logprobs": 1, "stream": True},
}


@lru_cache(maxsize=1)
def remote_service() -> EngineClient:
    """One engine process for the hardening tests of this run."""
    client = EngineClient.start(EngineConfig(num_threads=1, kv_tokens=1 << 14, deterministic=True, profile=PROFILE))
    atexit.register(client.close)
    return client


@asynccontextmanager
async def remote_app(**options: Any) -> AsyncIterator[tuple[FastAPI, httpx.AsyncClient]]:
    """A fresh application on that engine; afterwards no context may be open and the process must be the same."""
    service = remote_service()
    pid = service.engine_pid
    await service.flush_cache()
    app = create_app(service, ServerConfig(default_max_tokens=4, request_deadline_s=60, **options))
    try:
        async with client_of(app) as client:
            yield app, client
    finally:
        await app.state.server.close()
    await idle(service)
    assert service.engine_pid == pid, "the engine was replaced"
    assert (await service.read_stats())["ipc"]["restarts"] == 0


def with_remote(test: Callable[[FastAPI, httpx.AsyncClient], Awaitable[None]], **options: Any) -> None:
    """Run a test on ``remote_app``."""

    async def main() -> None:
        async with remote_app(**options) as (app, client):
            await test(app, client)

    asyncio.run(main())


async def idle(service: Any) -> dict[str, Any]:
    """Wait until no context is open; returns the account."""
    for _ in range(500):
        stats: dict[str, Any] = await service.read_stats()
        if not any(stats["contexts"].values()):
            return stats
        await asyncio.sleep(0.01)
    raise AssertionError(stats["contexts"])


# -- every field of every route ----------------------------------------------------------------------------------


def bodies_of(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, schema of the body) of every route that takes one."""
    for path, operations in document["paths"].items():
        for operation in operations.values():
            content = operation.get("requestBody", {}).get("content", {})
            if "application/json" in content:
                yield path, content["application/json"]["schema"]


def fields_of(document: dict[str, Any], schema: dict[str, Any], depth: int = 6) -> Iterator[tuple[str, Any]]:
    """(name, a value of this schema with a hole in that field), for every field at every depth."""
    if depth == 0:
        return
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    for variant in schema.get("anyOf", ()):
        yield from fields_of(document, variant, depth)
    required = {name: example(document, schema["properties"][name]) for name in schema.get("required", ())}
    for name, part in schema.get("properties", {}).items():
        yield name, {**required, name: HOLE}
        for inner, value in fields_of(document, part, depth - 1):
            yield f"{name}.{inner}", {**required, name: value}
    if isinstance(schema.get("items"), dict):
        yield "[]", [HOLE]
        for inner, value in fields_of(document, schema["items"], depth - 1):
            yield f"[].{inner}", [value]
    if isinstance(schema.get("additionalProperties"), dict):
        yield "*", {"5": HOLE}
        yield "key", {HOLE: 1}


def example(document: dict[str, Any], schema: dict[str, Any]) -> Any:
    """A small valid value."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    if "anyOf" in schema:
        return example(document, schema["anyOf"][0])
    if "enum" in schema:
        return schema["enum"][-1]
    if "const" in schema:
        return schema["const"]
    match schema.get("type"):
        case "object":
            return {name: example(document, schema["properties"][name]) for name in schema.get("required", ())}
        case "array":
            return [example(document, schema.get("items", {}))]
        case "integer" | "number":
            return schema.get("minimum", 1)
        case "boolean":
            return True
        case _:
            return "x"


def merged(base: Any, template: Any) -> Any:
    """``template`` with what ``base`` has beside it, at every depth."""
    if isinstance(base, dict) and isinstance(template, dict):
        return {**base, **{name: merged(base.get(name), value) for name, value in template.items()}}
    if isinstance(base, dict) and isinstance(template, list):
        return [merged(base, value) for value in template]
    return template


def filled(template: Any, value: bytes) -> bytes:
    """The JSON with raw bytes in the hole, which may also be a key's."""
    raw = json.dumps(template).encode()
    return raw.replace(f'"{HOLE}"'.encode(), value)


async def go_on(client: httpx.AsyncClient, path: str) -> None:
    """Undo what stops the engine for everybody."""
    if path.endswith("/pause_generation"):
        assert (await client.post("/continue_generation", json={})).status_code == 200


# -- answers -----------------------------------------------------------------------------------------------------


def check_answer(answer: httpx.Response, what: object) -> None:
    """No server error, JSON or events, OpenAI's error object, and nothing about the inside of the server."""
    assert answer.status_code < 500, (what, answer.status_code, answer.text[:500])
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert set(error) >= {"message", "type", "param", "code"}, what
        assert len(answer.content) < 4096, what
        leak = INSIDE.search(_without_echo(error["message"]))
        assert leak is None, (what, error["message"])
    elif "text/event-stream" in answer.headers.get("content-type", ""):
        for line in answer.text.split("\n"):
            if line.startswith("data: {") and '"error"' in line:
                error = json.loads(line[6:]).get("error")
                assert error is None or error["type"] != "server_error", (what, error)


def _without_echo(message: str) -> str:
    """Error texts may repeat what the client wrote; that is no secret."""
    return message.replace("../../../etc/passwd", "")
