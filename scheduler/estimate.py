"""How much longer will this pause last? Elapsed time, hints, and what earlier calls of the tool took."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from typing import Protocol

from caesura.scheduler.context import Call, Pause

PRIOR_S = 0.5  # nothing known of a tool: between a shell command and a search
KEPT_CALLS = 256
MIN_CALLS = 3


class Estimator(Protocol):
    """Expected remaining seconds of a pause."""

    def observe(self, tool: str, duration_s: float) -> None:
        """A call of ``tool`` took this long."""

    def remaining_s(self, pause: Pause, now: float) -> float:
        """Expected seconds until the pause ends."""


class Elapsed:
    """T_int = now - call time (InferCept, section 4.3): what has lasted long will last as long again."""

    def observe(self, tool: str, duration_s: float) -> None:
        """Learns nothing."""

    def remaining_s(self, pause: Pause, now: float) -> float:
        return max(0.0, now - pause.since)


class Conditional:
    """E[remaining | elapsed] from each tool's own durations; the hint, then a prior, until there are enough.

    Past everything ever seen, the pause is expected to last as long again as it has lasted. A pause on several
    calls ends at the longest of them, or at the shortest for ``wait_any``. A deadline bounds all.
    """

    def __init__(self, prior_s: float = PRIOR_S) -> None:
        self._prior_s = prior_s
        self._sorted: dict[str, list[float]] = {}
        self._recent: dict[str, deque[float]] = {}

    def observe(self, tool: str, duration_s: float) -> None:
        recent = self._recent.setdefault(tool, deque())
        ordered = self._sorted.setdefault(tool, [])
        recent.append(duration_s)
        insort(ordered, duration_s)
        if len(recent) > KEPT_CALLS:
            del ordered[bisect_right(ordered, recent.popleft()) - 1]

    def remaining_s(self, pause: Pause, now: float) -> float:
        elapsed = max(0.0, now - pause.since)
        calls = pause.calls or (Call(""),)
        expected = [self._call_s(call, elapsed) for call in calls]
        remaining = min(expected) if pause.wait_any else max(expected)
        if pause.deadline_at is not None:
            remaining = min(remaining, max(0.0, pause.deadline_at - now))
        return remaining

    def _call_s(self, call: Call, elapsed: float) -> float:
        seen = self._sorted.get(call.tool, [])
        if len(seen) >= MIN_CALLS:
            longer = seen[bisect_right(seen, elapsed) :]
            return sum(longer) / len(longer) - elapsed if longer else elapsed
        known = call.expected_s if call.expected_s is not None else (sum(seen) / len(seen) if seen else self._prior_s)
        return known - elapsed if known > elapsed else elapsed
