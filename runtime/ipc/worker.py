"""The engine process's side of the conversation: commands in, calls on the service, events out. No sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from caesura.runtime.errors import ContextClosed, EngineStopped, InvalidRequest
from caesura.runtime.handle import ContextHandle
from caesura.runtime.ipc import messages as m
from caesura.runtime.service import EngineService
from caesura.scheduler.types import ContextId

MAX_FORKS = 4096
_Request = (
    m.Open
    | m.Append
    | m.Generate
    | m.Score
    | m.Prefill
    | m.Fork
    | m.Truncate
    | m.Pause
    | m.Resume
    | m.Tokens
    | m.Decisions
    | m.FlushCache
    | m.Hold
    | m.GoOn
    | m.Stats
    | m.Look
)


class Worker:
    """Runs every request as a task of the event loop it was made on. ``send`` is called on that loop."""

    def __init__(self, service: EngineService, send: Callable[[m.Event], None]) -> None:
        self._service = service
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._handles: dict[ContextId, ContextHandle] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self.draining = False

    def request(self, command: _Request) -> None:
        """Begin a request; its answer is sent when it is done."""
        if command.request in self._tasks:
            self._fail(command.request, InvalidRequest(f"request {command.request} is already running"))
            return
        task = self._loop.create_task(self._answer(command))
        self._tasks[command.request] = task
        task.add_done_callback(partial(self._done, command.request))

    def _done(self, request: int, task: asyncio.Task[None]) -> None:
        self._tasks.pop(request, None)
        if task.cancelled():  # before it had begun, else it has told so itself
            self._fail(request, ContextClosed("the request was aborted"))

    def stop(self, request: int) -> None:
        """Abort a request, if it still runs."""
        task = self._tasks.get(request)
        if task is not None:
            task.cancel()

    def report(self, context: ContextId, fraction: float, call: int) -> None:
        """Pass on what a tool says of its progress."""
        handle = self._handles.get(context)
        if handle is not None:
            handle.report(fraction, call)

    def close(self, context: ContextId) -> None:
        """Close a context, whatever it does."""
        if self._handles.pop(context, None) is not None:
            self._service.post(lambda engine: engine.close(context))

    async def drain(self, timeout_s: float) -> None:
        """Take no new contexts; wait until nothing runs, ``timeout_s`` at most."""
        self.draining = True
        end = self._loop.time() + timeout_s
        while self._tasks and self._loop.time() < end:
            await asyncio.wait(list(self._tasks.values()), timeout=max(0.0, end - self._loop.time()))

    # -- requests ---------------------------------------------------------------------------------------------

    async def _answer(self, command: _Request) -> None:
        try:
            self._send(await self._run(command))
        except asyncio.CancelledError:
            self._fail(command.request, ContextClosed("the request was aborted"))
        except Exception as error:
            self._fail(command.request, error)

    def _fail(self, request: int, error: Exception) -> None:
        self._send(m.Failed(request, m.describe(error)))

    async def _run(self, command: _Request) -> m.Event:
        match command:
            case m.Open():
                return await self._open(command)
            case m.FlushCache():
                await self._service.flush_cache()
                return m.Done(command.request)
            case m.Hold():
                await self._service.hold(retract=command.retract)
                return m.Done(command.request)
            case m.GoOn():
                await self._service.go_on()
                return m.Done(command.request)
            case m.Stats():
                return m.Account(command.request, await self._service.read_stats())
            case m.Look():
                return m.Seen(command.request, await self._service.read_snapshot(command.since))
        handle = self._handles.get(command.context)
        if handle is None:
            raise ContextClosed(f"context {command.context} is closed")
        match command:
            case m.Generate():
                return await self._generate(command, handle)
            case m.Append():
                return m.Length(command.request, await handle.append(command.token_ids))
            case m.Prefill():
                return m.Length(command.request, await handle.prefill())
            case m.Score():
                if command.top:
                    return m.ScoredTokens(command.request, await handle.score_top(command.start, command.top))
                return m.Scores(command.request, await handle.score(command.start))
            case m.Fork():
                return await self._fork(command, handle)
            case m.Tokens():
                return m.TokenIds(command.request, await handle.token_ids())
            case m.Decisions():
                return m.Decided(command.request, await handle.read_decisions())
            case m.Truncate():
                await handle.truncate(command.num_tokens)
            case m.Pause():
                await handle.pause(command.calls, command.wait, command.deadline_s)
            case m.Resume():
                await handle.resume(command.deadline_s)
        return m.Done(command.request)

    async def _open(self, command: m.Open) -> m.Event:
        if self.draining:
            raise EngineStopped("the engine is shutting down and takes no new contexts")
        handle = await self._service.open(command.namespace, command.deadline_s)
        self._keep(handle)
        return m.Opened(command.request, handle.id)

    async def _fork(self, command: m.Fork, handle: ContextHandle) -> m.Event:
        if not 0 <= command.count <= MAX_FORKS:
            raise InvalidRequest(f"count is {command.count}; it must lie between 0 and {MAX_FORKS}")
        children = await handle.fork(command.count)
        for child in children:
            self._keep(child)
        num_tokens = children[0].num_tokens if children else 0
        return m.Forked(command.request, tuple(child.id for child in children), num_tokens)

    async def _generate(self, command: m.Generate, handle: ContextHandle) -> m.Event:
        """Sends all chunks but the last, which is the answer."""
        async for chunk in handle.generate(command.params, command.tools):
            if chunk.finish is not None:
                return m.Chunk(command.request, chunk, handle.num_tokens)
            self._send(m.Chunk(command.request, chunk, None))
        raise EngineStopped("the generation ended without a last chunk")

    def _keep(self, handle: ContextHandle) -> None:
        self._handles[handle.id] = handle
        handle.on_closed = partial(self._closed, handle.id)

    def _closed(self, context: ContextId, reason: Exception) -> None:
        """On the engine thread. The handle stays until the client lets go, to tell late requests the reason."""
        self._loop.call_soon_threadsafe(self._send, m.Closed(context, m.describe(reason)))
