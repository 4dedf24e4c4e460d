"""A run as Chrome trace events, which ui.perfetto.dev opens: a track for each branch, one for each tool at once."""

from __future__ import annotations

from typing import Any

from caesura.lang.spans import Span
from caesura.lang.traces.describe import decisions_of, title
from caesura.lang.traces.run_trace import RunTrace

Event = dict[str, Any]


def perfetto(trace: RunTrace) -> dict[str, Any]:
    """The document: ``{"traceEvents": [...]}``."""
    return {"traceEvents": _Writer(trace).events, "displayTimeUnit": "ms"}


class _Writer:
    def __init__(self, trace: RunTrace) -> None:
        self._root = trace.root
        self._tracks: dict[tuple[int, str], int] = {}
        name = {"name": f"{trace.root.name} on {trace.backend}"}
        self.events: list[Event] = [{"ph": "M", "pid": 1, "name": "process_name", "args": name}]
        self._write(trace.root, self._track(trace.root, trace.root.name))

    def _track(self, span: Span, name: str) -> int:
        """A track's number; ``span`` is the branch it belongs to."""
        key = (id(span), name)
        if key not in self._tracks:
            number = self._tracks[key] = len(self._tracks) + 1
            for about, args in (("thread_name", {"name": name}), ("thread_sort_index", {"sort_index": number})):
                self.events.append({"ph": "M", "pid": 1, "tid": number, "name": about, "args": args})
        return self._tracks[key]

    def _write(self, span: Span, track: int) -> None:
        self.events.append(
            {
                "ph": "X",
                "pid": 1,
                "tid": track,
                "name": title(span),
                "cat": span.kind,
                "ts": self._micros(span.start_s),
                "dur": max(1, round(span.duration_s * 1e6)),
                "args": {key: value for key, value in _arguments(span).items() if value not in ("", None)},
            }
        )
        for decision in decisions_of(span):
            self._instant(decision, span, track)
        tools, samples, busy_until_s = 0, 0, span.start_s
        for child in span.children:
            if child.kind == "branch":
                self._write(child, self._track(child, child.name))
            elif child.kind == "tool":  # those of one pause overlap, so each has a track of its own
                self._write(child, self._track(self._root, f"tools {tools}"))
                tools += 1
            elif child.start_s < busy_until_s:  # several samples of one generation
                self._write(child, self._track(self._root, f"samples {samples}"))
                samples += 1
            else:
                self._write(child, track)
                busy_until_s = child.start_s + child.duration_s

    def _instant(self, decision: Any, span: Span, track: int) -> None:
        moment = max(span.start_s, min(decision.now, span.start_s + span.duration_s))
        kinds = ("preserve_token_s", "swap_token_s", "discard_token_s")
        costs = {kind: getattr(decision.costs, kind) for kind in kinds}
        self.events.append(
            {
                "ph": "i",
                "s": "t",
                "pid": 1,
                "tid": track,
                "name": decision.action.value,
                "cat": "decision",
                "ts": self._micros(moment),
                "args": {"reason": decision.reason, "policy": decision.policy, **costs},
            }
        )

    def _micros(self, moment_s: float) -> int:
        return round((moment_s - self._root.start_s) * 1e6)


def _arguments(span: Span) -> dict[str, Any]:
    about = {key: value for key, value in span.attributes.items() if key != "decisions"}
    return {**about, "error": span.error}
