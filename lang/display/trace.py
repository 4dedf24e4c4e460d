"""A run's trace: its lanes, and every span in a line."""

from __future__ import annotations

from caesura.lang.display.decisions import decision_parts
from caesura.lang.display.markup import MAX_ITEMS, Markup, folded, tag, view
from caesura.lang.display.timeline import timeline_svg
from caesura.lang.spans import Span
from caesura.lang.traces.describe import decisions_of, details, duration, summary, title
from caesura.lang.traces.run_trace import RunTrace

MAX_INDENT = 20
_CLASSES = {"generate": "cz-g", "select": "cz-x", "tool": "cz-t"}


def trace_html(trace: RunTrace) -> str:
    """The whole, for a notebook."""
    return view(*trace_parts(trace))


def trace_parts(trace: RunTrace) -> list[Markup]:
    """Heading, picture, decisions, table of spans."""
    root = trace.root
    took = duration(root.duration_s) + ("" if root.end_s is not None else " so far")
    words = tag("span", f"on {trace.backend}, {took}: {summary(root)}", cls="cz-soft")
    parts = [tag("div", tag("b", root.name), words, cls="cz-head")]
    if root.error:
        parts.append(tag("div", root.error, cls="cz-error"))
    parts.append(timeline_svg(root))
    parts += decision_parts([decision for span in trace for decision in decisions_of(span)])
    spans = list(root.walk())
    lines = [_line(trace, depth, span) for depth, span in spans[:MAX_ITEMS]]
    if len(spans) > MAX_ITEMS:
        lines.append(tag("tr", tag("td", f"{len(spans) - MAX_ITEMS} more spans")))
    head = tag("tr", *(tag("th", name) for name in ("at", "span", "took", "")))
    parts.append(folded(f"{len(spans)} spans", tag("table", head, *lines, cls="cz-spans"), is_open=len(spans) <= 40))
    return parts


def _line(trace: RunTrace, depth: int, span: Span) -> Markup:
    about = tag("em", details(span, 160), cls="cz-t") if span.kind == "tool" else tag("span", details(span, 160))
    name = tag("strong" if span.kind == "generate" else "em", title(span), cls=_CLASSES.get(span.kind))
    return tag(
        "tr",
        tag("td", f"{span.start_s - trace.root.start_s:.3f}"),
        tag("td", Markup("&emsp;" * min(depth, MAX_INDENT)), name),
        tag("td", duration(span.duration_s)),
        tag("td", about),
    )
