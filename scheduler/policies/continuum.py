"""A time to live for each pause, chosen by cost and benefit (Continuum, arXiv 2511.02230)."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Sequence
from math import log

from caesura.scheduler.context import Context, Pause
from caesura.scheduler.estimate import PRIOR_S, Estimator, keep_latest
from caesura.scheduler.policies.base import Choice, PausedContext, PausePolicy, View
from caesura.scheduler.types import Action, ContextId, Phase

ENOUGH_RECORDS = 100
KEPT_RECORDS = 512
MIN_PROGRAMS = 5  # before their turns are correlated
DELAY_WEIGHT = 0.05


class Turns:
    """eta = -Corr(k, N - k) over all turns k of all programs of N turns: 1 for a fixed N, 0 for a memoryless one."""

    def __init__(self) -> None:
        self._programs = 0
        self._sums = [0.0] * 6  # of 1, x, y, xx, yy, xy with x = k and y = N - k

    def add(self, turns: int) -> None:
        """A program has ended after so many."""
        self._programs += 1
        for done in range(1, turns + 1):
            left = turns - done
            for index, term in enumerate((1, done, left, done * done, left * left, done * left)):
                self._sums[index] += term

    @property
    def eta(self) -> float:
        """Between 0 and 1; 1 until there are programs to judge by."""
        count, x, y, xx, yy, xy = self._sums
        if self._programs < MIN_PROGRAMS:
            return 1.0
        spread = (count * xx - x * x) * (count * yy - y * y)
        return max(0.0, min(1.0, -(count * xy - x * y) / spread**0.5)) if spread > 0 else 1.0


class Records:
    """Durations seen of one tool, and the time to live that they recommend."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, duration_s: float) -> None:
        self._recent.append(duration_s)
        insort(self._sorted, duration_s)
        if len(self._recent) > KEPT_RECORDS:
            del self._sorted[bisect_right(self._sorted, self._recent.popleft()) - 1]

    def time_to_live_s(self, benefit_s: float) -> float:
        """argmax over tau of P(tau) * benefit - tau, tau among the durations and 0."""
        count = len(self._sorted)
        best, best_gain = 0.0, 0.0
        for index, tau in enumerate(self._sorted):
            gain = (index + 1) / count * benefit_s - tau
            if gain > best_gain:
                best, best_gain = tau, gain
        return best


class Continuum(PausePolicy):
    """Keep for tau, then leave to the cache; serve programs first come, first served.

    ::

        tau* = argmax over tau of P(tau, tool) * (eta * T + reload) - tau

    P: empirical distribution of the tool's durations (of all tools below 100 records, exponential before that); T:
    mean queueing delay of what came back without its KV; reload: seconds to recompute, or to copy back from the host if
    that is less; eta: see :class:`Turns`. Order: preempted, then those back within their time, then arrival of the
    program. Deadlock: the program that arrived last gives way. What is left to the cache goes by LRU with a
    write-through host tier, as in ``lru_host``. The quadratic fit of the reload time is our cost profile; the paper's
    window of records and its weights of the mean delay were not known.
    """

    name = "continuum"
    uses_host = True
    writes_through = True
    review_every_s = 0.05

    def __init__(self, estimator: Estimator | None = None) -> None:
        super().__init__(estimator)
        self.turns = Turns()
        self.delay_s = 0.0  # running mean
        self._records: dict[str, Records] = {}
        self._everything = Records()
        self._ttl: dict[ContextId, float] = {}
        self._kept: set[ContextId] = set()  # came back in time
        self._served: set[ContextId] = set()  # since they last asked
        self._count: dict[ContextId, int] = {}  # turns until now
        self._pauses: dict[ContextId, Pause] = {}

    # -- learning ---------------------------------------------------------------------------------------------

    def saw_paused(self, context: Context, now: float) -> None:
        pause, before = context.pause, self._pauses.get(context.id)
        if before is not None and (before.since, before.tool) != (pause.since, pause.tool):
            self._end_pause(context.id, now)
        if pause.calls:
            self._pauses[context.id] = pause
        else:
            self._count[context.id] = self._count.get(context.id, 0) + 1

    def saw_queued(self, context: Context, now: float) -> None:
        self._served.discard(context.id)
        if self._end_pause(context.id, now):
            self._kept.add(context.id)

    def _end_pause(self, context: ContextId, now: float) -> bool:
        """Learn how long its pause took, if there was one; whether that was within its time to live."""
        pause, live_s = self._pauses.pop(context, None), self._ttl.pop(context, None)
        if pause is None:
            return False
        duration_s = now - pause.since
        records = self._records.get(pause.tool, Records())
        for each in (self._everything, records):
            each.add(duration_s)
        keep_latest(self._records, pause.tool, records)
        return live_s is not None and duration_s <= live_s

    def saw_running(self, context: Context, now: float) -> None:
        if context.id not in self._kept and context.id in self._count and context.id not in self._served:
            self.delay_s += DELAY_WEIGHT * (now - context.submitted - self.delay_s)
        self._kept.discard(context.id)
        self._served.add(context.id)

    def saw_closed(self, context: Context) -> None:
        self.turns.add(self._count.pop(context.id, 0))
        self._ttl.pop(context.id, None)
        self._pauses.pop(context.id, None)
        self._kept.discard(context.id)
        self._served.discard(context.id)

    # -- deciding ---------------------------------------------------------------------------------------------

    def order_key(self, context: Context) -> tuple[float, ...]:
        if context.phase is Phase.QUEUED and context.id in self._served:
            rank = 0  # preempted
        else:
            rank = 1 if context.id in self._kept else 2
        return (rank, context.arrival, context.id)

    def review(self, view: View) -> list[Choice]:
        choices = []
        for paused in view.paused:
            if not paused.tool:
                continue
            if paused.id not in self._ttl:
                self._ttl[paused.id] = self.time_to_live_s(view, paused)
            live_s = self._ttl[paused.id]
            if paused.elapsed_s >= live_s:
                reason = f"its time to live of {live_s:.3g} s is over"
                choices.append(Choice(paused.id, Action.RELEASE, view.costs(paused), reason))
            elif paused.decided is None:
                reason = f"expected to be worth keeping for {live_s:.3g} s"
                choices.append(Choice(paused.id, Action.PRESERVE, view.costs(paused), reason))
        return choices

    def time_to_live_s(self, view: View, paused: PausedContext) -> float:
        """tau* of the formula above."""
        start = paused.held_tokens - paused.exclusive_tokens
        reload_s = view.profile.recompute_s(start, paused.exclusive_tokens)
        if view.has_host:
            reload_s = min(reload_s, view.profile.copy_s(paused.exclusive_tokens))
        benefit_s = self.turns.eta * self.delay_s + reload_s
        seen: Sequence[Records] = (self._records.get(paused.tool, Records()), self._everything)
        for records in seen:
            if len(records) >= ENOUGH_RECORDS:
                return records.time_to_live_s(benefit_s)
        return PRIOR_S * log(benefit_s / PRIOR_S) if benefit_s > PRIOR_S else 0.0
