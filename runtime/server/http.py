"""Answers: JSON, and streams of server-sent events that end when the client is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Coroutine
from typing import Any, TypeVar

import msgspec
from caesura.runtime.server.errors import ApiError
from caesura.runtime.server.guard import PRINCIPAL, refuse
from caesura.runtime.server.keys import ANYONE, Principal
from caesura.runtime.server.limits import decode
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
START_WAIT_S = 1.0  # how long an error may still become a status instead of an event
CLIENT_CLOSED = 499
DONE = b"data: [DONE]\n\n"


def reply(value: Any, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def event(value: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + msgspec.json.encode(value) + b"\n\n"


async def read(request: Request, kind: type[T]) -> T:
    """The request's body as ``kind``."""
    return decode(await request.body(), kind)


def principal_of(request: Request) -> Principal:
    """Who asks."""
    found = request.scope.get(PRINCIPAL, ANYONE)
    assert isinstance(found, Principal)
    return found


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do ``work``, whose body has been read. A client that leaves cancels it."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    both: set[asyncio.Future[Any]] = {task, gone}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(CLIENT_CLOSED, "the client closed the connection")
        return task.result()
    finally:
        await _cancel(task, gone)


async def stream(
    request: Request, events: AsyncGenerator[bytes, None], *, send_deadline_s: float, named: bool = False
) -> Response:
    """``events`` as a streaming answer. What fails before the first event, and soon, is an ordinary error."""
    gone = asyncio.ensure_future(_disconnected(request.receive))
    first: asyncio.Future[bytes | None] = asyncio.ensure_future(_next(events))
    both: set[asyncio.Future[Any]] = {first, gone}
    try:
        await asyncio.wait(both, timeout=START_WAIT_S, return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            raise ApiError(CLIENT_CLOSED, "the client closed the connection")
        if first.done():
            first.result()
    except BaseException:
        await _cancel(first, gone)
        await events.aclose()
        raise
    return _EventStream(first, events, gone, send_deadline_s, named)


class _SlowClient(ApiError):
    """The client does not read its answer."""

    def __init__(self, deadline_s: float) -> None:
        super().__init__(CLIENT_CLOSED, f"the client took nothing for {deadline_s:g} s")


class _EventStream(Response):
    """Sends events until they end or the client is gone, then closes their generator."""

    media_type = "text/event-stream"

    def __init__(
        self,
        first: asyncio.Future[bytes | None],
        events: AsyncGenerator[bytes, None],
        gone: asyncio.Future[None],
        send_deadline_s: float,
        named: bool,
    ) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no", "content-type": "text/event-stream"}
        super().__init__(None, 200, headers)
        del self.headers["content-length"]
        self._first = first
        self._events = events
        self._gone = gone
        self._send_deadline_s = send_deadline_s
        self._named = named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._send_all(scope, send))
        both: set[asyncio.Future[Any]] = {work, self._gone}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            await _cancel(work, self._first, self._gone)
            await self._events.aclose()

    async def _send_all(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            data = await self._first
            while data is not None:
                await self._send(send, data)
                data = await _next(self._events)
        except _SlowClient:
            raise
        except Exception as error:
            data = event(refuse(scope, error).body(), "error" if self._named else None)
            await self._send(send, data)
        await self._send(send, b"", more=False)

    async def _send(self, send: Send, data: bytes, *, more: bool = True) -> None:
        """A client that does not read is cut off after a while: its answer must not pile up here."""
        try:
            async with asyncio.timeout(self._send_deadline_s):
                await send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError:
            raise _SlowClient(self._send_deadline_s) from None


async def _next(events: AsyncGenerator[bytes, None]) -> bytes | None:
    return await anext(events, None)


async def _disconnected(receive: Receive) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancel and wait, so that nothing of the request outlives it."""
    for task in tasks:
        task.cancel()
    await settled(asyncio.gather(*tasks, return_exceptions=True))


async def settled(work: Awaitable[Any]) -> None:
    """Wait for clean-up work; a second cancellation does not interrupt it."""
    future = asyncio.ensure_future(work)
    while not future.done():
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError:
            continue
        except Exception:
            break
