"""A state: how it stands, its context in colours, its pauses, its variables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from caesura.lang.display.context import context_html
from caesura.lang.display.decisions import decision_parts
from caesura.lang.display.markup import MAX_ITEMS, Markup, folded, join, listed, table, tag, view
from caesura.lang.display.timeline import timeline_svg
from caesura.lang.traces.describe import decisions_of, duration

if TYPE_CHECKING:
    from caesura.lang.state import ProgramState


def state_html(state: ProgramState) -> str:
    """Does not wait: a running program shows what is there."""
    core = state.core_or_none
    parts = [_head(state)]
    if state.failure is not None:
        parts.append(tag("div", str(state.failure), cls="cz-error"))
    if core is not None and core.log:
        parts.append(context_html(core.log))
    spans = [span for span in state.trace() if span.kind == "pause"]
    if spans:
        parts.append(timeline_svg(state.execution.span))
        parts += decision_parts([decision for span in spans for decision in decisions_of(span)])
    variables = state.variables
    if variables:
        shown = list(variables.items())[:MAX_ITEMS]
        rows: list[list[str]] = [[tag("code", name), _value(value)] for name, value in shown]
        if len(variables) > MAX_ITEMS:
            rows.append(["", f"{len(variables) - MAX_ITEMS} more variables"])
        parts.append(folded(f"{len(variables)} variables", table(rows, cls="cz-variables")))
    return view(*parts)


def _head(state: ProgramState) -> Markup:
    usage = state.usage()
    phase = "failed" if state.failure else "done" if state.done else "running"
    facts = [f"{usage.generations} generations", f"{usage.completion_tokens} tokens"]
    if usage.cached_tokens:
        facts.append(f"{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens cached")
    if usage.tool_calls:
        failed = f", {usage.tool_errors} failed" if usage.tool_errors else ""
        facts.append(f"{usage.tool_calls} tool calls in {duration(usage.tool_s)}{failed}")
    words = [
        tag("b", state.execution.program),
        Markup(" "),
        tag("span", phase, cls=f"cz-badge cz-{phase}"),
        Markup(" "),
    ]
    words.append(tag("span", " · ".join([*facts, duration(state.execution.span.duration_s)]), cls="cz-soft"))
    return tag("div", *words, cls="cz-head")


def _value(value: object) -> Markup:
    if isinstance(value, list) and len(value) > 1:
        return join(*listed(value, "values", lambda item: tag("div", str(item))))
    return tag("span", str(value))
