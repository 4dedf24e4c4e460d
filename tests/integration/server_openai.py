"""OpenAI's own client against an application in this process, and its types to check every answer by."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
from fastapi import FastAPI
from openai import AsyncOpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.integration.server_client import BASE_URL

STREAM_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
KINDS: dict[str, type[Any]] = {
    "chat.completion": ChatCompletion,
    "chat.completion.chunk": ChatCompletionChunk,
    "text_completion": Completion,
    "response": Response,
}


@asynccontextmanager
async def openai_of(app: FastAPI, key: str = "none") -> AsyncIterator[AsyncOpenAI]:
    """The client; its requests go straight into the application."""
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport) as http:
        yield AsyncOpenAI(base_url=f"{BASE_URL}/v1", api_key=key, http_client=http, max_retries=0)


def checked(body: dict[str, Any]) -> dict[str, Any]:
    """A body or an event, after OpenAI's own types have taken it."""
    kind = KINDS.get(body.get("object", ""))
    if kind is not None:
        kind.model_validate(body)
    else:
        STREAM_EVENT.validate_python(body)
    return body
