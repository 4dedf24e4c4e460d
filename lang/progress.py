"""How far a running tool is, in its own words: whoever knows that it will take long may have the memory meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar

EVERY_S = 0.5  # at most this often a call's word is passed on; the latest counts
AT_ONCE_S = 0.01  # a tool that began so soon after the pause began with it


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


def work_begins() -> None:
    """The call got what it waited for, a thread: only now it can get on."""
    reporter = _reporter.get()
    if reporter is not None:
        reporter.begun = time.monotonic()


class _Reporter:
    """Passes the latest word of one attempt on, one at a time. What becomes of it is not the tool's concern."""

    def __init__(self, send: Callable[[float], Awaitable[None]], paused_since: float) -> None:
        self.begun = time.monotonic()
        self._paused_since = paused_since
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._latest: float | None = None
        self._awake = False
        self._closed = False
        self._sending: asyncio.Task[None] | None = None

    def tell(self, fraction: float) -> None:
        """On any thread. Costs nothing while an earlier word is still under way."""
        self._latest = self._of_pause(fraction)
        if not self._awake and not self._closed:
            self._awake = True
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
                self._loop.call_soon_threadsafe(self._wake)

    def _of_pause(self, fraction: float) -> float:
        """The share of the whole pause that leaves the same time: some of it went to other attempts, or to waiting."""
        before_s = self.begun - self._paused_since
        if not fraction or before_s < AT_ONCE_S:
            return fraction
        own_s = time.monotonic() - self.begun
        return (before_s + own_s) / (before_s + own_s / fraction)

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

    def close(self) -> None:
        """Nothing is begun any more, and what is under way is given up: a result does not wait for advice."""
        self._closed = True
        if self._sending is not None:
            self._sending.cancel()


_reporter: ContextVar[_Reporter | None] = ContextVar("caesura_reporter", default=None)


@contextlib.contextmanager
def reporting(send: Callable[[float], Awaitable[None]], paused_since: float) -> Iterator[None]:
    """While the block runs, what its tool reports goes to ``send``. ``paused_since`` is by ``time.monotonic``."""
    reporter = _Reporter(send, paused_since)
    before = _reporter.set(reporter)
    try:
        yield
    finally:
        reporter.close()
        _reporter.reset(before)
