"""A client that leaves stops its request, whatever its state, streaming or not; canaries; a real server process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from caesura.runtime.config import EngineConfig
from caesura.runtime.errors import EngineStopped
from caesura.runtime.handle import ContextHandle
from caesura.runtime.ipc.client import EngineClient
from caesura.runtime.ipc.connection import Supervision
from caesura.runtime.server import ServerConfig, serve
from caesura.runtime.server.http import settled
from caesura.runtime.server.work import merged
from fastapi import FastAPI

from tests.integration.server_client import QUESTION, TOOLS, answered, embedded_service, nothing_left, post, run

LONG = {"max_tokens": 1500, "ignore_eos": True, "messages": [QUESTION]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": LONG,
    "/v1/completions": {"prompt": ["a b", "c d"], "max_tokens": 1500, "ignore_eos": True, "n": 2},
    "/generate": {"text": "a b", "sampling_params": {"max_new_tokens": 1500, "ignore_eos": True}},
}


async def leave(
    app: FastAPI,
    path: str,
    body: dict[str, Any],
    *,
    after_events: int,
    after_s: float,
    gone: asyncio.Event | None = None,
    stuck_at: bytes | None = None,
) -> int:
    """Send a request and hang up after so many body messages, or so many seconds, or when ``gone`` is set, or at the
    message that holds ``stuck_at``, which is never taken: it must come. Returns how many messages came.
    """
    raw = json.dumps(body).encode()
    gone, stuck = gone or asyncio.Event(), asyncio.Event()
    sent = 0
    first = True

    async def receive() -> dict[str, Any]:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": raw, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal sent
        if message["type"] == "http.response.body":
            sent += 1
            if sent >= after_events:
                gone.set()
            if stuck_at is not None and stuck_at in message.get("body", b""):
                stuck.set()
                asyncio.get_running_loop().call_later(0.05, gone.set)
                await asyncio.Event().wait()

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": [(b"host", b"localhost")], "client": ("127.0.0.1", 5), "server": ("127.0.0.1", 1), "state": {},
    }  # fmt: skip
    asyncio.get_running_loop().call_later(after_s, gone.set)
    await asyncio.wait_for(app(scope, receive, send), 20)
    assert stuck_at is None or stuck.is_set()
    return sent


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after_s", [0.0, 0.002, 0.02, 0.2])
def test_a_client_that_leaves_frees_its_contexts(path: str, stream: bool, after_s: float) -> None:
    async def test(_: httpx.AsyncClient, app: FastAPI) -> None:
        await leave(app, path, {**BODIES[path], "stream": stream}, after_events=10_000, after_s=after_s)
        assert len(app.state.server.board) == 0
        await nothing_left(embedded_service())

    run(test)


def test_a_client_that_leaves_in_the_middle_of_a_stream() -> None:
    async def test(_: httpx.AsyncClient, app: FastAPI) -> None:
        sent = await leave(app, "/v1/chat/completions", {**LONG, "stream": True}, after_events=5, after_s=10)
        assert sent < 100
        await nothing_left(embedded_service())

    run(test)


@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_never_hears_of_its_tool_call_leaves_no_paused_context(n: int) -> None:
    """The answer has ended in calls and its contexts are paused, but the client is gone before the last event: it does
    not know the calls' ids, so nobody will come back."""

    async def test(_: httpx.AsyncClient, app: FastAPI) -> None:
        path = "/v1/chat/completions"
        body = {"messages": [QUESTION], "tools": TOOLS, "temperature": 0, "stream": True, "n": n}
        assert await leave(app, path, body, after_events=10_000, after_s=15, stuck_at=b'"finish_reason":"tool_calls"')
        assert len(app.state.server.kept) == 0
        await nothing_left(embedded_service())

    run(test)


def test_a_client_that_never_hears_of_the_choice_that_had_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a whole answer either all choices are told or none."""

    async def test(_: httpx.AsyncClient, app: FastAPI) -> None:
        kept, gone, pause, calls = app.state.server.kept, asyncio.Event(), ContextHandle.pause, list[Any]()

        async def held(*args: Any, **more: Any) -> None:
            calls.append(args)
            if len(calls) == 2:
                while not len(kept):
                    await asyncio.sleep(0.002)
                asyncio.get_running_loop().call_later(0.05, gone.set)
                await asyncio.Event().wait()
            await pause(*args, **more)

        monkeypatch.setattr(ContextHandle, "pause", held)
        body = {"messages": [QUESTION], "tools": TOOLS, "temperature": 0, "n": 2}
        await leave(app, "/v1/chat/completions", body, after_events=10_000, after_s=15, gone=gone)
        assert len(calls) == 2 and len(kept) == 0
        await nothing_left(embedded_service())

    run(test)


def test_leaving_while_queued_behind_others() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        prompts = {"prompt": ["word " * 600] * 16, "max_tokens": 8}
        ahead = asyncio.ensure_future(client.post("/v1/completions", json=prompts))
        await asyncio.sleep(0.02)
        await leave(app, "/generate", BODIES["/generate"], after_events=10_000, after_s=0.02)
        assert (await ahead).status_code == 200
        await nothing_left(embedded_service())

    run(test)


def test_leaving_while_a_paused_context_is_gone_on_with() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        chat = "/v1/chat/completions"
        ask = {"messages": [QUESTION], "tools": TOOLS, "temperature": 0}
        message = (await post(client, chat, ask))["choices"][0]["message"]
        body = {**ask, "messages": [QUESTION, *answered(message)]}
        gone = asyncio.Event()
        leaving = asyncio.ensure_future(leave(app, chat, body, after_events=10_000, after_s=10, gone=gone))
        while embedded_service().stats()["contexts"]["paused"] and not leaving.done():
            await asyncio.sleep(0)
        gone.set()
        await leaving
        await nothing_left(embedded_service())
        answer = await post(client, chat, body)  # the client tries again
        assert "1911492" in answer["choices"][0]["message"]["content"]

    run(test)


def test_canaries_of_many_clients_do_not_mix() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        async def one(number: int) -> None:
            word = f"canary{number:04d}"
            path = ("/v1/chat/completions", "/generate")[number % 2]
            held: dict[str, Any] = {"messages": [QUESTION], "regex": word, "stream": bool(number % 3)}
            if number % 2:
                held = {"text": "x", "sampling_params": {"regex": word}, "stream": bool(number % 3)}
            answer = await client.post(path, json=held)
            text = answer.text
            if number % 3:
                parts = [json.loads(line[6:]) for line in text.split("\n\n") if line and line != "data: [DONE]"]
                text = (
                    parts[-1]["text"]
                    if number % 2
                    else "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
                )
                assert text == word
            else:
                assert word in text
            assert text.count("canary") == 1

        await asyncio.gather(*(one(number) for number in range(60)))

    run(test)


def test_merged_generators_end_together() -> None:
    closed: list[str] = []

    async def count(name: str, limit: int) -> Any:
        try:
            for i in range(limit):
                await asyncio.sleep(0)
                yield f"{name}{i}"
            if limit == 2:
                raise ValueError("enough")
        finally:
            closed.append(name)

    async def main() -> None:
        assert sorted([item async for item in merged([count("a", 1), count("b", 3)])]) == ["a0", "b0", "b1", "b2"]
        with pytest.raises(ValueError, match="enough"):
            async for _ in merged([count("c", 2), count("d", 10_000)]):
                pass
        assert sorted(closed) == ["a", "b", "c", "d"]
        await settled(asyncio.sleep(0))

    asyncio.run(main())


# -- a real process ----------------------------------------------------------------------------------------------

PROGRAM = """
import logging, sys
from caesura.runtime.config import EngineConfig
from caesura.runtime.server import ServerConfig, serve
logging.basicConfig(level=logging.WARNING)
if __name__ == "__main__":
    engine = EngineConfig(num_threads=1, kv_tokens=8192)
    drain_s = float(sys.argv[3])
    serve(ServerConfig(engine, port=int(sys.argv[1]), in_process=sys.argv[2] == "in", drain_s=drain_s))
"""


@contextmanager
def server(where: str, drain_s: float = 20.0) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server process that is ready, and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(port), where, str(drain_s)], env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(process, url)
        yield process, url
    finally:
        process.kill()
        process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    for _ in range(600):
        try:
            if httpx.get(f"{url}/ready", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            assert process.poll() is None
        time.sleep(0.1)
    raise AssertionError("the server does not get ready")


def children(pid: int) -> list[int]:
    found: list[int] = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        found += map(int, tasks.read_text().split())
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the engine's process in /proc")
def test_a_server_process_from_disconnects_to_a_killed_engine_to_sigterm() -> None:
    with server("own") as (process, url), httpx.Client(trust_env=False, timeout=60, base_url=url) as client:
        path = "/v1/chat/completions"
        with client.stream("POST", path, json={**LONG, "stream": True}) as answer:
            next(answer.iter_lines())
        with pytest.raises(httpx.ReadTimeout):
            client.post(path, json=LONG, timeout=0.1)
        for _ in range(200):
            stats = client.get("/server_info").json()["internal_states"][0]["contexts"]
            if not any(stats.values()):
                break
            time.sleep(0.02)
        assert not any(stats.values()), "both clients are gone, so must be their contexts"

        ask = {"messages": [QUESTION], "tools": TOOLS, "temperature": 0}
        message = client.post(path, json=ask).json()["choices"][0]["message"]
        name = client.post("/v1/contexts", json={"pieces": [{"text": "a"}]}).json()["id"]
        engines = children(process.pid)
        answers: list[httpx.Response] = []

        def wait_for_answer(stream: bool) -> None:
            body = {**LONG, "max_tokens": 1900, "stream": stream}
            answers.append(httpx.post(url + path, json=body, timeout=30, trust_env=False))

        threads = [threading.Thread(target=wait_for_answer, args=(stream,)) for stream in (False, True)]
        for thread in threads:
            thread.start()
        for _ in range(600):
            if client.get("/server_info").json()["internal_states"][0]["contexts"]["running"] == 2:
                break
            time.sleep(0.02)
        time.sleep(0.2)  # the stream's first event is under way
        for pid in engines:
            os.kill(pid, signal.SIGKILL)
        for thread in threads:
            thread.join(10)
        assert sorted(answer.status_code for answer in answers) == [200, 503], "every client is answered"
        assert all("engine_unavailable" in answer.text for answer in answers)
        wait_until_ready(process, url)
        body = {**ask, "messages": [QUESTION, *answered(message)]}  # the tokens outlived the engine
        assert "1911492" in client.post(path, json=body).json()["choices"][0]["message"]["content"]
        assert 'how="rebuilt"} 1.0' in client.get("/metrics").text
        assert client.get(f"/v1/contexts/{name}/decisions").status_code == 410
        assert client.post(f"/v1/contexts/{name}/append", json={"pieces": [{"text": "b"}]}).status_code == 410

        engines = children(process.pid)
        lines: list[str] = []
        with client.stream("POST", path, json={**LONG, "max_tokens": 300, "stream": True}) as answer:
            for line in answer.iter_lines():
                if not lines:
                    process.send_signal(signal.SIGTERM)
                lines.append(line)
        assert "data: [DONE]" in lines, "what runs is finished"
        assert process.wait(20) in (0, -signal.SIGTERM)
        assert not any(alive(pid) for pid in engines)


def test_the_second_signal_stops_at_once() -> None:
    with server("in") as (process, url):

        def ask() -> None:
            with pytest.raises(httpx.HTTPError):
                httpx.post(f"{url}/generate", json=endless, timeout=30, trust_env=False).raise_for_status()

        endless = {"text": ["a"] * 64, "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True}}
        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.3)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.wait(10)
        assert time.monotonic() - started < 8
        thread.join(10)


def test_whoever_waits_when_the_drain_ends_is_told() -> None:
    endless = {"text": ["a"] * 64, "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True}}
    asks = {
        "/generate": endless,
        "/v1/chat/completions": {**LONG, "max_tokens": 1900, "stream": True},
        "/v1/responses": {"input": "a", "stream": True, "max_output_tokens": 1900, "ignore_eos": True},
    }
    answers: dict[str, httpx.Response] = {}
    with server("in", drain_s=1.0) as (process, url), httpx.Client(trust_env=False, timeout=60) as client:

        def ask(path: str) -> None:
            answers[path] = httpx.post(url + path, json=asks[path], timeout=30, trust_env=False)

        threads = [threading.Thread(target=ask, args=(path,)) for path in asks]
        for thread in threads:
            thread.start()
        for _ in range(600):
            if client.get(f"{url}/server_info").json()["requests"] == len(asks):
                break
            time.sleep(0.02)
        time.sleep(0.6)  # the streams have begun
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(20)
        assert process.wait(20) in (0, -signal.SIGTERM)
    assert {path: answer.status_code for path, answer in answers.items()} == dict(
        zip(asks, (503, 200, 200), strict=True)
    )
    assert all("the server is shutting down" in answer.text for answer in answers.values()), answers
    assert all("x-request-id" in answer.headers for answer in answers.values())


def test_a_server_whose_engine_is_lost_for_good_ends_and_says_so() -> None:
    service = EngineClient.start(EngineConfig(num_threads=1, kv_tokens=1024), Supervision(max_restarts=0))
    with socket.socket() as listener, ThreadPoolExecutor(1) as pool:
        listener.bind(("127.0.0.1", 0))
        config = ServerConfig(port=listener.getsockname()[1])
        serving = pool.submit(serve, config, start_service=lambda _: service, sockets=[listener])
        url = f"http://127.0.0.1:{config.port}"
        for _ in range(600):
            try:
                assert httpx.get(f"{url}/ready", trust_env=False).status_code == 200
                break
            except httpx.HTTPError:
                time.sleep(0.02)
        pid = service.engine_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineStopped, match=r"given up.*SIGKILL"):
            serving.result(20)
