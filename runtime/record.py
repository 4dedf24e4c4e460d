"""What the engine keeps of contexts and of steps under way, beside the scheduler's view."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from caesura.runtime.executors.base import ExecOutput, SampledToken, Ticket
from caesura.runtime.generation import Generation
from caesura.scheduler.types import ContextId, PauseDecision, StepPlan, StepResult


@dataclass(slots=True)
class Scoring:
    """Logprobs wanted of ``tokens[start:]``; with ``top``, of the likeliest tokens in their places too."""

    start: int
    done: Callable[[list[Any] | Exception], None]
    top: int = 0
    found: dict[int, float] = field(default_factory=dict)
    tops: dict[int, tuple[tuple[int, float], ...]] = field(default_factory=dict)

    def of(self, tokens: Sequence[int]) -> list[Any]:
        """What was asked for, of the context's ``tokens``."""
        places = range(self.start, len(tokens))
        if not self.top:
            return [self.found[place] for place in places]
        return [SampledToken(tokens[place], self.found[place], self.tops.get(place, ())) for place in places]


@dataclass(slots=True)
class Record:
    """One context's requests: who is waiting for what."""

    namespace: str
    on_closed: Callable[[Exception], None]
    generation: Generation | None = None
    scoring: Scoring | None = None
    prefilled: Callable[[int | Exception], None] | None = None
    decisions: list[PauseDecision] = field(default_factory=list)

    @property
    def is_busy(self) -> bool:
        return self.generation is not None or self.scoring is not None or self.prefilled is not None

    def fail(self, reason: Exception) -> None:
        """One terminal event for whatever was going on."""
        if self.generation is not None:
            generation, self.generation = self.generation, None
            generation.abort(str(reason))
        if self.scoring is not None:
            scoring, self.scoring = self.scoring, None
            scoring.done(reason)
        if self.prefilled is not None:
            done, self.prefilled = self.prefilled, None
            done(reason)


@dataclass(slots=True)
class Flight:
    """A step that was launched and committed, and whose output is still to come.

    ``live`` are the contexts whose output counts: whoever ends or stops meanwhile leaves it.
    """

    plan: StepPlan
    ticket: Ticket
    result: StepResult
    live: set[ContextId]


NO_OUTPUT = ExecOutput(0.0, ())
