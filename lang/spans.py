"""What happened when: a tree of spans that every run notes down about itself.

Times are those of `time.monotonic`, which is the engine's clock too, so that its decisions fall into the right pauses.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

SpanKind = Literal["program", "branch", "generate", "select", "pause", "tool"]


@dataclass(slots=True, eq=False)
class Span:
    """One stretch of a run. ``end_s`` is None while it lasts; ``error`` says how it failed, ``error_type`` is the class
    of the exception where that is known.

    Attributes by kind: ``generate`` has prompt_tokens, cached_tokens, completion_tokens, finish, first_token_s and
    text; ``select`` choices and choice; ``pause`` tools; ``tool`` arguments, result, ok, attempts and elapsed_s.
    """

    kind: SpanKind
    name: str
    start_s: float = field(default_factory=time.monotonic)
    end_s: float | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    children: list[Span] = field(default_factory=list)
    error: str = ""
    error_type: str = ""

    @property
    def duration_s(self) -> float:
        """Up to now while it lasts."""
        return (time.monotonic() if self.end_s is None else self.end_s) - self.start_s

    def add(self, kind: SpanKind, name: str, **attributes: Any) -> Span:
        """A child that begins now."""
        child = Span(kind, name, attributes=attributes)
        self.children.append(child)
        return child

    def end(self, error: str = "", error_type: str = "") -> None:
        """End it, and everything in it that has not ended."""
        now, lasting = time.monotonic(), [self]
        while lasting:
            span = lasting.pop()
            if span.end_s is None:
                span.end_s, span.error, span.error_type = now, error, error_type
                lasting += span.children

    def walk(self) -> Iterator[tuple[int, Span]]:
        """This span and all in it, parents first, each with its depth, which has no limit."""
        ahead = [(0, self)]
        while ahead:
            depth, span = ahead.pop()
            yield depth, span
            ahead += [(depth + 1, child) for child in reversed(span.children)]


class SpanStack:
    """Where in the tree a context is: what begins now becomes a child of the innermost span that lasts."""

    def __init__(self, root: Span) -> None:
        self.root = root
        self._open = [root]

    @property
    def top(self) -> Span:
        return self._open[-1]

    @contextlib.contextmanager
    def within(self, kind: SpanKind, name: str, **attributes: Any) -> Iterator[Span]:
        """A span around a block."""
        span = self.top.add(kind, name, **attributes)
        self._open.append(span)
        try:
            yield span
        except BaseException as error:
            error_type = type(error).__name__
            span.end(f"{error_type}: {error}" if str(error) else error_type, error_type)
            raise
        finally:
            span.end()
            self._open.remove(span)
