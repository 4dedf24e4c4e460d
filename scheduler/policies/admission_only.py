"""Nothing but a window on the programs under way: the control that shows whether placement matters at all."""

from __future__ import annotations

from collections.abc import Sequence

from caesura.scheduler.context import Context
from caesura.scheduler.estimate import Estimator
from caesura.scheduler.policies.base import Room
from caesura.scheduler.policies.lru import LruHost
from caesura.scheduler.types import ContextId

EVERY_S = 1.0
FIRST_WINDOW = 16.0
GROWTH = 2.0  # programs, additive
CUT = 0.75  # multiplicative
GOOD_HITS = 0.8  # share of a returning context's tokens found on device or host


class AdmissionOnly(LruHost):
    """LRU with a host tier, and AIMD on the number of active programs (CONCUR, arXiv 2601.22705).

    Every second: ``W = CUT * min(W, active)``, 1 at least, when contexts that came back found less than ``GOOD_HITS``
    of their tokens, on device or host, else ``W = W + GROWTH`` if somebody waited outside. A new program waits while W
    are active; it is active from then until its last context is closed. The paper's thresholds, period and signals
    beyond the hit rate and the demand were not known: the constants are ours.
    """

    name = "admission_only"

    def __init__(self, estimator: Estimator | None = None) -> None:
        super().__init__(estimator)
        self.window = FIRST_WINDOW
        self._active: dict[ContextId, set[ContextId]] = {}  # programs under way, and their contexts let in
        self._asked: dict[ContextId, int] = {}  # tokens a returning context had when it left
        self._found_tokens = self._asked_tokens = 0
        self._kept_out = False
        self._next_at = 0.0

    def saw_queued(self, context: Context, now: float) -> None:
        if context.high_water_tokens:
            self._asked[context.id] = context.high_water_tokens

    def saw_running(self, context: Context, now: float) -> None:
        asked = self._asked.pop(context.id, 0)
        self._asked_tokens += asked
        self._found_tokens += min(asked, context.cached_tokens)

    def saw_closed(self, context: Context) -> None:
        self._asked.pop(context.id, None)
        members = self._active.get(context.program, set())
        members.discard(context.id)
        if not members:
            self._active.pop(context.program, None)

    def admit(self, queued: Sequence[Context], room: Room) -> Sequence[Context]:
        if room.now >= self._next_at:
            self._next_at = room.now + EVERY_S
            self._adapt()
        allowed = []
        for context in queued:
            if context.program not in self._active and len(self._active) >= self.window:
                self._kept_out = True
                continue
            self._active.setdefault(context.program, set()).add(context.id)
            allowed.append(context)
        return allowed

    def _adapt(self) -> None:
        """One round of additive increase, multiplicative decrease."""
        if self._found_tokens < GOOD_HITS * self._asked_tokens:
            self.window = max(1.0, CUT * min(self.window, len(self._active)))
        elif self._kept_out:
            self.window += GROWTH
        self._found_tokens = self._asked_tokens = 0
        self._kept_out = False
