"""The engine process: ``python -m caesura.runtime.ipc.process``, started by the client and by nobody else.

Its assignment comes as JSON on standard input. The event loop of the main thread talks to the client; the engine runs
on its own thread. It ends when told to, when the engine stops, and when its client dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import zmq
from caesura.runtime.config import EMBEDDED, EngineConfig
from caesura.runtime.errors import CaesuraError, EngineStopped
from caesura.runtime.ipc import messages as m
from caesura.runtime.ipc.channel import TAG_BYTES, Channel, LinkBroken
from caesura.runtime.logs import LogStyle, configure

if TYPE_CHECKING:
    from caesura.runtime.ipc.worker import Worker
    from caesura.runtime.service import EngineService

SOCKET_NAME = "engine.sock"
TO_ENGINE = "to-engine"
TO_CLIENT = "to-client"
FRAMES_AT_ONCE = 256
LINGER_MS = 2000
CLOSE_S = 30.0
_PR_SET_PDEATHSIG = 1


class Assignment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the client writes to the process's standard input."""

    folder: str
    key: bytes
    config: EngineConfig
    heartbeat_s: float
    client_pid: int
    lifeline_fd: int
    log: LogStyle = LogStyle()


class EngineProcess:
    """The socket, the heartbeat and the life of one engine."""

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, m.MAX_FRAME_BYTES + TAG_BYTES)
        self._socket.bind(f"ipc://{assignment.folder}/{SOCKET_NAME}")
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._channel: Channel[m.Command] = Channel(
            assignment.key, sends=TO_CLIENT, receives=TO_ENGINE, inbound=m.Command
        )
        self._client: bytes | None = None  # the sender of the first authentic frame
        self._num_foreign = 0
        self._outbox: list[bytes] = []
        self._flushing = False
        self._loop = asyncio.get_running_loop()
        self._ending: asyncio.Future[float] = self._loop.create_future()  # drain_s
        self._service: EngineService | None = None
        self._worker: Worker | None = None
        self._probed_at: float | None = None

    async def run(self) -> int:
        """Until told to end; returns the exit code."""
        self._loop.add_reader(self._fd, self._readable)
        beat = self._loop.create_task(self._beat())
        code = 0
        try:
            await self._serve()
        except LinkBroken as error:
            print(f"caesura engine: {error}", file=sys.stderr)  # noqa: T201 - nobody else is left to tell
            code = 4
        except Exception as error:
            self._send(m.Fatal(m.describe(error)))
            code = 1
        beat.cancel()
        with contextlib.suppress(LinkBroken):
            self._flush()
        self._loop.remove_reader(self._fd)
        self._socket.close()
        self._context.term()
        return code

    async def _serve(self) -> None:
        building = asyncio.ensure_future(asyncio.to_thread(_start, self._assignment.config))
        waits: list[asyncio.Future[Any]] = [building, self._ending]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if not building.done():
            self._ending.result()
            return
        service, folder = building.result()
        from caesura.runtime.ipc.worker import Worker

        self._service, self._worker = service, Worker(service, self._send)
        self._send(m.Ready(str(folder), os.getpid()))
        try:
            await self._worker.drain(await self._ending)
        finally:
            with contextlib.suppress(TimeoutError):  # a member or a disk that hangs goes with the process
                await asyncio.wait_for(asyncio.to_thread(service.close), CLOSE_S)
            await self._worker.drain(1.0)  # every request hears why it ended

    async def _beat(self) -> None:
        """Until cancelled: an engine that drains is alive."""
        while True:
            if self._service is not None and not self._service.ready:
                self._end(self._service.stopped())
            self._send(m.Heartbeat(self._engine_lag_s()))
            if self._client is not None:
                self._transmit([self._channel.note()])
            await asyncio.sleep(self._assignment.heartbeat_s)

    def _engine_lag_s(self) -> float:
        """How long the engine thread has left a command unread."""
        if self._service is None or not self._service.ready:  # one that is closed reads no more
            return 0.0
        if self._probed_at is not None:
            return time.monotonic() - self._probed_at
        self._probed_at = time.monotonic()
        self._service.post(lambda _: setattr(self, "_probed_at", None))
        return 0.0

    def _end(self, reason: float | Exception) -> None:
        if self._ending.done():
            return
        if isinstance(reason, Exception):
            self._ending.set_exception(reason)
        else:
            self._ending.set_result(reason)

    # -- the socket -------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        """ZeroMQ's descriptor signals edges only: take all there is, in portions that let others run."""
        if self._socket.closed:
            return
        for _ in range(FRAMES_AT_ONCE):
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._take(parts)
            except LinkBroken as error:
                self._end(error)
                return
        self._loop.call_soon(self._readable)

    def _take(self, parts: list[bytes]) -> None:
        if len(parts) != 2 or (self._client is not None and parts[0] != self._client):
            self._num_foreign += 1
            return
        received = self._channel.take(parts[1])
        if not received.authentic:
            return
        if self._client is None:
            self._client = parts[0]
            self._schedule_flush()
        self._transmit(received.replies)
        for command in received.messages:
            self._handle(command)

    def _handle(self, command: m.Command) -> None:
        match command:
            case m.Ping():
                self._send(m.Heartbeat(self._engine_lag_s()))
            case m.Shutdown():
                self._end(command.drain_s)
            case m.Stop():
                if self._worker is not None:
                    self._worker.stop(command.request)
            case m.Report():
                if self._worker is not None:
                    self._worker.report(command.context, command.fraction, command.call)
            case m.Close():
                if self._worker is not None:
                    self._worker.close(command.context)
            case _:
                if self._worker is None:
                    self._send(m.Failed(command.request, m.describe(EngineStopped("the engine is not ready yet"))))
                else:
                    self._worker.request(command)

    def _send(self, event: m.Event) -> None:
        if isinstance(event, m.Account):
            event = m.Account(event.request, {**event.values, "ipc": self._counts()})
        try:
            data = m.encode(event)
        except CaesuraError as error:
            if not isinstance(event, m.Answer):
                raise
            data = m.encode(m.Failed(event.request, m.describe(error)))
        self._outbox.append(data)
        self._schedule_flush()

    def _counts(self) -> dict[str, int]:
        return {**dataclasses.asdict(self._channel.counts), "foreign": self._num_foreign}

    def _schedule_flush(self) -> None:
        """What is sent within one turn of the loop goes out in one frame."""
        if not self._flushing and self._client is not None:
            self._flushing = True
            self._loop.call_soon(self._flush_or_end)

    def _flush_or_end(self) -> None:
        try:
            self._flush()
        except LinkBroken as error:
            self._end(error)

    def _flush(self) -> None:
        self._flushing = False
        if self._client is None or self._socket.closed:  # what is said after the end has no listener
            return
        outbox, self._outbox = self._outbox, []
        self._transmit(self._channel.pack(outbox))

    def _transmit(self, frames: Iterable[bytes]) -> None:
        assert self._client is not None
        sent = False
        for frame in frames:
            self._socket.send_multipart([self._client, frame], zmq.NOBLOCK)
            sent = True
        if sent and int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:  # sending may have eaten the edge
            self._loop.call_soon(self._readable)


def _start(config: EngineConfig) -> tuple[EngineService, Path]:
    """Build the engine; also where its tokenizer lies. Here torch is imported, so it runs off the event loop."""
    from caesura.runtime.service import EngineService

    if config.model == EMBEDDED:
        from caesura.runtime.embedded import checkpoint_path

        return EngineService.start(config), checkpoint_path()
    from caesura.runtime.model.weights import resolve_source

    source = resolve_source(config.model, config.revision)
    return EngineService.start(dataclasses.replace(config, model=str(source))), source


# -- not to outlive the client --------------------------------------------------------------------------------


def _guard(assignment: Assignment) -> None:
    """End with the client, also when it was killed; ignore signals meant for it (Ctrl-C, a service manager's stop)."""

    def on_signal(*_: object) -> None:
        if os.getppid() != assignment.client_pid:
            _abandon(assignment)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, on_signal)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    lifeline = socket.socket(fileno=assignment.lifeline_fd)
    lifeline.set_inheritable(False)

    def watch() -> None:
        with contextlib.suppress(OSError):
            while lifeline.recv(1):
                pass
        _abandon(assignment)

    threading.Thread(target=watch, name="caesura-lifeline", daemon=True).start()


def _abandon(assignment: Assignment) -> None:
    shutil.rmtree(assignment.folder, ignore_errors=True)
    os._exit(3)


async def _main(assignment: Assignment) -> int:
    return await EngineProcess(assignment).run()


def main() -> None:
    """Read the assignment and serve. Leaves without Python's shutdown, which waits for threads in native code."""
    assignment = msgspec.json.decode(sys.stdin.buffer.read(), type=Assignment)
    configure(assignment.log)
    _guard(assignment)
    with asyncio.Runner() as runner:
        code = runner.run(_main(assignment))
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
