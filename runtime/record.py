"""What the engine keeps of contexts and of steps under way, beside the scheduler's view.

A step's inputs are made from the contexts' records, and its output goes back to whoever waits for it there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from caesura.runtime.clock import Clock
from caesura.runtime.errors import ContextClosed, InvalidRequest
from caesura.runtime.executors.base import ExecOutput, SampledToken, SliceInput, SliceOutput, Ticket
from caesura.runtime.generation import Ending, Generation
from caesura.scheduler.context import Call
from caesura.scheduler.scheduler import Scheduler
from caesura.scheduler.types import ContextId, PauseDecision, Phase, Slice, StepPlan, StepResult

KEPT_DECISIONS = 64


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

    def computes(self, context: ContextId, num_tokens: int) -> bool:
        """Some of the context's first ``num_tokens`` are still to come of it."""
        return any(piece.context_id == context and piece.start < num_tokens for piece in self.plan.slices)


NO_OUTPUT = ExecOutput(0.0, ())


class Records(dict[ContextId, Record]):
    """All open contexts' records."""

    def __init__(self, scheduler: Scheduler, clock: Clock) -> None:
        super().__init__()
        self._scheduler, self._clock = scheduler, clock
        self.has_new_pause = False  # the policy has not seen it yet

    def of(self, context: ContextId) -> Record:
        """Raises ContextClosed."""
        record = self.get(context)
        if record is None:
            raise ContextClosed(f"context {context} is closed")
        return record

    def idle(self, context: ContextId) -> Record:
        """Raises ContextClosed, InvalidRequest while a request is going on."""
        record = self.of(context)
        if record.is_busy:
            raise InvalidRequest(f"context {context} is busy; wait for its request to finish, or abort it")
        return record

    def input(self, piece: Slice) -> SliceInput:
        """What the executor is to compute of a slice."""
        state, record = self._scheduler.contexts[piece.context_id], self[piece.context_id]
        end = piece.start + piece.num_tokens
        tokens = state.tokens[piece.start : end]
        sampler = record.generation.sampler if piece.samples and record.generation is not None else None
        if record.scoring is None:
            return SliceInput(piece.context_id, tokens, piece.start, piece.pages, sampler)
        first = max(piece.start, record.scoring.start - 1)
        last = min(end, state.num_tokens - 1)
        targets = [(position - piece.start, state.tokens[position + 1]) for position in range(first, last)]
        return SliceInput(piece.context_id, tokens, piece.start, piece.pages, sampler, targets, record.scoring.top)

    def read(self, output: ExecOutput, endings: dict[ContextId, Ending]) -> dict[ContextId, int]:
        """Feed sampled tokens to their generations and see which of them end."""
        tokens: dict[ContextId, int] = {}
        for out in output.outputs:
            context = out.context_id
            generation = self[context].generation
            if out.failure is not None:
                endings[context] = Ending("abort", out.failure, keep=False)
            elif out.sampled is not None and generation is not None:
                ending = generation.push(out.sampled)
                if ending is None or ending.keep:
                    tokens[context] = out.sampled.token_id
                if ending is not None:
                    endings[context] = ending
        return tokens

    def emit(self, plan: StepPlan, output: ExecOutput, endings: dict[ContextId, Ending]) -> None:
        """Tell everyone whose request is done."""
        for context, ending in endings.items():
            record = self.get(context)
            if record is not None:
                self.finish(context, record, ending)
        for out in output.outputs:
            record = self.get(out.context_id)
            if record is not None and (record.scoring is not None or record.prefilled is not None):
                start = next(piece.start for piece in plan.slices if piece.context_id == out.context_id)
                self._collect(out.context_id, record, start, out)

    def finish(self, context: ContextId, record: Record, ending: Ending) -> None:
        """End a generation: its last tokens, its calls, its terminal event."""
        generation, record.generation = record.generation, None
        if generation is None:
            return
        if ending.reason == "abort":
            generation.abort(str(ending.matched))
            return
        state = self._scheduler.contexts[context]
        kept, rest = generation.kept_tokens(ending)
        if isinstance(ending.matched, str):
            length = state.num_tokens - (len(generation.token_ids) - kept)
            self._scheduler.truncate(context, length, self._clock.now())
            self._scheduler.append(context, rest)
        calls = generation.calls(ending)
        if calls:  # no gap between the last token and the pause
            self._scheduler.pause(context, self._clock.now(), [Call(call.name) for call in calls])
            self.has_new_pause = True
        generation.finish(ending, calls, max(0, state.cached_tokens))

    def _collect(self, context: ContextId, record: Record, start: int, out: SliceOutput) -> None:
        if out.failure is not None:
            record.fail(ContextClosed(out.failure))
            return
        state = self._scheduler.contexts[context]
        scoring = record.scoring
        if scoring is not None and out.scores:
            first = max(start, scoring.start - 1) + 1
            scoring.found.update(zip(range(first, first + len(out.scores)), out.scores, strict=True))
            scoring.tops.update(enumerate(out.score_tops, first))
        if state.phase is not Phase.PAUSED:
            return
        if scoring is not None:
            scores, record.scoring = scoring.of(state.tokens), None
            scoring.done(scores)
        if record.prefilled is not None:
            done, record.prefilled = record.prefilled, None
            done(state.num_tokens)

    def needs_one_more(self, context: ContextId) -> bool:
        """The token under way is the last one that the context's generation may have."""
        generation = self[context].generation
        return generation is not None and len(generation.token_ids) + 1 >= generation.params.max_new_tokens

    def remember(self, decision: PauseDecision) -> None:
        """Keep a context's latest decisions."""
        record = self.get(decision.context_id)
        if record is not None:
            record.decisions.append(decision)
            del record.decisions[:-KEPT_DECISIONS]
