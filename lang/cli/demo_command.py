"""The demo with its audience: live view or lines, table or JSON, picture, trace."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

from caesura.lang.cli.demo import Report, run_demo
from caesura.lang.cli.live import TerminalViewer, report_view
from caesura.lang.cli.output import FAILED, CliError, cannot_write, check_writable, print_json, stderr, stdout
from rich.console import Console, RenderableType
from rich.text import Text

SVG_COLUMNS = 118
TRACE_BEGINS = b'{"traceEvents"'


def demo_command(
    *,
    agents: int,
    seed: int,
    policies: Sequence[str],
    trace: Path,
    svg: Path | None,
    live: bool,
    as_json: bool,
) -> None:
    """Run the demo and print what it found. With ``as_json`` the live view, if any, goes to standard error."""
    check_outputs(trace, svg)
    console = stderr() if as_json else stdout()
    shows = live and console.is_terminal
    quiet = as_json and not shows
    viewer = TerminalViewer(Console(file=io.StringIO()) if quiet else console, live=shows, keep=svg is not None)
    if not quiet:
        console.print(
            Text(
                f"{agents} agents ask an embedded model; it calls a calculator that takes 0.05 to 2 seconds. "
                "Their KV does not fit, so at each call the runtime decides what becomes of it."
            )
        )
    with viewer:
        report = run_demo(agents=agents, seed=seed, policies=policies, trace=trace, viewer=viewer)
    if as_json:
        print_json(report.as_dict())
    else:
        console.print(report_view(report, trace=trace))
    if svg is not None:
        save_picture(svg, viewer.kept, report)
    if report.failures:
        raise CliError(
            f"{len(report.failures)} runs of agents failed; the first: {report.failures[0]}", "caesura doctor", FAILED
        )


def check_outputs(trace: Path, svg: Path | None) -> None:
    """Both can be written, and no file that is not a trace is replaced by one: it has its name by default."""
    check_writable(trace, "caesura demo --trace FILE")
    if trace.is_file():
        with trace.open("rb") as file:
            begins = file.read(len(TRACE_BEGINS))
        if not TRACE_BEGINS.startswith(begins):
            raise CliError(f"{trace} is no trace, and is not replaced by one", "caesura demo --trace FILE")
    if svg is not None:
        check_writable(svg, "caesura demo --svg FILE", folders=True)


def save_picture(path: Path, view: RenderableType | None, report: Report) -> None:
    """Draw a moment of the live view and the final table as one SVG."""
    console = Console(record=True, width=SVG_COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text("$ caesura demo", "bold"))
    if view is not None:
        console.print(view)
    console.print(report_view(report, trace=None))
    svg = console.export_svg(title="caesura demo")
    svg = re.sub(r"@font-face\s*\{[^}]*\}", "", svg)  # a picture must not fetch fonts from elsewhere
    try:
        path.write_text(svg, encoding="utf-8")
    except OSError as error:
        raise cannot_write(path, error, "caesura demo --svg FILE") from None
