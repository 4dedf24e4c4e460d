"""The engine process's own half, run on an event loop of the test: bad lines, early commands, an engine that stops."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import zmq
from caesura.runtime.config import EngineConfig
from caesura.runtime.embedded import checkpoint_path
from caesura.runtime.errors import ContextClosed, EngineStopped
from caesura.runtime.ipc import messages as m
from caesura.runtime.ipc import process
from caesura.runtime.ipc.channel import Channel
from caesura.runtime.ipc.worker import Worker
from caesura.runtime.sampling import SamplingParams
from caesura.runtime.service import EngineService
from caesura.scheduler.profile import CostProfile
from caesura.scheduler.types import ContextId

PROFILE = CostProfile(0.001, 1e-5, 0.0, 1e-4, 1e-6, 256)
CONFIG = EngineConfig(kv_tokens=2048, policy="preserve", num_threads=1, profile=PROFILE)
KEY = bytes(range(32))


def test_a_request_that_is_stopped_before_it_begins_is_answered() -> None:
    async def scene() -> list[m.Event]:
        heard: list[m.Event] = []
        with EngineService.start(CONFIG) as service:
            worker = Worker(service, heard.append)
            worker.request(m.Prefill(7, ContextId(1)))
            worker.stop(7)
            await asyncio.sleep(0.05)
            await worker.drain(1.0)
        return heard

    (answer,) = asyncio.run(scene())
    assert isinstance(answer, m.Failed)
    assert (answer.request, answer.error.kind) == (7, "ContextClosed")


class Line:
    """A client by hand, whose frames ``lose`` may drop on the way out."""

    def __init__(self, folder: Path, lose: Callable[[], bool] = lambda: False) -> None:
        self.channel: Channel[m.Event] = Channel(
            KEY, sends=process.TO_ENGINE, receives=process.TO_CLIENT, inbound=m.Event
        )
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(f"ipc://{folder}/{process.SOCKET_NAME}")
        self._lose = lose
        self.heard: list[m.Event] = []

    def send(self, *commands: m.Command) -> None:
        self._put(self.channel.pack([m.encode(command) for command in commands]))

    def _put(self, frames: list[bytes]) -> None:
        for frame in frames:
            if not self._lose():
                self.socket.send(frame)

    async def until(self, true: Callable[[list[m.Event]], bool]) -> None:
        """Listen, and write notes as a client does, until what was heard is enough."""
        async with asyncio.timeout(30):
            while not true(self.heard):
                with contextlib.suppress(zmq.Again):
                    while True:
                        frame = self.socket.recv(zmq.NOBLOCK)
                        if not self._lose():
                            received = self.channel.take(frame)
                            self.heard += received.messages
                            self._put(received.replies)
                self._put([self.channel.note()])
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def running(
    folder: Path, lose: Callable[[], bool] = lambda: False
) -> AsyncIterator[tuple[Line, asyncio.Task[int]]]:
    assignment = process.Assignment(str(folder), KEY, CONFIG, 0.02, os.getpid(), -1)
    task = asyncio.create_task(process.EngineProcess(assignment).run())
    line = Line(folder, lose)
    try:
        yield line, task
        await asyncio.wait_for(task, 30)
    finally:
        task.cancel()
        line.socket.close()


def kinds(events: list[m.Event]) -> set[type[m.Event]]:
    return {type(event) for event in events}


@pytest.mark.parametrize("seed", range(3))
def test_a_line_that_loses_every_fifth_frame_loses_nothing(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    lossy = [False]

    async def scenario() -> tuple[list[int], dict[str, int]]:
        async with running(tmp_path, lambda: lossy[0] and draw.random() < 0.2) as (line, _):
            line.send(m.Ping())
            await line.until(lambda heard: m.Ready in kinds(heard))
            lossy[0] = True
            line.send(m.Open(1, "", None))
            await line.until(lambda heard: m.Opened in kinds(heard))
            context = next(event.context for event in line.heard if isinstance(event, m.Opened))
            for number in range(2, 40):
                line.send(m.Append(number, context, (number,)))
            line.send(m.Tokens(40, context), m.Generate(41, context, SamplingParams(max_new_tokens=60), None))
            await line.until(lambda heard: any(isinstance(e, m.Chunk) and e.chunk.finish for e in heard))
            line.send(m.Stats(42))
            await line.until(lambda heard: m.Account in kinds(heard))
            lossy[0] = False
            line.send(m.Shutdown(0.0))
            tokens = next(event.token_ids for event in line.heard if isinstance(event, m.TokenIds))
            counts = next(event.values["ipc"] for event in line.heard if isinstance(event, m.Account))
            answers = [event.request for event in line.heard if isinstance(event, m.Length)]
            assert answers == list(range(2, 40))
            return tokens, counts

    tokens, counts = asyncio.run(scenario())
    assert tokens == list(range(2, 40))
    assert counts["gaps"] > 0
    assert counts["malformed"] == counts["unauthentic"] == 0


def test_commands_before_the_engine_is_ready_and_about_unknown_things(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> list[m.Event]:
        async with running(tmp_path) as (line, task):
            line.send(m.Ping(), m.Open(1, "", None))
            await line.until(lambda heard: m.Ready in kinds(heard))
            line.send(m.Stop(77), m.Close(ContextId(77)), m.Append(2, ContextId(77), (1,)))
            await line.until(lambda heard: len([e for e in heard if isinstance(e, m.Failed)]) == 2)
            line.send(m.Shutdown(0.0))
            assert await asyncio.wait_for(task, 30) == 0
            return line.heard

    heard = asyncio.run(scenario())
    early, unknown = (m.revive(event.error) for event in heard if isinstance(event, m.Failed))
    assert isinstance(early, EngineStopped)
    assert "not ready" in str(early)
    assert isinstance(unknown, ContextClosed)


class BrokenExecutor(Exception):
    pass


def broken_service(config: EngineConfig) -> EngineService:
    service = EngineService.start(config)

    def execute(*_: object) -> None:
        raise BrokenExecutor("the device is gone")

    service._engine.executor.execute = execute  # type: ignore[method-assign,assignment]
    return service


def test_an_engine_that_stops_by_itself_ends_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_start", lambda config: (broken_service(config), checkpoint_path()))

    async def scenario() -> tuple[list[m.Event], int]:
        async with running(tmp_path) as (line, task):
            line.send(m.Ping())
            await line.until(lambda heard: m.Ready in kinds(heard))
            for number in range(1, 9):
                line.send(m.Open(number, "", None))
            await line.until(lambda heard: len([e for e in heard if isinstance(e, m.Opened)]) == 8)
            contexts = [event.context for event in line.heard if isinstance(event, m.Opened)]
            for number, context in enumerate(contexts, start=10):
                line.send(m.Append(100 + number, context, (5, 6)), m.Prefill(number, context))
                await asyncio.sleep(0.02)
            await line.until(lambda heard: m.Fatal in kinds(heard))
            return line.heard, await asyncio.wait_for(task, 30)

    heard, code = asyncio.run(scenario())
    assert code == 1
    (fatal,) = (event for event in heard if isinstance(event, m.Fatal))
    assert "the device is gone" in fatal.error.message
    failed = {event.request for event in heard if isinstance(event, m.Failed)}
    assert {10, 11, 12} <= failed


def test_a_stopped_service_takes_no_commands() -> None:
    service = broken_service(CONFIG)

    async def scenario() -> None:
        while service.ready:
            with pytest.raises((ContextClosed, EngineStopped), match="the device is gone"):
                handle = await service.open()
                await handle.append([5, 6])
                await handle.prefill()
        with pytest.raises(EngineStopped, match="the device is gone"):
            await service.open()
        with pytest.raises(EngineStopped, match="the device is gone"):
            await service.read_stats()

    asyncio.run(scenario())
    service.close()
