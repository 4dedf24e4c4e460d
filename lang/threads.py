"""Threads for sync tools: at most 12, and up to 4 more in place of ones that a hung tool holds.

A tool that runs a program holds its thread while that program waits for tools of its own. Those have other threads, as
many again at each depth, so that nobody waits for one that waits for him.

Python cannot stop a thread. A tool that outlasts its timeout keeps its thread until it returns; the pool forgets
the job and starts a replacement, up to the bound. Past the bound each hung tool costs one thread, and when none is
left, calls fail at once instead of waiting for ever.
"""

from __future__ import annotations

import asyncio
import collections
import contextvars
import os
import threading
from collections.abc import Callable
from typing import Any

MAX_THREADS = 12
MAX_REPLACEMENTS = 4
IDLE_S = 10.0


class NoToolThread(RuntimeError):
    """Every thread is held by a hung tool."""


class Job:
    """One function call in a thread. ``started`` and ``done`` are futures of the loop it was submitted from."""

    def __init__(self, work: Callable[[], Any], loop: asyncio.AbstractEventLoop) -> None:
        self.work = work
        self.context = contextvars.copy_context()
        self.context.run(_depth.set, _depth.get() + 1)
        self.loop = loop
        self.started: asyncio.Future[None] = loop.create_future()
        self.done: asyncio.Future[Any] = loop.create_future()
        self.running = False
        self.abandoned = False

    def tell(self, future: asyncio.Future[Any], value: Any, error: BaseException | None = None) -> None:
        """Settle a future from another thread; an ended loop or an abandoned waiter is no problem."""

        def settle() -> None:
            if future.done():
                return
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)
                future.exception()  # read it, so that nobody warns when the waiter has gone

        try:
            self.loop.call_soon_threadsafe(settle)
        except RuntimeError:
            return


class ToolThreads:
    """A bounded pool of daemon threads that survives jobs that never end."""

    def __init__(self, max_threads: int = MAX_THREADS, max_replacements: int = MAX_REPLACEMENTS) -> None:
        self._max = max_threads
        self._max_replacements = max_replacements
        self._lock = threading.Condition()
        self._jobs: collections.deque[Job] = collections.deque()
        self._threads = 0  # alive, hung ones included
        self._idle = 0
        self._hung = 0

    @property
    def num_hung(self) -> int:
        """Threads that a timed-out tool still holds."""
        return self._hung

    def submit(self, work: Callable[[], Any], loop: asyncio.AbstractEventLoop) -> Job:
        """Queue ``work``. Raises NoToolThread when hung tools hold all threads."""
        job = Job(work, loop)
        with self._lock:
            if self._hung >= self._max + self._max_replacements:
                raise NoToolThread(
                    f"all {self._hung} tool threads are held by tools that outlasted their timeout; "
                    "give such tools an own timeout (sockets, subprocesses) or make them async"
                )
            self._jobs.append(job)
            if self._idle >= len(self._jobs):
                self._lock.notify()
            else:
                self._grow()
        return job

    def _grow(self) -> None:
        """Start a thread when there may be one more. Called with the lock held."""
        allowed = self._max + min(self._hung, self._max_replacements)
        if self._threads < allowed:
            self._threads += 1
            threading.Thread(target=self._work, name="caesura-tool", daemon=True).start()

    def abandon(self, job: Job) -> None:
        """Nobody waits for this job any more: drop it when queued, replace its thread when running."""
        with self._lock:
            if not job.running:
                job.abandoned = True
                if job in self._jobs:
                    self._jobs.remove(job)
                return
            if job.abandoned:
                return
            job.abandoned = True
            self._hung += 1
            if self._hung >= self._max + self._max_replacements:
                waiting, self._jobs = list(self._jobs), collections.deque()
                for other in waiting:
                    other.tell(other.done, None, NoToolThread(f"all {self._hung} tool threads are held by hung tools"))
            elif self._jobs:
                self._grow()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            job.tell(job.started, None)
            try:
                job.tell(job.done, job.context.run(job.work))
            except BaseException as error:  # a tool may even raise SystemExit; it must not end the thread
                job.tell(job.done, None, _settable(error))
            with self._lock:
                job.running = False
                if job.abandoned:
                    self._hung -= 1

    def _next(self) -> Job | None:
        with self._lock:
            while True:
                too_many = self._threads > self._max + min(self._hung, self._max_replacements)
                if self._jobs and not too_many:
                    job = self._jobs.popleft()
                    job.running = True
                    return job
                self._idle += 1
                notified = not too_many and self._lock.wait(IDLE_S)
                self._idle -= 1
                if not notified and not (self._jobs and not too_many):
                    self._threads -= 1
                    return None


def _settable(error: BaseException) -> BaseException:
    """A future cannot carry StopIteration."""
    if isinstance(error, (StopIteration, asyncio.CancelledError)):
        wrapped = RuntimeError(f"the tool raised {type(error).__name__}: {error}")
        wrapped.__cause__ = error
        return wrapped
    return error


_depth = contextvars.ContextVar("caesura_tool_depth", default=0)  # of tools that run programs that call tools
_pools: dict[tuple[int, int], ToolThreads] = {}  # by process, since a fork copies the pool but not its threads


def tool_threads() -> ToolThreads:
    """The process's pool for tools that are called from here."""
    which = os.getpid(), _depth.get()
    if which not in _pools:
        _pools.setdefault(which, ToolThreads())
    return _pools[which]
