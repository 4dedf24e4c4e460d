"""A run as a tree in the terminal: who did what, for how long, and when within the run."""

from __future__ import annotations

from collections.abc import Iterator

from caesura.lang.spans import Span, SpanKind
from caesura.lang.traces.describe import details, duration, title
from caesura.lang.traces.run_trace import RunTrace
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

BAR_CHARS = 24
LABEL_CHARS = 48
GUIDE_CHARS = 24
STYLES: dict[SpanKind, str] = {
    "program": "bold",
    "branch": "bold",
    "generate": "green",
    "select": "yellow",
    "pause": "cyan",
    "tool": "magenta",
}


def tree(trace: RunTrace) -> RenderableType:
    """A table whose first column holds the tree."""
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
    for justify in ("left", "right", "left"):
        table.add_column(justify=justify, no_wrap=True)
    table.add_column()  # the one that gives way when the terminal is narrow
    for guide, span in _guided(trace.root):
        style = "red" if span.error else STYLES[span.kind]
        label = Text.assemble((guide, "dim"), (title(span), style))
        label.truncate(LABEL_CHARS, overflow="ellipsis")
        took = Text(duration(span.duration_s) + ("" if span.end_s is not None else " …"), "dim")
        about = Text(details(span, 200), "red" if span.error else "", no_wrap=True, overflow="ellipsis")
        table.add_row(label, took, _bar(trace.root, span, style), about)
    return table


def _guided(root: Span) -> Iterator[tuple[str, Span]]:
    """Every span with the lines that lead to it, of which only the innermost are shown."""
    ahead = [("", "", root)]
    while ahead:
        guide, indent, span = ahead.pop()
        yield guide, span
        end = "└ ", "  "
        for child in reversed(span.children):
            corner, line = end
            ahead.append(((indent + corner)[-GUIDE_CHARS:], (indent + line)[-GUIDE_CHARS:], child))
            end = "├ ", "│ "


def _bar(root: Span, span: Span, style: str) -> Text:
    """Where in the run the span lies; at least one character."""
    whole = max(root.duration_s, 1e-9)
    start = min(BAR_CHARS - 1, int(BAR_CHARS * (span.start_s - root.start_s) / whole))
    width = max(1, min(BAR_CHARS - start, round(BAR_CHARS * span.duration_s / whole)))
    return Text.assemble(("·" * start, "dim"), ("█" * width, style), ("·" * (BAR_CHARS - start - width), "dim"))
