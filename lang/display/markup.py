"""HTML by construction: whatever is not Markup already is escaped."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import TypeVar

from caesura.lang.printable import printable

MAX_CHARS = 20_000
MAX_ITEMS = 400
T = TypeVar("T")


class Markup(str):
    """Text that is HTML. Only this package makes it."""

    __slots__ = ()


def text(value: str) -> Markup:
    """Escaped, with line breaks that survive without styles."""
    return Markup(html.escape(printable(clip(value))).replace("\n", "<br>"))


def tag(name: str, *content: str, **attributes: str | None) -> Markup:
    """An element. ``cls`` is its class; attributes that are None are left out."""
    given = "".join(
        f' {"class" if key == "cls" else key.replace("_", "-")}="{html.escape(printable(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>{join(*content)}</{name}>")


def join(*content: str) -> Markup:
    """One after the other."""
    return Markup("".join(item if isinstance(item, Markup) else text(item) for item in content))


def table(rows: list[list[str]], *, cls: str, head: list[str] | None = None) -> Markup:
    """A table; the first cell of a row is its heading."""
    lines = [tag("tr", *(tag("th", cell) for cell in head))] if head else []
    lines += [tag("tr", tag("th", first), *(tag("td", cell) for cell in rest)) for first, *rest in rows]
    return tag("table", *lines, cls=cls)


def folded(summary: str, *content: str, is_open: bool = False) -> Markup:
    """Details that open on a click."""
    return tag("details", tag("summary", summary), *content, open="" if is_open else None)


def listed(items: Sequence[T], what: str, show: Callable[[T], Markup]) -> list[Markup]:
    """The first items, and of how many more of ``what`` the page does not tell."""
    shown = [show(item) for item in items[:MAX_ITEMS]]
    if len(items) > MAX_ITEMS:
        shown.append(tag("div", f"{len(items) - MAX_ITEMS} more {what}", cls="cz-soft"))
    return shown


def view(*content: str) -> Markup:
    """The outermost element, with the styles."""
    from caesura.lang.display.style import STYLE

    return tag("div", Markup(f"<style>{STYLE}</style>"), *content, cls="cz")


def clip(value: str) -> str:
    """Cut what is too long for a page, and say so."""
    return value if len(value) <= MAX_CHARS else f"{value[:MAX_CHARS]} [{len(value) - MAX_CHARS} more characters]"
