"""The dashboard's state over an engine process, and over the next one after that was killed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import httpx
from caesura.runtime.api import PendingCall
from caesura.runtime.config import EngineConfig
from caesura.runtime.ipc.client import EngineClient
from caesura.runtime.sampling import SamplingParams
from caesura.runtime.server import ServerConfig, create_app

from tests.integration.server_client import client_of

PATH = "/v1/dashboard/state"


async def until(client: httpx.AsyncClient, life: str, statuses: set[int]) -> dict[str, Any]:
    """Ask until another engine than ``life`` answers; notes what came before."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        answer = await client.get(PATH, params={"life": life, "since": 1 << 40})
        statuses.add(answer.status_code)
        if answer.status_code == 200 and answer.json()["engine"]["life"] != life:
            engine: dict[str, Any] = answer.json()["engine"]
            return engine
        await asyncio.sleep(0.05)
    raise AssertionError(f"no new engine; the server answered {statuses}")


def test_the_picture_crosses_the_process_border_and_outlives_the_engine() -> None:
    async def run(service: EngineClient) -> None:
        async with client_of(create_app(service, ServerConfig())) as client:
            handle = await service.open(namespace="nobody's business")
            await handle.append(list(range(10, 60)))
            async for _ in handle.generate(SamplingParams(max_new_tokens=3, temperature=0.0)):
                pass
            await handle.pause([PendingCall("a <b>tool</b>", expected_s=9.0)])
            answer = await client.get(PATH)
            assert answer.status_code == 200 and "nobody" not in answer.text
            before = answer.json()["engine"]
            (context,) = before["contexts"]
            assert (context["id"], context["state"], context["tool"]) == (handle.id, "preserved", "a <b>tool</b>")
            assert context["held_tokens"] > 40 and 0 < context["expected_remaining_s"] <= 9
            assert [node["state"] for node in before["nodes"]] == ["preserved"] * len(before["nodes"]) != []
            assert service.engine_pid is not None
            os.kill(service.engine_pid, signal.SIGKILL)
            statuses: set[int] = set()
            after = await until(client, before["life"], statuses)
            assert statuses <= {200, 503} and 503 in statuses
            assert after["contexts"] == after["nodes"] == after["spans"] == []
            assert after["pool"]["free_pages"] == after["device_pages"]

    with EngineClient.start(EngineConfig(num_threads=1, kv_tokens=1024)) as service:
        asyncio.run(run(service))
