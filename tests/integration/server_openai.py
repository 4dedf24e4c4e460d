"""OpenAI's own client against an application in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2
from fastapi import FastAPI
from openai import AsyncOpenAI

from tests.integration.server_client import BASE_URL


@asynccontextmanager
async def openai_of(app: FastAPI, key: str = "none") -> AsyncIterator[AsyncOpenAI]:
    """The client; its requests go straight into the application."""
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport) as http:
        yield AsyncOpenAI(base_url=f"{BASE_URL}/v1", api_key=key, http_client=http, max_retries=0)
