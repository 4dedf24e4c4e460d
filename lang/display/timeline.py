"""A run as an SVG: a lane for each branch, in it what was generated, chosen, and waited for.

The picture stands alone too (a notebook on a code host shows it as an image), so its colours are its own, and its ink
is a grey that can be read on white and on black.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from caesura.lang.display.markup import MAX_ITEMS, Markup, tag
from caesura.lang.display.style import ACTIONS, CHOICE, GENERATED, GREY
from caesura.lang.spans import Span
from caesura.lang.traces.describe import decisions_of, details, duration, title

WIDTH = 880
LEFT = 96  # for the lanes' names
LANE = 30
BAR = 16
MAX_LANES = 40
INK = "#7a8694"
CHAR = 6.2  # width of a character of the labels


@dataclass(frozen=True)
class Timeline:
    """The picture of a trace: ``state.trace().timeline()``."""

    root: Span

    def _repr_svg_(self) -> str:
        return timeline_svg(self.root)


def timeline_svg(root: Span) -> Markup:
    """The picture; its width follows its surroundings."""
    lanes = [span for _, span in root.walk() if span is root or span.kind == "branch"]
    shown, hidden = lanes[:MAX_LANES], len(lanes) - MAX_LANES
    bars = [(4 + LANE * number, span) for number, lane in enumerate(shown) for span in _work(lane)]
    longest = heapq.nlargest(MAX_ITEMS, bars, key=lambda bar: bar[1].duration_s)
    longest.sort(key=lambda bar: (bar[0], bar[1].start_s))
    left_out = {"more branches": hidden, "more bars, all shorter": len(bars) - len(longest)}
    note = ", ".join(f"{number} {what}" for what, number in left_out.items() if number > 0)
    height = LANE * len(shown) + 44 + (16 if note else 0)
    parts = [_axis(root, LANE * len(shown) + 4)]
    for number, lane in enumerate(shown):
        parts += _lane(root, lane, 4 + LANE * number)
    for y, span in longest:
        parts += _bar(root, span, y)
    if note:
        parts.append(_label(LEFT, height - 32, note))
    parts.append(_legend(root, height - 8))
    return tag(
        "svg", *parts, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH} {height}", width=str(WIDTH),
        height=str(height), role="img", font_family="system-ui, sans-serif", font_size="11",
    )  # fmt: skip


def _x(root: Span, moment_s: float) -> float:
    whole = max(root.duration_s, 1e-9)
    return LEFT + (WIDTH - LEFT - 8) * min(max((moment_s - root.start_s) / whole, 0.0), 1.0)


def _lane(root: Span, lane: Span, y: float) -> list[Markup]:
    x, end = _x(root, lane.start_s), _x(root, lane.start_s + lane.duration_s)
    parts = [_label(0, y + 12, lane.name if len(lane.name) <= 15 else lane.name[:14] + "…")]
    return [*parts, _rect(x, y, end - x, f"rgba({GREY},.13)", "", "")]


def _bar(root: Span, span: Span, y: float) -> list[Markup]:
    start, stop = _x(root, span.start_s), _x(root, span.start_s + span.duration_s)
    fill, stroke = _colours(span)
    words = f"{title(span)}: {duration(span.duration_s)}. {details(span)}"
    parts = [_rect(start, y, max(1.5, stop - start), fill, stroke, words)]
    name = "+".join(span.attributes["tools"]) if span.kind == "pause" else span.name
    if len(name) * CHAR + 6 < stop - start:
        parts.append(_label(start + 4, y + 12, name, "#10151c" if span.kind != "pause" or stroke == "" else INK))
    return parts


def _work(lane: Span) -> list[Span]:
    """What a lane consists of: nested programs are part of it, branches are not."""
    found, ahead = [], lane.children[::-1]
    while ahead:
        child = ahead.pop()
        if child.kind == "program":
            ahead += reversed(child.children)
        elif child.kind in ("generate", "select", "pause"):
            found.append(child)
    return found


def _colours(span: Span) -> tuple[str, str]:
    """Fill and border. A pause has the colour of what last became of its KV, or none when nothing was decided."""
    if span.kind == "generate":
        return f"rgb({GENERATED})", ""
    if span.kind == "select":
        return f"rgb({CHOICE})", ""
    decided = decisions_of(span)
    if not decided:
        return f"rgba({GREY},.25)", f"rgb({GREY})"
    return f"rgb({ACTIONS[decided[-1].action.value]})", ""


def _axis(root: Span, y: float) -> Markup:
    whole = max(root.duration_s, 1e-9)
    step = next(step for step in _steps() if whole / step <= 8)
    parts = []
    for i in range(int(whole / step) + 1):
        x = _x(root, root.start_s + i * step)
        parts.append(
            tag(
                "line",
                x1=f"{x:.1f}",
                x2=f"{x:.1f}",
                y1="2",
                y2=f"{y:.1f}",
                stroke=f"rgba({GREY},.25)",
                stroke_width="1",
            )
        )
        anchor = "start" if i == 0 else "middle"
        parts.append(_label(x, y + 12, _moment(i, step), INK, anchor))
    return tag("g", *parts)


def _moment(number: int, step_s: float) -> str:
    """Of as many digits as tell one step from the next."""
    if number == 0:
        return "0"
    return duration(number * step_s) if step_s > 0.00095 else f"{1000 * number * step_s:.1f} ms"


def _steps() -> list[float]:
    return [base * 10.0**power for power in range(-4, 7) for base in (1, 2, 5)]


def _legend(root: Span, y: float) -> Markup:
    """Names of the colours that occur."""
    found: dict[str, tuple[str, str]] = {}
    for _, span in root.walk():
        if span.kind not in ("generate", "select", "pause"):
            continue
        decided = decisions_of(span) if span.kind == "pause" else ()
        name = {"generate": "generates", "select": "scores choices"}.get(span.kind, "waits")
        if decided:
            name = f"waits, KV {_PAST[decided[-1].action.value]}"
        found[name] = _colours(span)
    parts, x = [], float(LEFT)
    for name, (fill, stroke) in found.items():
        parts.append(
            tag(
                "rect",
                x=f"{x:.0f}",
                y=f"{y - 9:.0f}",
                width="10",
                height="10",
                rx="2",
                fill=fill,
                stroke=stroke or None,
            )
        )
        parts.append(_label(x + 14, y, name))
        x += 14 + CHAR * len(name) + 16
    return tag("g", *parts)


_PAST = {"preserve": "preserved", "swap": "swapped", "discard": "discarded", "release": "released"}


def _rect(x: float, y: float, width: float, fill: str, stroke: str, words: str) -> Markup:
    hover = [tag("title", words)] if words else []
    return tag(
        "rect", *hover, x=f"{x:.1f}", y=f"{y:.1f}", width=f"{width:.1f}", height=str(BAR), rx="3", fill=fill,
        stroke=stroke or None,
    )  # fmt: skip


def _label(x: float, y: float, words: str, colour: str = INK, anchor: str = "start") -> Markup:
    return tag("text", words, x=f"{x:.1f}", y=f"{y:.1f}", fill=colour, text_anchor=anchor)
