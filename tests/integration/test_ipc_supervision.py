"""What happens when either process dies, hangs or is told to end: clear errors, a new engine, nothing left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from caesura.runtime.config import EngineConfig
from caesura.runtime.errors import CaesuraError, EngineStopped
from caesura.runtime.ipc.client import EngineClient, RemoteHandle
from caesura.runtime.ipc.connection import State, Supervision
from caesura.runtime.ipc.launch import _signal_name
from caesura.runtime.sampling import SamplingParams
from caesura.scheduler.profile import CostProfile

PROFILE = CostProfile(0.001, 1e-5, 0.0, 1e-4, 1e-6, 256)
CONFIG = EngineConfig(kv_tokens=4096, policy="preserve", num_threads=1, profile=PROFILE)
ENDLESS = SamplingParams(max_new_tokens=1500, temperature=0.0, ignore_eos=True)
SHORT = SamplingParams(max_new_tokens=8, temperature=0.0, ignore_eos=True)
WAIT_S = 60.0


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Sockets go here, so that what is left of them can be seen. A short path: those of pytest may be too long."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"


def eventually(true: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


async def filled(client: EngineClient) -> RemoteHandle:
    handle = await client.open()
    await handle.append([5, 6, 7])
    return handle


async def count_tokens(handle: RemoteHandle, params: SamplingParams) -> int:
    return sum([len(chunk.token_ids) async for chunk in handle.generate(params)])


def pid_of(client: EngineClient) -> int:
    assert client.engine_pid is not None
    return client.engine_pid


def test_a_killed_engine_fails_its_requests_and_is_replaced(temporary: Path) -> None:
    async def scenario(client: EngineClient) -> None:
        handles = [await filled(client) for _ in range(4)]
        running = [asyncio.ensure_future(count_tokens(handle, ENDLESS)) for handle in handles]
        scoring = asyncio.ensure_future((await filled(client)).prefill())
        await asyncio.wait([scoring])
        first, life = pid_of(client), client.life
        killed_at = time.monotonic()
        os.kill(first, signal.SIGKILL)
        results = await asyncio.gather(*running, return_exceptions=True)
        noticed_s = time.monotonic() - killed_at
        assert [type(result) for result in results] == [EngineStopped] * 4
        assert "SIGKILL" in str(results[0])
        assert noticed_s < 1.0
        assert not client.ready
        with pytest.raises(EngineStopped, match="restarted"):
            await client.open()
        await asyncio.to_thread(eventually, lambda: client.ready)
        assert pid_of(client) != first and client.life != life
        assert not is_alive(first)
        assert await count_tokens(await filled(client), SHORT) == 8
        with pytest.raises(EngineStopped, match="context was lost"):
            await handles[0].token_ids()
        await handles[0].close()
        stats = await client.read_stats()
        assert stats["ipc"]["restarts"] == 1
        assert sum(stats["contexts"].values()) == 1

    with EngineClient.start(CONFIG) as client:
        asyncio.run(scenario(client))
        last = pid_of(client)
    assert not is_alive(last)
    assert not list(temporary.iterdir())
    assert client.state is State.STOPPED


def test_a_hanging_engine_counts_as_dead_and_a_dying_one_is_given_up() -> None:
    rules = Supervision(heartbeat_s=0.5, missed_heartbeats=3, max_restarts=1)
    with EngineClient.start(CONFIG, rules) as client:
        first = pid_of(client)

        async def scenario() -> None:
            running = asyncio.ensure_future(count_tokens(await filled(client), ENDLESS))
            await asyncio.sleep(0.1)
            os.kill(first, signal.SIGSTOP)
            with pytest.raises(EngineStopped, match="no sign of life"):
                await running

        asyncio.run(scenario())
        assert not is_alive(first)
        eventually(lambda: client.ready)
        os.kill(pid_of(client), signal.SIGKILL)
        eventually(lambda: client.state is State.STOPPED)
        with pytest.raises(EngineStopped, match=r"ended 2 times in 60 s; given up.*SIGKILL"):
            client.stats()


def test_closing_drains_what_runs_or_ends_it() -> None:
    async def scenario(client: EngineClient, params: SamplingParams, drain_s: float) -> int:
        handle = await filled(client)
        chunks = aiter(handle.generate(params))
        count = len((await anext(chunks)).token_ids)
        closing = asyncio.ensure_future(client.aclose(drain_s))
        await asyncio.sleep(0.05)
        if drain_s:
            with pytest.raises(EngineStopped):
                await client.open()
        try:
            async for chunk in chunks:
                count += len(chunk.token_ids)
        finally:
            await closing
        return count

    patient = EngineClient.start(CONFIG)
    pid = pid_of(patient)
    params = SamplingParams(max_new_tokens=400, temperature=0.0, ignore_eos=True)
    assert asyncio.run(scenario(patient, params, 30.0)) == 400
    assert not is_alive(pid)
    assert patient.state is State.STOPPED
    patient.close()
    hasty = EngineClient.start(CONFIG)
    with pytest.raises(CaesuraError, match="closed"):
        asyncio.run(scenario(hasty, ENDLESS, 0.0))
    with pytest.raises(EngineStopped, match="closed"):
        hasty.stats()


def test_a_drain_lasts_as_long_as_it_may_while_nothing_is_heard_of_a_request() -> None:
    async def scenario(client: EngineClient) -> float:
        handle = await filled(client)
        await client.hold(retract=False)
        waiting = asyncio.ensure_future(count_tokens(handle, SHORT))
        await asyncio.sleep(0.1)
        closed_at = time.monotonic()
        await client.aclose(1.5)
        with pytest.raises(CaesuraError, match="closed"):
            await waiting
        return time.monotonic() - closed_at

    client = EngineClient.start(CONFIG, Supervision(heartbeat_s=0.2))
    assert asyncio.run(scenario(client)) >= 1.5


def test_a_burst_waits_for_room_and_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caesura.runtime.ipc.channel.MAX_UNACKED_BYTES", 1 << 20)

    async def scenario(client: EngineClient) -> set[str]:
        handles = [await client.open() for _ in range(12)]
        appends = (handle.append([200] * 100_000) for handle in handles)  # 2 bytes each
        return {type(answer).__name__ for answer in await asyncio.gather(*appends, return_exceptions=True)}

    with EngineClient.start(CONFIG) as client:
        assert asyncio.run(scenario(client)) == {"ContextTooLong"}  # what the engine itself says of each
        assert client.stats()["ipc"]["restarts"] == 0


def test_an_end_by_any_signal_is_told() -> None:
    for number, name in ((signal.SIGKILL, "SIGKILL"), (35, "signal 35")):  # a realtime signal has no name
        assert _signal_name(number) == name


PARENT = """
import os, sys, time
from caesura.runtime.ipc.client import EngineClient
from caesura.runtime.config import EngineConfig
from caesura.scheduler.profile import CostProfile
profile = CostProfile(0.001, 1e-5, 0.0, 1e-4, 1e-6, 256)
client = EngineClient.start(EngineConfig(kv_tokens=4096, policy="preserve", num_threads=1, profile=profile))
print(client.engine_pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_no_engine_outlives_its_client(temporary: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(temporary)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env=environment)
    with parent:
        assert parent.stdout is not None
        engine = int(parent.stdout.readline())
        assert list(temporary.iterdir())
        for number in (signal.SIGINT, signal.SIGTERM):  # the client decides, not a terminal or a service manager
            os.kill(engine, number)
        time.sleep(0.2)
        assert is_alive(engine)
        parent.kill()
    eventually(lambda: not is_alive(engine), 10.0)
    assert not list(temporary.iterdir())


def test_closing_during_the_start_leaves_nothing(temporary: Path) -> None:
    from caesura.runtime.ipc.connection import Connection

    threads_before = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0
    files_before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    connection = Connection(CONFIG, Supervision())
    eventually(lambda: connection.pid is not None)
    pid = connection.pid
    connection.close(0.0)
    with pytest.raises(EngineStopped):
        connection.started.result(1.0)
    assert pid is not None
    assert not is_alive(pid)
    assert not list(temporary.iterdir())
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) <= files_before
        eventually(lambda: len(os.listdir("/proc/self/task")) <= threads_before, 5.0)  # an ended thread takes a moment
