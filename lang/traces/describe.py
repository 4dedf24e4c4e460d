"""A span in words; the same ones in every form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from caesura.lang.printable import printable
from caesura.lang.spans import Span


def duration(seconds: float) -> str:
    """A time as a person reads it."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms" if seconds >= 0.00095 else f"{1000 * seconds:.1f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def one_line(text: str, max_chars: int) -> str:
    """A text cut to one line."""
    flat = printable(" ".join(text.split())[: max_chars + 1], keep="")
    return flat if len(flat) <= max_chars else flat[: max_chars - 1] + "…"


def call_text(name: str, arguments: str, max_chars: int = 80) -> str:
    """A call as one would write it in Python; its name and its arguments are each cut to ``max_chars``."""
    try:
        values = json.loads(arguments or "{}")
        told = ", ".join(f"{key}={value!r}" for key, value in values.items())
    except (ValueError, AttributeError, RecursionError):
        told = arguments
    return f"{one_line(name, max_chars)}({one_line(told, max_chars)})"


def decisions_of(span: Span) -> Sequence[Any]:
    """The pause decisions that fell in a pause."""
    found: Sequence[Any] = span.attributes.get("decisions", ())
    return found


def details(span: Span, max_chars: int = 80) -> str:
    """What a span did, in a line."""
    return one_line(_told(span), max_chars)


def _told(span: Span) -> str:
    about = span.attributes
    if span.error and span.kind != "tool":
        return span.error
    if span.kind == "generate" and "completion_tokens" in about:
        words = f"{about['completion_tokens']} tokens after {about['prompt_tokens']}"
        if about["cached_tokens"]:
            words += f" ({about['cached_tokens']} cached)"
        return f"{words}: {repr(about['text'])[1:-1]}"
    if span.kind == "select":
        return f"{about.get('choice', '?')!s} of {len(about['choices'])}"
    if span.kind == "tool":
        return str(about["result"])
    if span.kind == "pause":
        decided = [f"{item.action.value}: {item.reason}" for item in decisions_of(span)]
        return "; ".join(decided) or f"waits for {', '.join(about['tools']) or 'nothing'}"
    if span.kind == "program":
        return summary(span)
    return ""


def title(span: Span) -> str:
    """What a span is called."""
    if span.kind == "tool":
        return call_text(span.name, span.attributes["arguments"], 40)
    return one_line(span.name if span.kind in ("branch", "program") else f"{span.kind} {span.name}", 80)


def summary(root: Span) -> str:
    """Totals of everything in a span."""
    spans = [span for _, span in root.walk()]
    done = [span.attributes for span in spans if span.kind == "generate" and "completion_tokens" in span.attributes]
    calls = [span for span in spans if span.kind == "tool"]
    words = [
        f"{len(done)} generations",
        f"{sum(item['completion_tokens'] for item in done)} tokens",
        f"{sum(item['cached_tokens'] for item in done)} of {sum(item['prompt_tokens'] for item in done)} cached",
    ]
    if calls:
        failed = sum(bool(span.error) for span in calls)
        words.append(f"{len(calls)} tool calls" + (f", {failed} failed" if failed else ""))
    return ", ".join(words)
