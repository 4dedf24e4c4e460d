"""A run as Chrome trace events, which ui.perfetto.dev opens: a track for each branch, and as many more as
tools, or samples of one generation, overlap."""

from __future__ import annotations

from collections import defaultdict
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
        self._ends: defaultdict[str, list[int]] = defaultdict(list)  # of each shared track's last span
        name = {"name": f"{trace.root.name} on {trace.backend}"}
        self.events: list[Event] = [{"ph": "M", "pid": 1, "name": "process_name", "args": name}]
        for span, home in _by_start(trace.root):
            self._write(span, home)

    def _track(self, span: Span, name: str) -> int:
        """A track's number; ``span`` is the branch it belongs to."""
        key = (id(span), name)
        if key not in self._tracks:
            number = self._tracks[key] = len(self._tracks) + 1
            for about, args in (("thread_name", {"name": name}), ("thread_sort_index", {"sort_index": number})):
                self.events.append({"ph": "M", "pid": 1, "tid": number, "name": about, "args": args})
        return self._tracks[key]

    def _shared(self, kind: str, start: int, end: int) -> int:
        """The first track of a kind that is free."""
        ends = self._ends[kind]
        number = next((i for i, last in enumerate(ends) if last <= start), len(ends))
        ends[number : number + 1] = [end]
        return self._track(self._root, f"{kind} {number}")

    def _write(self, span: Span, home: Span | str) -> None:
        start = self._micros(span.start_s)
        end = max(start + 1, self._micros(span.start_s + span.duration_s))
        track = self._shared(home, start, end) if isinstance(home, str) else self._track(home, home.name)
        self.events.append(
            {
                "ph": "X",
                "pid": 1,
                "tid": track,
                "name": title(span),
                "cat": span.kind,
                "ts": start,
                "dur": end - start,
                "args": {key: value for key, value in _arguments(span).items() if value not in ("", None)},
            }
        )
        for decision in decisions_of(span):
            self._instant(decision, span, track)

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


def _by_start(root: Span) -> list[tuple[Span, Span | str]]:
    """Every span with the branch on whose track it lies, or with the kind of the tracks that are for what overlaps."""
    found: list[tuple[Span, Span | str]] = [(root, root)]
    for span, home in found:  # which grows meanwhile
        busy_until_s = span.start_s
        for child in list(span.children):
            if child.kind == "branch":
                found.append((child, child))
            elif child.kind == "tool":
                found.append((child, "tools"))
            elif child.start_s < busy_until_s:  # several samples of one generation
                found.append((child, "samples"))
            else:
                found.append((child, home))
                busy_until_s = child.start_s + child.duration_s
    return sorted(found, key=lambda one: one[0].start_s)


def _arguments(span: Span) -> dict[str, Any]:
    about = {key: value for key, value in span.attributes.items() if key != "decisions"}
    return {**about, "error": span.error}
