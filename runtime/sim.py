"""The deterministic simulator: the engine loop under a virtual clock, with programs and faults as timed events."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

from caesura.runtime.clock import VirtualClock
from caesura.runtime.engine import Engine
from caesura.runtime.errors import BrokenInvariant

MAX_IDLE_STEPS = 10_000


class Simulation:
    """Runs an engine and a heap of events until nothing is left to do.

    ``on_step`` is called after every engine step (for invariant checks). A queue that cannot move for
    ``MAX_IDLE_STEPS`` steps is a deadlock and raises.
    """

    def __init__(self, engine: Engine, clock: VirtualClock, on_step: Callable[[], None] = lambda: None) -> None:
        self.engine = engine
        self.clock = clock
        self._on_step = on_step
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.steps = 0

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Call ``action`` in ``delay_s`` virtual seconds."""
        heapq.heappush(self._events, (self.clock.now() + delay_s, next(self._order), action))

    def run(self, until_s: float = float("inf")) -> None:
        """Run to the end of all work, or to ``until_s``."""
        without_progress = 0
        while self.clock.now() < until_s:
            while self._events and self._events[0][0] <= self.clock.now():
                heapq.heappop(self._events)[2]()
            if self.engine.has_work:
                plan = self.engine.step()
                self.steps += 1
                self._on_step()
                without_progress = 0 if plan.slices or plan.moves or plan.expired else without_progress + 1
                if without_progress > MAX_IDLE_STEPS:
                    raise BrokenInvariant(f"no progress in {MAX_IDLE_STEPS} steps at {self.clock.now():.3f} s")
                if not plan.slices and not self.engine.scheduler.has_work:
                    self._skip()
            elif not self._skip():
                return

    def _skip(self) -> bool:
        """Move the clock to the next thing that can happen; False when there is none."""
        moments = [self._events[0][0]] if self._events else []
        deadline = self.engine.next_deadline()
        if deadline is not None:
            moments.append(deadline)
        copy_at = getattr(self.engine.executor, "next_copy_at", None)
        if copy_at is not None:
            moments.append(copy_at)
        if not moments:
            return False
        self.clock.advance_to(min(moments))
        if deadline is not None and self.clock.now() >= deadline:
            self.engine.step()
            self._on_step()
        return True
