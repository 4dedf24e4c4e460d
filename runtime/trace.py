"""A trace of pauses: what every context did when, and what was decided. Opens in Perfetto.

One track per context (its states never overlap), one counter track for the pool, instants for decisions.
Format: the Chrome trace-event JSON that ui.perfetto.dev reads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caesura.runtime.engine import Engine
from caesura.scheduler.context import Context
from caesura.scheduler.types import Action, ContextId, PauseDecision, Phase, StepPlan, StepResult

MAX_EVENTS = 200_000


@dataclass(frozen=True, slots=True)
class Span:
    """One stretch of a context's life, in seconds on the engine's clock."""

    context: ContextId
    state: str
    start: float
    end: float
    tool: str = ""


def state_of(context: Context) -> str:
    """What a person would call the context's state: its phase, and for a tool pause what became of the KV."""
    if context.phase is not Phase.PAUSED:
        return context.phase.value
    if not context.pause.calls:
        return "idle"
    return {
        Action.SWAP: "swapped",
        Action.DISCARD: "discarded",
        Action.RELEASE: "released",
    }.get(context.decided or Action.PRESERVE, "preserved")


class TraceRecorder:
    """An engine observer that keeps spans, pool samples and decisions, up to a bound."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.decisions: list[PauseDecision] = []
        self.pool: list[tuple[float, int, int, int]] = []  # moment, running, paused, cached pages
        self.dropped = 0
        self._open: dict[ContextId, tuple[str, float, str]] = {}
        self._last = 0.0

    def on_step(self, engine: Engine, plan: StepPlan, result: StepResult) -> None:
        """Note what changed in this step."""
        now = plan.now + result.duration_s
        self._last = now
        if len(self.spans) + len(self.decisions) + len(self.pool) > MAX_EVENTS:
            self.dropped += 1
            return
        self.decisions.extend(plan.decisions)
        ledger = engine.ledger
        used = ledger.num_device_pages - ledger.free_pages - ledger.evictable_pages
        self.pool.append((now, used - ledger.paused_pages, ledger.paused_pages, ledger.evictable_pages))
        contexts = engine.scheduler.contexts
        for gone in self._open.keys() - contexts.keys():
            self._close(gone, now)
        for context in contexts.values():
            self._note(context, now)

    def _note(self, context: Context, now: float) -> None:
        state, tool = state_of(context), context.pause.tool if context.phase is Phase.PAUSED else ""
        before = self._open.get(context.id)
        if before is not None and (before[0], before[2]) == (state, tool):
            return
        if before is not None:
            self._close(context.id, now)
        self._open[context.id] = (state, now, tool)

    def _close(self, context: ContextId, now: float) -> None:
        state, start, tool = self._open.pop(context)
        self.spans.append(Span(context, state, start, now, tool))

    def finished_spans(self) -> list[Span]:
        """All spans, those still open ended at the last step."""
        still = [Span(c, state, start, self._last, tool) for c, (state, start, tool) in self._open.items()]
        return self.spans + still

    def to_perfetto(self, name: str = "caesura", process: int = 1) -> list[dict[str, Any]]:
        """Trace events of this recording; several recordings may go into one file under different processes."""
        spans = self.finished_spans()
        origin = min((span.start for span in spans), default=0.0)

        def micros(moment: float) -> int:
            return round((moment - origin) * 1e6)

        events: list[dict[str, Any]] = [
            {"ph": "M", "pid": process, "name": "process_name", "args": {"name": name}},
        ]
        for context in sorted({span.context for span in spans}):
            label = {"name": f"context {context}"}
            events.append({"ph": "M", "pid": process, "tid": context, "name": "thread_name", "args": label})
        for span in spans:
            title = f"{span.state}: {span.tool}" if span.tool else span.state
            events.append(
                {
                    "ph": "X",
                    "pid": process,
                    "tid": span.context,
                    "name": title,
                    "cat": "context",
                    "ts": micros(span.start),
                    "dur": max(1, micros(span.end) - micros(span.start)),
                }
            )
        for moment, running, paused, cached in self.pool:
            args = {"running": running, "paused": paused, "cached": cached}
            events.append({"ph": "C", "pid": process, "name": "KV pages", "ts": micros(moment), "args": args})
        events.extend(self._instants(process, micros))
        return events

    def _instants(self, process: int, micros: Any) -> list[dict[str, Any]]:
        return [
            {
                "ph": "i",
                "s": "t",
                "pid": process,
                "tid": decision.context_id,
                "name": f"{decision.action.value} ({decision.tool or 'idle'})",
                "ts": micros(decision.now),
                "args": {
                    "reason": decision.reason,
                    "preserve_token_s": decision.costs.preserve_token_s,
                    "swap_token_s": decision.costs.swap_token_s,
                    "discard_token_s": decision.costs.discard_token_s,
                    "affected_tokens": decision.affected_tokens,
                    "elapsed_s": decision.elapsed_s,
                    "expected_remaining_s": decision.expected_remaining_s,
                },
            }
            for decision in self.decisions
        ]


def write_perfetto(path: Path, recordings: dict[str, TraceRecorder]) -> None:
    """One file, one process track per recording."""
    events: list[dict[str, Any]] = []
    for number, (name, recorder) in enumerate(recordings.items(), 1):
        events.extend(recorder.to_perfetto(name, number))
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
