"""A server on the embedded model, for the server's tests: in this process, over ASGI, with a calculator to call."""

from __future__ import annotations

import asyncio
import atexit
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import Any

import httpx
import pytest
from caesura.runtime.config import EngineConfig
from caesura.runtime.embedded.calculator import calculate
from caesura.runtime.embedded.chat import CALCULATOR_TOOL
from caesura.runtime.server import ServerConfig, create_app
from caesura.runtime.service import EngineService
from fastapi import FastAPI

from tests.integration.server_types import checked

BASE_URL = "http://127.0.0.1:30000"
TOOLS = [CALCULATOR_TOOL]
QUESTION = {"role": "user", "content": "What is 4827 * 396?"}


@asynccontextmanager
async def client_of(app: FastAPI, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client whose requests go straight into the application."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url=BASE_URL, timeout=60, **options) as client:
        yield client


def make_app(service: EngineService, **options: Any) -> FastAPI:
    """An application on a running engine."""
    return create_app(service, ServerConfig(**options))


def events_of(text: str) -> Iterator[dict[str, Any]]:
    """The JSON of a stream's events, checked by OpenAI's types; the stream ends with [DONE]."""
    lines = [line for line in text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]", lines[-3:]
    for line in lines[:-1]:
        assert line.startswith("data: ")
        yield checked(json.loads(line.removeprefix("data: ")))


def answered(message: dict[str, Any]) -> list[dict[str, Any]]:
    """An assistant message with calls, and the calculator's results."""
    results = []
    for call in message["tool_calls"]:
        value = calculate(json.loads(call["function"]["arguments"])["expression"])
        results.append({"role": "tool", "tool_call_id": call["id"], "content": str(value)})
    return [message, *results]


class Held:
    """A coroutine method that waits at its beginning until it may go on."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.num_calls = 0
        self.go_on = asyncio.Event()
        whole = getattr(owner, name)

        async def held(*args: Any, **more: Any) -> Any:
            self.num_calls += 1
            await self.go_on.wait()
            return await whole(*args, **more)

        patch.setattr(owner, name, held)

    async def reached(self) -> None:
        while not self.num_calls:
            await asyncio.sleep(0.002)


async def nothing_left(service: EngineService) -> None:
    """Wait until no context is open."""
    for _ in range(200):
        if not any(service.stats()["contexts"].values()):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(service.stats()["contexts"])


@lru_cache(maxsize=1)
def embedded_service() -> EngineService:
    """One engine on the embedded model for all of the server's tests; every figure is exact, so it is deterministic."""
    service = EngineService.start(EngineConfig(num_threads=1, kv_tokens=1 << 15, deterministic=True))
    atexit.register(service.close)
    return service


def run(test: Callable[[httpx.AsyncClient, FastAPI], Awaitable[None]], **options: Any) -> None:
    """Run a test on a fresh application with an empty cache; afterwards no context may be left open."""

    async def main() -> None:
        service = embedded_service()
        await service.flush_cache()
        app = make_app(service, **options)
        try:
            async with client_of(app) as client:
                await test(client, app)
        finally:
            await app.state.server.close()
        await nothing_left(service)

    asyncio.run(main())


async def post(client: httpx.AsyncClient, path: str, body: dict[str, Any], **more: Any) -> Any:
    """The answer's JSON; it must be a success, and what OpenAI's types say."""
    answer = await client.post(path, json=body, **more)
    assert answer.status_code in (200, 201), answer.text
    return checked(answer.json())
