"""A server on the embedded model, for the server's tests: in this process, over ASGI, with a calculator to call."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from caesura.runtime.embedded.calculator import calculate
from caesura.runtime.embedded.chat import CALCULATOR_TOOL
from caesura.runtime.server import ServerConfig, create_app
from caesura.runtime.service import EngineService
from fastapi import FastAPI

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
    """The JSON of a stream's events; checks that it ends with [DONE]."""
    lines = [line for line in text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]", lines[-3:]
    for line in lines[:-1]:
        assert line.startswith("data: ")
        yield json.loads(line.removeprefix("data: "))


def answered(message: dict[str, Any]) -> list[dict[str, Any]]:
    """An assistant message with calls, and the calculator's results."""
    results = []
    for call in message["tool_calls"]:
        value = calculate(json.loads(call["function"]["arguments"])["expression"])
        results.append({"role": "tool", "tool_call_id": call["id"], "content": str(value)})
    return [message, *results]


async def nothing_left(service: EngineService) -> None:
    """Wait until no context is open."""
    for _ in range(200):
        if not any(service.stats()["contexts"].values()):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(service.stats()["contexts"])
