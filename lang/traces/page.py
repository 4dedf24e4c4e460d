"""A trace as one HTML file that needs nothing else."""

from __future__ import annotations

from caesura.lang.display.markup import Markup, tag
from caesura.lang.display.style import STYLE
from caesura.lang.display.trace import trace_parts
from caesura.lang.traces.run_trace import RunTrace

_PAGE = """
:root{color-scheme:light dark}
body{margin:2rem auto;padding:0 1.5rem;max-width:64rem;background:Canvas;color:CanvasText}
.cz{max-width:none}
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # nothing in a trace can fetch or run anything


def page(trace: RunTrace) -> str:
    """The document."""
    head = tag(
        "head",
        Markup('<meta charset="utf-8">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        Markup('<meta name="viewport" content="width=device-width">'),
        tag("title", f"{trace.root.name}: trace"),
        Markup(f"<style>{STYLE}{_PAGE}</style>"),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', tag('div', *trace_parts(trace), cls='cz')), lang='en')}\n"
