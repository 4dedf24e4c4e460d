"""A run's spans with what is needed to read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caesura.lang.errors import DefinitionError
from caesura.lang.spans import Span

if TYPE_CHECKING:
    from caesura.lang.display.timeline import Timeline
    from rich.console import RenderableType


@dataclass(frozen=True, slots=True)
class RunTrace:
    """The spans of a run, which may still go on. ``begun_at``: the root's start as Unix time, in seconds."""

    root: Span
    begun_at: float
    backend: str

    def __iter__(self) -> Iterator[Span]:
        """Every span, parents before children."""
        return (span for _, span in self.root.walk())

    def unix_s(self, moment_s: float) -> float:
        """A span's moment as Unix time."""
        return self.begun_at + moment_s - self.root.start_s

    @property
    def model(self) -> str:
        """The model's name, as far as the backend's tells it."""
        return self.backend.rpartition("(")[2].rstrip(")")

    def tree(self) -> RenderableType:
        """For a terminal, as a renderable of rich."""
        from caesura.lang.traces.tree import tree

        return tree(self)

    def timeline(self) -> Timeline:
        """The run as a picture (SVG)."""
        from caesura.lang.display.timeline import Timeline

        return Timeline(self.root)

    def html(self) -> str:
        """One page with everything in it: no script, no request, readable in light and dark."""
        from caesura.lang.traces.page import page

        return page(self)

    def perfetto(self) -> dict[str, Any]:
        """Trace events for ui.perfetto.dev."""
        from caesura.lang.traces.perfetto import perfetto

        return perfetto(self)

    def save(self, path: str | Path) -> None:
        """Write the page (``.html``) or Perfetto's events (``.json``). Raises DefinitionError for another ending."""
        path = Path(path)
        if path.suffix == ".html":
            path.write_text(self.html(), encoding="utf-8")
        elif path.suffix == ".json":
            path.write_text(json.dumps(self.perfetto()), encoding="utf-8")
        else:
            raise DefinitionError(f"a trace is saved as .html or as .json (Perfetto), not as {path.name!r}")

    def export(self, provider: Any = None, *, content: bool = False) -> None:
        """Send the spans to OpenTelemetry (the extra ``otel``): to ``provider``, or the global one.

        ``content``: with the texts of the model, the arguments and results of tools, and the words of errors, all of
        which may be confidential.
        """
        from caesura.lang.traces.otel import export

        export(self, provider, content=content)

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        text = StringIO()  # whatever the surroundings are: a notebook, or a terminal with colours
        console = Console(file=text, width=120, color_system=None, force_terminal=False, force_jupyter=False)
        console.print(self.tree())
        return text.getvalue()

    def __repr__(self) -> str:
        state = "running" if self.root.end_s is None else f"{self.root.duration_s:.3f} s"
        return f"<RunTrace of {self.root.name!r}: {state}, {sum(1 for _ in self)} spans>"

    def _repr_html_(self) -> str:
        from caesura.lang.display.trace import trace_html

        return trace_html(self)
