"""The contexts a request holds: opened for it, closed with it, stopped by an abort. Nothing outlives its request
unless it is handed on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Self, TypeVar, cast

from caesura.runtime.api import Handle, Service
from caesura.runtime.errors import ContextClosed, DeadlineExceeded, EngineStopped
from caesura.runtime.generation import TokenChunk, ToolCalling
from caesura.runtime.sampling import SamplingParams
from caesura.runtime.server.errors import ApiError
from caesura.runtime.server.http import settled
from caesura.runtime.server.tally import RequestTally

T = TypeVar("T")
_CUT_OFF = (ContextClosed, DeadlineExceeded, EngineStopped)  # how a generation ends that was going on


class Aborted(ApiError):
    """Somebody asked for this request to end."""

    def __init__(self) -> None:
        super().__init__(499, "the request was aborted", code="aborted")


class Work:
    """One request at work. An async context manager; on leaving it, its contexts are closed."""

    def __init__(
        self,
        service: Service,
        board: WorkBoard,
        key_id: str,
        request_id: str,
        namespace: str,
        tally: RequestTally | None = None,
    ) -> None:
        self.service = service
        self.namespace = namespace
        self.request_id = request_id
        self._ended_by: ApiError | None = None  # what somebody else ended it with, an abort or another
        self._interruptible: set[asyncio.Task[Any]] = set()  # that wait for contexts which outlive the request
        self._board = board
        self._place = (key_id, request_id)
        self._parts: list[Work] = []
        self._handles: list[Handle] = []
        self._tally = tally or RequestTally()
        self._prompts: dict[Handle, int] = {}  # forks have their parent's prompt

    async def __aenter__(self) -> Self:
        self._board.enter(self._by_place)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._board.leave(self._by_place)
        await settled(self._close_all())

    def divide(self, request_ids: Sequence[str]) -> None:
        """From its beginning the request is as many parts, each of which can be aborted alone, by its id."""
        for name in request_ids:
            part = Work(self.service, self._board, self._place[0], name, self.namespace, self._tally)
            part._prompts = self._prompts
            self._parts.append(part)

    def part(self, number: int) -> Work:
        """What prompt ``number`` is done by: all of the request, unless it was divided."""
        return self._parts[number] if self._parts else self

    @property
    def _by_place(self) -> dict[tuple[str, str], Work]:
        return {part._place: part for part in self._parts or [self]}

    async def open(self, deadline_s: float | None = None) -> Handle:
        """A context of this request."""
        self._check()
        handle = await _even_if_cancelled(self.service.open(self.namespace, deadline_s), _close_one)
        return (await self._unless_late([handle]))[0]

    async def fork(self, parent: Handle, count: int) -> list[Handle]:
        """Copies of a context, which belong to this request as well."""
        forks = await _even_if_cancelled(parent.fork(count), _close_many)
        self._prompts.update(dict.fromkeys(forks, self._prompt(parent)))
        return await self._unless_late(forks)

    async def _unless_late(self, handles: Sequence[Handle]) -> list[Handle]:
        """Take over what was made, unless an abort came meanwhile."""
        if self._ended_by is not None:
            with contextlib.suppress(Exception):  # an engine that died has closed them
                await _close_many(handles)
        self._check()
        return [self.adopt(handle) for handle in handles]

    @property
    def aborted(self) -> bool:
        """Whether somebody asked for it to end."""
        return isinstance(self._ended_by, Aborted)

    def _check(self) -> None:
        if self._ended_by is not None:
            raise self._ended_by

    def was_aborted(self, error: Exception) -> bool:
        """Whether this is how an abort shows, which closes the request's contexts under whatever uses them."""
        return isinstance(error, Aborted) or (self.aborted and isinstance(error, ContextClosed))

    def adopt(self, handle: Handle) -> Handle:
        """From now on the context ends with this request."""
        self._handles.append(handle)
        return handle

    def hand_on(self, handle: Handle) -> None:
        """Somebody else keeps the context from now on."""
        self._handles.remove(handle)

    async def generate(
        self, handle: Handle, params: SamplingParams, tools: ToolCalling | None = None
    ) -> AsyncGenerator[TokenChunk, None]:
        """The handle's chunks. Raises Aborted after an abort, and what else the request was ended with."""
        chunks = cast("AsyncGenerator[TokenChunk, None]", handle.generate(params, tools))
        if handle not in self._handles:  # a context that outlives the request is not closed by an abort
            chunks = self._until_aborted(chunks)
        counted = params.max_new_tokens == 0  # computing a prompt is no generation
        try:
            self._check()
            async with contextlib.aclosing(chunks):
                async for chunk in chunks:
                    self._tally.chunk(chunk)
                    if chunk.finish is not None:
                        self._tally.prompt(self._prompt(handle), chunk.finish)
                        if not counted:
                            self._tally.finish(chunk.finish.reason)
                        counted = True
                    yield chunk
        except (GeneratorExit, asyncio.CancelledError, ApiError, *_CUT_OFF) as error:
            if not counted:
                self._tally.finish("abort")
            if self._ended_by is not None and isinstance(error, ContextClosed):
                raise self._ended_by from None
            raise

    def _prompt(self, handle: Handle) -> int:
        return self._prompts.setdefault(handle, len(self._prompts))

    async def unless_aborted(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do work on a context that outlives the request. An abort cancels it and raises Aborted."""
        task = asyncio.current_task()
        assert task is not None
        self._check()
        self._interruptible.add(task)
        try:
            return await work()
        except asyncio.CancelledError:
            if self._ended_by is not None and task.uncancel() == 0:  # nobody else has cancelled it as well
                raise self._ended_by from None
            raise
        finally:
            self._interruptible.discard(task)

    async def _until_aborted(self, chunks: AsyncGenerator[TokenChunk, None]) -> AsyncGenerator[TokenChunk, None]:
        async with contextlib.aclosing(chunks):
            while (chunk := await self.unless_aborted(lambda: anext(chunks, None))) is not None:
                yield chunk

    async def abort(self, told: ApiError | None = None) -> None:
        """End what the request does, in whatever state it is. Its client is ``told``, or else that it was aborted."""
        if self._ended_by is not None:
            return
        self._ended_by = told or Aborted()
        for task in self._interruptible:
            task.cancel()
        for handle in self._handles:
            await handle.close()

    async def _close_all(self) -> None:
        for part in self._by_place.values():
            handles, part._handles = part._handles, []
            for handle in handles:
                with contextlib.suppress(Exception):  # an engine that died has closed them
                    await handle.close()


class WorkBoard:
    """Requests at work, by key and request id. Bounds how many there are."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._at_work: dict[tuple[str, str], Work] = {}
        self._num_requests = 0  # one that is divided has several ids

    def __len__(self) -> int:
        return self._num_requests

    def enter(self, parts: Mapping[tuple[str, str], Work]) -> None:
        """One request. Raises ApiError 429 when there are too many, 400 for an id in use."""
        if self._num_requests >= self._max_requests:
            raise ApiError(429, "The request queue is full.", code="queue_full", retry_after_s=1)
        for place in parts:
            if place in self._at_work:
                raise ApiError(400, f"Duplicate request ID {place[1]!r}: a request of this id is still at work")
        self._at_work.update(parts)
        self._num_requests += 1

    def leave(self, parts: Mapping[tuple[str, str], Work]) -> None:
        """What was entered has ended."""
        for place in parts:
            del self._at_work[place]
        self._num_requests -= 1

    async def abort_everything(self, told: ApiError | None = None) -> int:
        """Abort all keys' requests, see `Work.abort`. Returns how many."""
        found = list(self._at_work.values())
        for work in found:
            await work.abort(told)
        return len(found)

    async def abort(self, key_id: str, request_id: str | None) -> int:
        """Abort one key's request, or all of them. Returns how many."""
        found = [
            work
            for (owner, name), work in list(self._at_work.items())
            if owner == key_id and request_id in (None, name)
        ]
        for work in found:
            await work.abort()
        return len(found)


async def merged(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Items of several generators as they come. The first failure ends all."""
    if len(sources) == 1:
        async with contextlib.aclosing(sources[0]) as only:
            async for item in only:
                yield item
        return
    queue: asyncio.Queue[T | None | Exception] = asyncio.Queue()

    async def run(source: AsyncGenerator[T, None]) -> None:
        try:
            async with contextlib.aclosing(source):
                async for item in source:
                    queue.put_nowait(item)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.ensure_future(run(source)) for source in sources]
    try:
        left = len(tasks)
        while left:
            found = await queue.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                left -= 1
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()
        await settled(asyncio.gather(*tasks, return_exceptions=True))


async def _even_if_cancelled(work: Coroutine[Any, Any, T], undo: Any) -> T:
    """Await ``work``; when the caller is cancelled meanwhile, undo it once it is done. The engine does it anyway."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(lambda done: _undo(done, undo))
        raise


def _undo(done: asyncio.Future[Any], undo: Any) -> None:
    if not done.cancelled() and done.exception() is None:
        _background.add(task := asyncio.ensure_future(undo(done.result())))
        task.add_done_callback(_background.discard)


_background: set[asyncio.Future[Any]] = set()  # asyncio keeps only weak references to running tasks


async def _close_one(handle: Handle) -> None:
    await handle.close()


async def _close_many(handles: Sequence[Handle]) -> None:
    for handle in handles:
        await handle.close()
