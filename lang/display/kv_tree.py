"""The radix tree of a running engine as an SVG: tokens from left to right, what shares a prefix from the same box on.

Drawn from the runtime's snapshots (`caesura.runtime.snapshot`), several beside each other to compare moments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from caesura.lang.display.markup import Markup, tag
from caesura.lang.display.style import ACTIONS, CACHED, GENERATED
from caesura.lang.display.timeline import CHAR, INK, WIDTH

ROW = 22
GAP = 18  # between two pictures
TOP = 20  # for their titles
STATES = {
    "running": GENERATED,
    "preserved": ACTIONS["preserve"],
    "swapped": ACTIONS["swap"],
    "discarded": ACTIONS["discard"],
    "cached": CACHED,
}
_WORDS = {
    "running": "running",
    "preserved": "kept for a paused context",
    "swapped": "on the host",
    "discarded": "to be computed again",
    "cached": "cached, nobody's",
}


@dataclass(frozen=True)
class TreePicture:
    """Snapshots by title, drawn on one scale. ``names`` of contexts stand in the boxes that they hold."""

    snapshots: Mapping[str, Any]
    names: Mapping[int, str] = field(default_factory=dict)

    def _repr_svg_(self) -> str:
        return tree_svg(self.snapshots, self.names)


@dataclass
class _Box:
    view: Any
    row: int = 0
    rows: int = 1


def tree_svg(snapshots: Mapping[str, Any], names: Mapping[int, str]) -> Markup:
    """The pictures in a row, below them what the colours mean."""
    layouts = {title: _layout(snapshot.nodes) for title, snapshot in snapshots.items()}
    tokens = max((box.view.start + box.view.num_tokens for boxes in layouts.values() for box in boxes), default=1)
    rows = max((box.row + box.rows for boxes in layouts.values() for box in boxes), default=1)
    width = (WIDTH - GAP * (len(layouts) - 1)) / max(1, len(layouts))
    height = TOP + ROW * rows + 26
    parts = []
    for number, (title, boxes) in enumerate(layouts.items()):
        left = number * (width + GAP)
        parts.append(_label(left, 13, f"{title}: {_pool(snapshots[title])}"))
        parts += [_box(box, left, width / tokens, names) for box in boxes]
    parts.append(_legend({box.view.state for boxes in layouts.values() for box in boxes}, height - 4))
    return tag(
        "svg", *parts, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH} {height}", width=str(WIDTH),
        height=str(height), role="img", font_family="system-ui, sans-serif", font_size="11",
    )  # fmt: skip


def _pool(snapshot: Any) -> str:
    pool = snapshot.pool
    used = pool.running_pages + pool.paused_pages
    host = f", {pool.host_used_pages} on the host" if pool.host_used_pages else ""
    return f"{used} of {snapshot.device_pages} pages held{host}"


def _layout(views: Sequence[Any]) -> list[_Box]:
    """A row for each leaf; a run of the tree is as high as all that lies behind it."""
    below: dict[int | None, list[Any]] = {}
    for view in views:
        below.setdefault(view.parent, []).append(view)
    boxes: list[_Box] = []

    def place(parent: int | None, row: int, ends: int) -> tuple[int, int]:
        """Rows beside the box of ``parent``, which ends at a token, and rows below it. What one context has beyond the
        tree goes on in one row; what branches off within the box is below it, for the box is not split yet."""
        beside, below_it = row, []
        rows_of: dict[tuple[int, ...], int] = {}
        for view in sorted(below.get(parent, ()), key=lambda view: (view.start, view.id)):
            box = _Box(view, beside)
            boxes.append(box)
            if view.start < ends:
                below_it.append(box)
            elif view.id != -1:
                box.rows, more = place(view.id, beside, view.start + view.num_tokens)
                beside += box.rows + more
            elif view.kind != "rest" and view.holders in rows_of:
                box.row = rows_of[view.holders]
            else:
                rows_of[view.holders] = beside
                beside += 1
        rows = max(1, beside - row)
        for number, box in enumerate(below_it):
            box.row = row + rows + number
        return rows, len(below_it)

    place(None, 0, 0)
    return boxes


def _box(box: _Box, left: float, scale: float, names: Mapping[int, str]) -> Markup:
    view = box.view
    x, width = left + view.start * scale, max(2.0, view.num_tokens * scale - 1.5)
    y, height = TOP + ROW * box.row, ROW * box.rows - 3
    colour = STATES[view.state]
    holders = " ".join(names.get(holder, str(holder)) for holder in view.holders)
    words = f"{view.num_tokens} tokens, {_WORDS[view.state]}" + (f", held by {holders}" if holders else "")
    gone = view.state == "discarded"
    rect = tag(
        "rect", tag("title", words), x=f"{x:.1f}", y=f"{y}", width=f"{width:.1f}", height=f"{height}", rx="3",
        fill=f"rgba({colour},.12)" if gone else f"rgb({colour})", stroke=f"rgb({colour})",
        stroke_dasharray="3 2" if gone else None,
    )  # fmt: skip
    label = f"{holders}  {view.num_tokens}" if holders else str(view.num_tokens)
    label = next((text for text in (label, holders) if text and len(text) * CHAR + 8 < width), "")
    return tag("g", rect, _label(x + 5, y + height / 2 + 4, label, INK if gone else "#10151c"))


def _legend(states: set[str], y: float) -> Markup:
    parts, x = [], 0.0
    for state in (state for state in STATES if state in states):
        parts.append(
            tag("rect", x=f"{x:.0f}", y=f"{y - 9:.0f}", width="10", height="10", rx="2", fill=f"rgb({STATES[state]})")
        )
        parts.append(_label(x + 14, y, _WORDS[state]))
        x += 14 + CHAR * len(_WORDS[state]) + 16
    return tag("g", *parts)


def _label(x: float, y: float, words: str, colour: str = INK) -> Markup:
    return tag("text", words, x=f"{x:.1f}", y=f"{y:.1f}", fill=colour)
