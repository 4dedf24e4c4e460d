"""kill -9 of the engine under load: every client gets an answer or an error, the server gets ready again, and nothing
of the dead engine is left: no descriptor, no thread, no file, no context, no page."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.server_client import QUESTION, TOOLS, answered
from tests.integration.test_server_disconnect import alive, children, server, wait_until_ready

NUM_CLIENTS = 24
ENDLESS = {"max_new_tokens": 1500, "ignore_eos": True}
CHAT = "/v1/chat/completions"


def footprint(pid: int) -> dict[str, int]:
    """What the server process holds of the system."""
    return {name: len(os.listdir(f"/proc/{pid}/{name}")) for name in ("fd", "task")}


async def one(http: httpx.AsyncClient, number: int) -> tuple[int, str]:
    """A long request of one of six kinds; its status and text."""
    chat = {"messages": [QUESTION], "max_tokens": 1500, "ignore_eos": True}
    path, body = [
        (CHAT, chat),
        (CHAT, {**chat, "stream": True}),
        ("/generate", {"text": "a b", "sampling_params": ENDLESS}),
        ("/generate", {"text": ["a"] * 4, "sampling_params": ENDLESS, "stream": True}),
        ("/v1/completions", {"prompt": "c", "max_tokens": 1500, "ignore_eos": True, "n": 2}),
        ("context", ENDLESS),
    ][number % 6]
    if path == "context":
        made = await http.post("/v1/contexts", json={"pieces": [{"text": "a"}]})
        path = f"/v1/contexts/{made.json()['id']}/generate"
        body = {**body, "stream": number % 4 == 1}
    answer = await http.post(path, json=body)
    return answer.status_code, answer.text


def is_told(status: int, text: str) -> bool:
    """Whether a client knows how its request ended: an error object, or a stream with an error event."""
    if status == 200:
        events = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
        return any("error" in event for event in events)
    return status in (410, 503) and "error" in json.loads(text)


async def crash(http: httpx.AsyncClient, server_pid: int) -> None:
    """Load, kill, look at every answer."""
    (engine,) = children(server_pid)
    work = [asyncio.ensure_future(one(http, number)) for number in range(NUM_CLIENTS)]
    for _ in range(600):
        stats = (await http.get("/server_info")).json()["internal_states"][0]
        if stats["contexts"]["running"] + stats["contexts"]["queued"] >= NUM_CLIENTS:
            break
        await asyncio.sleep(0.02)
    assert not any(task.done() for task in work), "the requests are longer than the way to the kill"
    os.kill(engine, signal.SIGKILL)
    async with asyncio.timeout(30):
        answers = await asyncio.gather(*work)
    untold = [answer for answer in answers if not is_told(*answer)]
    assert not untold, untold[:3]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks at /proc")
def test_every_client_is_answered_when_the_engine_is_killed_and_nothing_is_left() -> None:
    with server("own") as (process, url):

        async def main() -> None:
            limits = httpx.Limits(max_connections=NUM_CLIENTS + 4, max_keepalive_connections=0)
            async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False, limits=limits) as http:
                ask: dict[str, Any] = {"messages": [QUESTION], "tools": TOOLS, "temperature": 0}
                message = (await http.post(CHAT, json=ask)).json()["choices"][0]["message"]
                seen = []
                for _ in range(2):
                    engines = children(process.pid)
                    await crash(http, process.pid)
                    await asyncio.to_thread(wait_until_ready, process, url)
                    assert not any(alive(pid) for pid in engines)
                    answer = await http.post("/generate", json={"text": "x", "sampling_params": {"max_new_tokens": 2}})
                    assert answer.status_code == 200
                    seen.append(await settled_footprint(process.pid))
                assert seen[1]["fd"] <= seen[0]["fd"] and seen[1]["task"] <= seen[0]["task"], seen
                await check_nothing_left(http)
                body = {**ask, "messages": [QUESTION, *answered(message)]}
                said = (await http.post(CHAT, json=body)).json()["choices"][0]["message"]["content"]
                assert "1911492" in said, "what waited for its tool outlived both engines"

        asyncio.run(main())


async def settled_footprint(pid: int) -> dict[str, int]:
    """The footprint once connections that clients closed are gone: the least of a while."""
    found = []
    for _ in range(20):
        found.append(footprint(pid))
        await asyncio.sleep(0.05)
    return {name: min(one[name] for one in found) for name in found[0]}


async def check_nothing_left(http: httpx.AsyncClient) -> None:
    info = (await http.get("/server_info")).json()
    stats = info["internal_states"][0]
    assert not any(stats["contexts"].values()), stats["contexts"]
    assert stats["free_pages"] + stats["cached_pages"] in (stats["device_pages"], stats["device_pages"] - 1)
    assert stats["paused_pages"] == 0
    assert info["requests"] == 0
    assert info["kept_contexts"] == 1, "only the answer that waits for its tool"
    made = await http.post("/v1/contexts", json={})  # making one forgets those that died
    assert made.status_code == 201
    assert "caesura_named_contexts 1.0" in (await http.get("/metrics")).text
