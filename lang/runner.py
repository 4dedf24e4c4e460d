"""The language's one event loop, in one daemon thread, and the three ways to wait for it.

Programs, drains and async tools are tasks of this loop. Code in a fiber waits by switching, code in other threads
by a concurrent future, and code of other event loops by awaiting.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import contextvars
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from caesura.lang.errors import BlockingCall, StateError
from caesura.lang.fibers import current_fiber

T = TypeVar("T")


class Runner:
    """Owns the loop and its thread. Use `runner()`; there is one per process."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.pid = os.getpid()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ended = False
        started = threading.Event()
        self._thread = threading.Thread(target=self._main, args=(started,), name="caesura-loop", daemon=True)
        self._thread.start()
        started.wait()

    def _main(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.call_soon(started.set)
        self.loop.run_forever()

    @property
    def on_loop(self) -> bool:
        """Whether the calling code runs on the loop's thread."""
        return threading.get_ident() == self._thread.ident

    def call(self, function: Callable[..., object], *args: Any) -> None:
        """Run ``function`` on the loop's thread: now when already there, else soon."""
        if self.on_loop:
            function(*args)
        else:
            self.loop.call_soon_threadsafe(function, *args)

    def spawn(self, work: Coroutine[Any, Any, T], context: contextvars.Context | None = None) -> asyncio.Task[T]:
        """Start a task that is kept alive until it ends. Loop thread only."""
        task = self.loop.create_task(work, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Block until ``work`` is done: the fiber when in one, else the thread.

        Raises BlockingCall on the loop's thread outside a fiber, where blocking would wait for itself.
        """
        if self.on_loop:
            fiber = current_fiber()
            if fiber is None:
                work.close()
                raise BlockingCall(
                    "a blocking read on the language's event loop, outside a program body (for example in an async "
                    "tool); use the awaitable form: await state.get_async(name), await state.wait_async()"
                )
            return fiber.wait(work)
        future = self._submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # the waiting was interrupted (Ctrl-C); what is waited for goes on
            raise

    async def wait_async(self, work: Coroutine[Any, Any, T]) -> T:
        """Await ``work`` from any event loop."""
        if self.on_loop:
            return await work
        return await asyncio.wrap_future(self._submit(work))

    def _submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        if self._ended:  # nobody would ever answer
            work.close()
            raise StateError("the process ends, and its programs have ended; read states and close tools before that")
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def stop(self) -> None:
        """End of the process: cancel what runs, so that contexts are given back, and stop the loop."""
        if self.pid != os.getpid() or not self._thread.is_alive() or self.on_loop:
            return

        self._ended = True

        async def finish() -> None:
            tasks = [task for task in self._tasks if not task.done()]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=1.0) if tasks else None
            self.loop.stop()

        with contextlib.suppress(RuntimeError):
            asyncio.run_coroutine_threadsafe(finish(), self.loop)
            self._thread.join(timeout=2.0)


_runner: Runner | None = None
_lock = threading.Lock()


def runner() -> Runner:
    """The process's runner, started at first use and again in a forked child."""
    global _runner
    if _runner is None or _runner.pid != os.getpid():
        with _lock:
            if _runner is None or _runner.pid != os.getpid():
                _runner = Runner()
    return _runner


# The first finalizer registers the call of all of them. What programs use, as an engine's threads, goes after them.
weakref.finalize(Runner, int).atexit = False


@atexit.register  # so early that what users register is called before it
def _stop() -> None:
    if _runner is not None:
        _runner.stop()
