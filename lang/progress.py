"""How far a running tool is, in its own words: whoever knows that it will take long may have the memory meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar

EVERY_S = 0.5  # at most this often a call's word is passed on; the latest counts
LAST_WORD_S = 1.0  # how long a call that has ended waits for the one that is under way


def report_progress(fraction: float) -> None:
    """Say, inside a tool, how much of its work is done: 0 to 1, as often as it likes.

    The scheduler takes it as advice about how long the pause will still last; results never change. Outside of a call
    by a program nothing happens, so that a tool can be called by hand. Raises ValueError out of range.
    """
    progress_reporter()(fraction)


def progress_reporter() -> Callable[[float], None]:
    """``report_progress`` of the call in which this is asked, to be called from anywhere: threads that a tool starts,
    and callbacks that run in tasks of others, know nothing of the call."""
    reporter = _reporter.get()

    def report(fraction: float) -> None:
        share = float(fraction)  # also of a Decimal or an array's element
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"fraction is {fraction!r}; it must lie between 0 and 1")
        if reporter is not None:
            reporter.tell(share)

    return report


class _Reporter:
    """Passes the latest word of one call on, one at a time. What the backend makes of it is not the tool's concern."""

    def __init__(self, send: Callable[[float], Awaitable[None]]) -> None:
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._latest: float | None = None
        self._awake = False
        self._closed = False
        self._sending: asyncio.Task[None] | None = None

    def tell(self, fraction: float) -> None:
        """On any thread. Costs nothing while an earlier word is still under way."""
        self._latest = fraction
        if not self._awake and not self._closed:
            self._awake = True
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        if self._closed:
            return
        if self._sending is None or self._sending.done():
            fraction, self._latest = self._latest, None
            if fraction is None:
                self._awake = False
                return
            self._sending = self._loop.create_task(self._pass_on(fraction))
        self._loop.call_later(EVERY_S, self._wake)

    async def _pass_on(self, fraction: float) -> None:
        with contextlib.suppress(Exception):
            await self._send(fraction)

    async def close(self) -> None:
        """Nothing is sent any more when this returns: a late word would be taken for one about the next pause."""
        self._closed = True
        if self._sending is not None:
            await asyncio.wait((self._sending,), timeout=LAST_WORD_S)

    def drop(self) -> None:
        """End at once, also what is under way."""
        self._closed = True
        if self._sending is not None:
            self._sending.cancel()


_reporter: ContextVar[_Reporter | None] = ContextVar("caesura_reporter", default=None)


@contextlib.asynccontextmanager
async def reporting(send: Callable[[float], Awaitable[None]] | None) -> AsyncIterator[None]:
    """While the block runs, what its tool reports goes to ``send``; None: nowhere."""
    if send is None:
        yield
        return
    reporter = _Reporter(send)
    before = _reporter.set(reporter)
    try:
        yield
        await reporter.close()
    finally:
        reporter.drop()
        _reporter.reset(before)
