"""What happened in the engine lately: spans of contexts' lives, decisions, pool use, tool durations. Bounded.

An observer of the engine. A step costs it the contexts that finished or were decided about; all contexts are looked at
only ``LOOK_INTERVAL_S`` apart, or when the step computed nothing, so that no pause is missed before the engine sleeps.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict, deque
from dataclasses import dataclass
from itertools import takewhile
from statistics import median
from typing import TypeVar

from caesura.runtime.engine import Engine
from caesura.runtime.kv.node import Hold
from caesura.runtime.trace import state_of
from caesura.scheduler.context import Context, Pause
from caesura.scheduler.types import Action, ContextId, PauseDecision, Phase, StepPlan, StepResult

LOOK_INTERVAL_S = 0.05
SAMPLE_INTERVAL_S = 0.5
KEPT_SPANS, KEPT_DECISIONS, KEPT_SAMPLES = 2048, 256, 1200
KEPT_TOOLS, KEPT_CALLS = 64, 128
MAX_TOOL_CHARS = 80


@dataclass(frozen=True, slots=True)
class PastSpan:
    """One finished stretch of a context's life, in seconds on the engine's clock. ``number`` orders all events."""

    number: int
    context: ContextId
    state: str
    tool: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class PastDecision:
    """A decision with its place among all events."""

    number: int
    decision: PauseDecision


@dataclass(frozen=True, slots=True)
class PoolSample:
    """Pages of the pools by use, and the running sums, at one moment."""

    number: int
    at_s: float
    running_pages: int
    paused_pages: int
    cached_pages: int
    free_pages: int
    host_used_pages: int
    tokens_computed: int
    tokens_recomputed: int
    running: int
    queued: int
    paused: int


E = TypeVar("E", PastSpan, PastDecision, PoolSample)


@dataclass(frozen=True, slots=True)
class ToolTimes:
    """How long a tool's calls took: all of them counted, the figures from the latest."""

    tool: str
    calls: int
    waiting: int
    median_s: float
    longest_s: float


@dataclass(frozen=True, slots=True)
class OpenSpan:
    """The state a context is in, the tool it waits for, and since when. ``paused_s`` is when its pause began."""

    state: str
    tool: str
    start_s: float
    paused_s: float | None


class History:
    """Rings of the latest events. All methods are called on the engine's thread."""

    def __init__(self) -> None:
        self.life = secrets.token_hex(8)  # another engine has another one, and counts its events anew
        self.number = 0
        self.open: dict[ContextId, OpenSpan] = {}
        self._seen: dict[ContextId, tuple[Phase, Pause, Action | None]] = {}  # what a span's state was made from
        self._spans: deque[PastSpan] = deque(maxlen=KEPT_SPANS)
        self._decisions: deque[PastDecision] = deque(maxlen=KEPT_DECISIONS)
        self._samples: deque[PoolSample] = deque(maxlen=KEPT_SAMPLES)
        self._tools: OrderedDict[str, tuple[int, deque[float]]] = OrderedDict()
        self._looked_s = self._sampled_s = float("-inf")

    def on_step(self, engine: Engine, plan: StepPlan, result: StepResult) -> None:
        """Note what a step changed."""
        now = plan.now + result.duration_s
        for decision in plan.decisions:
            self._decisions.append(PastDecision(self._next(), decision))
        if now - self._looked_s >= LOOK_INTERVAL_S or not plan.slices:
            self.look(engine, now)
            return
        contexts = engine.scheduler.contexts
        for context_id in (*result.finished, *(decision.context_id for decision in plan.decisions)):
            context = contexts.get(context_id)
            if context is not None:
                self._note(context, now)

    def look(self, engine: Engine, now: float) -> None:
        """Note the state of every context, and of the pool when its turn has come."""
        self._looked_s = now
        contexts = engine.scheduler.contexts
        for gone in [context for context in self.open if context not in contexts]:
            self._end(gone, now)
            del self._seen[gone]
        for context in contexts.values():
            seen = self._seen.get(context.id)
            if (
                seen is None
                or seen[0] is not context.phase
                or seen[1] is not context.pause
                or seen[2] is not context.decided
            ):
                self._note(context, now)
        if now - self._sampled_s >= SAMPLE_INTERVAL_S:
            self._sampled_s = now
            self._samples.append(sample(engine, self._next(), now))

    def spans(self, since: int) -> tuple[PastSpan, ...]:
        """Spans that ended after event ``since``, oldest first."""
        return _newer(self._spans, since)

    def decisions(self, since: int) -> tuple[PastDecision, ...]:
        """Decisions after event ``since``, oldest first."""
        return _newer(self._decisions, since)

    def samples(self, since: int) -> tuple[PoolSample, ...]:
        """Pool samples after event ``since``, oldest first."""
        return _newer(self._samples, since)

    def tools(self) -> tuple[ToolTimes, ...]:
        """Every tool of late: those that contexts wait for, and those that have answered, the latest first."""
        waiting: dict[str, int] = {}
        for span in self.open.values():
            if span.tool:
                waiting[span.tool] = waiting.get(span.tool, 0) + 1
        names = [*reversed(self._tools), *(name for name in waiting if name not in self._tools)][:KEPT_TOOLS]
        found = []
        for name in names:
            calls, recent = self._tools.get(name, (0, ()))
            middle, longest = (median(recent), max(recent)) if recent else (0.0, 0.0)
            found.append(ToolTimes(name, calls, waiting.get(name, 0), middle, longest))
        return tuple(found)

    # -- parts ------------------------------------------------------------------------------------------------

    def _next(self) -> int:
        self.number += 1
        return self.number

    def _note(self, context: Context, now: float) -> None:
        self._seen[context.id] = (context.phase, context.pause, context.decided)
        state, before = state_of(context), self.open.get(context.id)
        paused_s = context.pause.since if context.phase is Phase.PAUSED else None
        if before is not None and before.state == state and before.paused_s == paused_s:
            return
        began = context.waiting_since if paused_s is None else paused_s  # anything else began just now
        start_s = began if before is None or began > before.start_s else now
        if before is not None:
            self._end(context.id, start_s, goes_on=before.paused_s is not None and before.paused_s == paused_s)
        tool = context.pause.tool[:MAX_TOOL_CHARS] if paused_s is not None else ""
        self.open[context.id] = OpenSpan(state, tool, start_s, paused_s)

    def _end(self, context: ContextId, now: float, *, goes_on: bool = False) -> None:
        """A span ends; ``goes_on``: its pause does not, something else was decided about it."""
        span = self.open.pop(context)
        self._spans.append(PastSpan(self._next(), context, span.state, span.tool, span.start_s, now))
        if span.tool and span.paused_s is not None and not goes_on:
            self._answered(span.tool, now - span.paused_s)

    def _answered(self, tool: str, duration_s: float) -> None:
        calls, recent = self._tools.pop(tool, (0, deque(maxlen=KEPT_CALLS)))
        recent.append(duration_s)
        self._tools[tool] = (calls + 1, recent)
        if len(self._tools) > KEPT_TOOLS:
            self._tools.popitem(last=False)


def _newer(ring: deque[E], since: int) -> tuple[E, ...]:
    found = list(takewhile(lambda event: event.number > since, reversed(ring)))
    return tuple(reversed(found))


def sample(engine: Engine, number: int, now: float) -> PoolSample:
    """The pools as they are. The unfinished last pages of paused contexts count as paused, like all else they hold."""
    ledger, meter = engine.ledger, engine.scheduler.meter
    used = ledger.num_device_pages - ledger.free_pages - ledger.evictable_pages
    tails = {lease.tail[0] for lease in ledger.leases.values() if lease.tail and lease.hold is Hold.PAUSED}
    paused_pages = min(used, ledger.paused_pages + len(tails))
    phases = [context.phase for context in engine.scheduler.contexts.values()]
    return PoolSample(
        number=number,
        at_s=now,
        running_pages=used - paused_pages,
        paused_pages=paused_pages,
        cached_pages=ledger.evictable_pages,
        free_pages=ledger.free_pages,
        host_used_pages=ledger.num_host_pages - ledger.free_host_pages,
        tokens_computed=meter.tokens_computed,
        tokens_recomputed=meter.tokens_recomputed,
        running=phases.count(Phase.RUNNING),
        queued=phases.count(Phase.QUEUED),
        paused=phases.count(Phase.PAUSED),
    )
