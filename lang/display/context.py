"""A context's text, coloured by where it comes from, turn by turn, with tool calls folded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from caesura.lang.backend import Piece
from caesura.lang.core import Segment
from caesura.lang.display.markup import MAX_CHARS, Markup, folded, join, table, tag, text
from caesura.lang.tools import ToolCall, ToolResult
from caesura.lang.traces.describe import call_text, duration, one_line

SHORT_CHARS = 120


@dataclass
class _Part:
    """A stretch of text from one source; its first ``cached`` characters were found in the cache."""

    text: str
    segment: Segment
    is_marker: bool
    cached: int = 0


@dataclass
class _Row:
    """A turn."""

    role: str
    content: list[Markup] = field(default_factory=list)


def context_html(log: Sequence[Segment]) -> Markup:
    """The turns as a table, below it what the colours mean."""
    parts = list(_parts(log))
    _mark_cached(parts)
    rows = [_Row("")]
    left = MAX_CHARS
    for part in parts:
        segment = part.segment
        if segment.marker == "open" and part.is_marker and segment.role and not _continues(rows, segment):
            rows.append(_Row(segment.role))
        if left > 0:
            rows[-1].content.append(_part(part, left))
            left -= 0 if part.is_marker else len(part.text)
    cut = [] if left > 0 else [["", tag("span", "The rest is not shown.", cls="cz-soft")]]
    shown = [[row.role, join(*row.content)] for row in rows if any(row.content)]
    return join(table(shown + cut, cls="cz-turns"), _legend(parts))


def _continues(rows: Sequence[_Row], segment: Segment) -> bool:
    """A turn's marker may be several pieces; the first opens the row."""
    return rows[-1].role == segment.role and not any(rows[-1].content)


def _parts(log: Sequence[Segment]) -> Iterator[_Part]:
    for segment in log:
        if segment.source == "tool" and segment.calls:
            if segment.marker is None:
                yield _Part(segment.text, segment, False)
            else:  # the end of the turn, the results, and the next turn's opening
                yield _Part(segment.text, segment, False)
                yield _Part("", segment, True)
            continue
        for piece in segment.pieces:
            is_marker = segment.marker is not None and isinstance(piece, Piece)
            yield _Part(piece.text, segment, is_marker)


def _mark_cached(parts: Sequence[_Part]) -> None:
    """Spread what each generation found in the cache over the text that was new before it.

    Tokens are known only in sum between two generations, so the last character of the cached part is an estimate.
    """
    stretch: list[_Part] = []
    known = 0  # tokens of the context before the stretch
    for part in parts:
        finish = part.segment.finish
        if finish is None:
            stretch.append(part)
            continue
        new = finish.prompt_tokens - known
        chars = sum(len(one.text) for one in stretch)
        cached = round(chars * min(max(finish.cached_tokens - known, 0) / new, 1.0)) if new > 0 else 0
        for one in stretch:
            one.cached = min(cached, len(one.text))
            cached -= one.cached
        known = finish.prompt_tokens + finish.completion_tokens
        stretch = []


_CLASSES = {"model": "cz-g", "choice": "cz-x", "tool": "cz-t"}


def _part(part: _Part, left: int) -> Markup:
    segment = part.segment
    if part.is_marker:
        return _marker(part)
    if segment.source == "tool" and segment.calls:
        return join(*(call_html(call, result) for call, result in segment.calls))
    shown = part.text if len(part.text) <= left else part.text[:left] + " …"
    if segment.source == "program":
        return _program_text(shown, part.cached)
    name = "strong" if segment.source == "model" else "em"
    return tag(name, shown, cls="cz-k" if segment.constrained else _CLASSES[segment.source], title=_title(segment))


def _program_text(shown: str, cached: int) -> Markup:
    if not cached:
        return text(shown)
    return join(tag("span", shown[:cached], cls="cz-c", title="found in the cache"), shown[cached:])


def _title(segment: Segment) -> str:
    words = segment.name
    if segment.finish is not None:
        finish = segment.finish
        words += f": {finish.completion_tokens} tokens after {finish.prompt_tokens}, {finish.cached_tokens} cached"
    return words + (", constrained by a grammar" if segment.constrained else "")


def _marker(part: _Part) -> Markup:
    """Markers of the template are what the rows stand for; only what is long in them (tools) can be unfolded."""
    if len(part.text) <= SHORT_CHARS:
        return Markup("")
    return folded(f"template text, {len(part.text)} characters", tag("span", part.text, cls="cz-m"))


def call_html(call: ToolCall, result: ToolResult) -> Markup:
    """A call in a line; unfolded, its arguments and its whole result."""
    short = one_line(result.text, SHORT_CHARS)
    took = f"{duration(result.elapsed_s)}" + (f", {result.attempts} attempts" if result.attempts > 1 else "")
    summary = join(
        call_text(call.tool, call.arguments, SHORT_CHARS), " → ", tag("em", short, cls="cz-t"), " ",
        tag("span", took, cls="cz-soft"),
    )  # fmt: skip
    whole = join(
        tag("div", "arguments ", tag("code", _pretty(call.arguments))),
        tag("div", "result ", tag("code", result.text)),
    )
    return tag("div", folded(summary, whole), cls="cz-call" if result.ok else "cz-call cz-bad")


def _pretty(arguments: str) -> str:
    try:
        return json.dumps(json.loads(arguments), ensure_ascii=False, indent=1)
    except (ValueError, RecursionError):
        return arguments


def _legend(parts: Sequence[_Part]) -> Markup:
    """What the colours that occur mean."""
    known = {
        "found in the cache": any(part.cached for part in parts if part.segment.source == "program"),
        "generated": any(part.segment.source == "model" and not part.segment.constrained for part in parts),
        "generated under a grammar": any(part.segment.constrained for part in parts),
        "chosen by score": any(part.segment.source == "choice" for part in parts),
        "from a tool": any(part.segment.source == "tool" for part in parts),
    }
    classes = dict(zip(known, ("cz-c", "cz-g", "cz-k", "cz-x", "cz-t"), strict=True))
    names = {"cz-g": "strong", "cz-k": "strong", "cz-x": "em", "cz-t": "em"}
    shown = [tag(names.get(classes[word], "span"), word, cls=classes[word]) for word, occurs in known.items() if occurs]
    spaced = [item for one in shown for item in (one, Markup(" "))]
    return tag("div", *spaced, cls="cz-legend") if shown else Markup("")
