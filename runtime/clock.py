"""Time is passed in, so that the simulator can own it."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds since some fixed moment."""

    def now(self) -> float: ...


class MonotonicClock:
    """Real time."""

    def now(self) -> float:
        return time.monotonic()


class VirtualClock:
    """Time that moves only when told to: for the simulator and for tests."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now = start_s

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Move forward by ``seconds`` >= 0."""
        self._now += max(0.0, seconds)

    def advance_to(self, moment: float) -> None:
        """Move forward to ``moment``; never back."""
        self._now = max(self._now, moment)
