"""The backend's pause decisions, as a program's user has them. What they are made of is the scheduler's."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from caesura.lang.spans import Span

SLACK_S = 0.25  # between a pause here and at the engine


class Decisions(tuple[Any, ...]):
    """The decisions of one context, in order."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        """One, or some; a notebook that gets one shows it as it shows all."""
        _tell_notebook()
        found = super().__getitem__(key)
        return Decisions(found) if isinstance(key, slice) else found

    def __repr__(self) -> str:
        return "\n".join(f"{item.now:.3f} {item.tool}: {item.action.value}, {item.reason}" for item in self) or "()"

    def _repr_html_(self) -> str:
        from caesura.lang.display.decisions import decisions_html

        return decisions_html(self)


def _tell_notebook() -> None:
    """The scheduler's decisions know nothing of HTML; IPython is told by their name how they look."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is not None:
        from caesura.lang.display.decisions import decision_html

        html = shell.display_formatter.formatters["text/html"]
        html.for_type_by_name("caesura.scheduler.types", "PauseDecision", decision_html)


def note_decisions(root: Span, decisions: Iterable[Any]) -> None:
    """Add each decision to the pause that it belongs to: the one that began when its pause did. A clock of another
    machine says nothing, so there the order and the tool decide."""
    pauses = [span for span in _own(root) if span.kind == "pause"]
    for pause in pauses:
        pause.attributes.pop("decisions", None)
    rest = iter(pauses)
    last: tuple[float, Span | None] = (-1.0, None)
    for decision in decisions:
        since = decision.now - decision.elapsed_s
        near = [pause for pause in pauses if abs(pause.start_s - since) < SLACK_S and _waits(pause, decision)]
        found = min(near, key=lambda pause: abs(pause.start_s - since), default=None)
        if found is None and abs(since - last[0]) < 1e-3:
            found = last[1]
        elif found is None:
            found = next((pause for pause in rest if _waits(pause, decision)), None)
        last = (since, found)
        if found is not None:
            found.attributes.setdefault("decisions", []).append(decision)


def _waits(pause: Span, decision: Any) -> bool:
    return bool(decision.tool == "+".join(pause.attributes["tools"]))


def _own(span: Span) -> Iterable[Span]:
    """A context's own spans, without those of its forks."""
    yield span
    for child in span.children:
        if child.kind != "branch":
            yield from _own(child)
