"""Program bodies as greenlets: a blocking read inside one gives the event loop back instead of a thread.

A fiber runs on the loop's thread, driven by an asyncio task. When its code waits for an awaitable, the fiber hands
the awaitable to its driver and is switched back in with the result. The same works for ``async def`` bodies, whose
coroutine is stepped inside the fiber, so that they may use both ``await`` and blocking reads.
"""

from __future__ import annotations

import contextvars
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet

T = TypeVar("T")
log = logging.getLogger("caesura.lang")

SLOW_STEP_S = 1.0  # a body that computes this long without waiting has stalled every other program


class Fiber(greenlet):  # type: ignore[misc]
    """A greenlet whose switches to its parent carry awaitables."""

    driving = 0  # coroutines that run inside it, one in another: code that may await

    def wait(self, awaitable: Awaitable[T]) -> T:
        """Called inside the fiber: suspend it until ``awaitable`` is done."""
        result: T = self.parent.switch(awaitable)
        return result


def current_fiber() -> Fiber | None:
    """The fiber this code runs in, None outside of fibers."""
    here = getcurrent()
    return here if isinstance(here, Fiber) else None


async def run_in_fiber(body: Callable[[], T], label: str = "program") -> T:
    """Run ``body`` in a fiber of its own and return its result. Cancelling raises at the place it waits at."""
    fiber = Fiber(body)
    fiber.gr_context = contextvars.copy_context()
    wanted: Any = _switch(fiber, label, None)
    while not fiber.dead:
        try:
            value = await wanted
        except BaseException as error:
            wanted = _switch(fiber, label, error, throw=True)
        else:
            wanted = _switch(fiber, label, value)
    result: T = wanted
    return result


def _switch(fiber: Fiber, label: str, value: Any, *, throw: bool = False) -> Any:
    started = time.monotonic()
    try:
        if throw:
            return fiber.throw(value)
        return fiber.switch(value) if fiber else fiber.switch()  # the first switch carries no value
    finally:
        took_s = time.monotonic() - started
        if took_s > SLOW_STEP_S:
            log.warning(
                "%s computed for %.1f s without waiting; every other program stood still meanwhile. "
                "Put blocking work into a @tool: sync tools run in threads.",
                label,
                took_s,
            )


class _Yielded:
    """Passes one object that a coroutine yielded on to the loop."""

    def __init__(self, item: Any) -> None:
        self._item = item

    def __await__(self) -> Generator[Any, Any, Any]:
        return (yield self._item)


def drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """Called inside a fiber: run a coroutine to its end, step by step, within this fiber."""
    fiber = current_fiber()
    assert fiber is not None
    value: Any = None
    error: BaseException | None = None
    fiber.driving += 1
    try:
        while True:
            try:
                item = coroutine.send(value) if error is None else coroutine.throw(error)
            except StopIteration as stop:
                result: T = stop.value
                return result
            value, error = None, None
            try:
                value = fiber.wait(_Yielded(item))
            except BaseException as raised:
                error = raised
    finally:
        coroutine.close()
        fiber.driving -= 1


def finished(result: Any) -> Any:
    """What an async function called from a sync body has made: its result; an async caller awaits it himself."""
    fiber = current_fiber()
    if inspect.iscoroutine(result) and fiber is not None and not fiber.driving:
        return drive(result)
    return result
