"""The demo on a terminal: a live view of the fleet, and the final table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from caesura.lang.cli.demo import Outcome, Report
from caesura.lang.cli.fleet import FleetRun
from caesura.lang.cli.watch import ContextRow, PoolView, Snapshot
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

STYLES = {
    "running": "bold green",
    "queued": "yellow",
    "preserved": "cyan",
    "swapped": "blue",
    "discarded": "red",
    "released": "magenta",
    "idle": "dim",
    "done": "dim",
    "starting": "dim",
}
SHORT = {"preserve": "keep", "swap": "swap", "discard": "drop", "release": "let go"}
BAR_CHARS = 40
CHROME_LINES = 7  # bar, legend, header and footer around the rows


class TerminalViewer:
    """Draws snapshots, at most 8 a second, and one line for each finished run.

    ``live`` False: only the lines. ``keep`` remembers the most telling snapshot of the last run, for a picture.
    """

    def __init__(self, console: Console, *, live: bool, keep: bool = False) -> None:
        self.console = console
        self.wants_snapshots = live or keep
        self.kept: RenderableType | None = None
        self._keep = keep
        self._live = Live(console=console, auto_refresh=False, transient=True) if live else None
        self._title = ""
        self._run: FleetRun | None = None
        self._best = (-1, -1)

    def __enter__(self) -> TerminalViewer:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, what: str) -> None:
        """What happens while no fleet runs."""
        if self._live is not None:
            self._live.update(Text(f"{what} ...", "dim"), refresh=True)

    def begin(self, title: str, run: FleetRun) -> None:
        """A run starts."""
        self._title, self._run, self._best = title, run, (-1, -1)

    def show(self, snapshot: Snapshot) -> None:
        """Draw the engine as it is now."""
        assert self._run is not None
        if self._live is not None:
            room = max(4, self.console.height - CHROME_LINES)
            self._live.update(fleet_view(self._title, snapshot, self._run, room), refresh=True)
        if self._keep and snapshot.variety > self._best and self._run.with_tool:
            self._best = snapshot.variety
            self.kept = fleet_view(self._title, snapshot, self._run, len(self._run.fleet))

    def end(self, title: str, outcome: Outcome) -> None:
        """A run is over."""
        self.console.print(
            Text.assemble(
                (f"{title:<17}", "bold"),
                f" {outcome.wall_s:6.1f} s  {outcome.tokens_computed:>8,} tokens computed  ",
                f"{outcome.answers_right} of {outcome.answers_total} right",
            )
        )


def fleet_view(title: str, snapshot: Snapshot, run: FleetRun, max_rows: int) -> RenderableType:
    """The pool, a row for each agent, and the running account."""
    heading = Text.assemble(("policy ", "dim"), (title, "bold")) if run.with_tool else Text(title, "bold")
    table = Table(box=None, padding=(0, 1, 0, 0), expand=True, show_edge=False)
    table.add_column("agent", justify="right", style="dim", no_wrap=True)
    table.add_column("state", no_wrap=True, width=9)
    table.add_column("waits for", no_wrap=True, width=15)
    table.add_column("since", justify="right", no_wrap=True, width=5)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("done", justify="right", no_wrap=True)
    table.add_column("keep", justify="right", no_wrap=True, width=5)
    table.add_column("swap", justify="right", no_wrap=True, width=6)
    table.add_column("drop", justify="right", no_wrap=True, width=5)
    table.add_column("last decision and why", no_wrap=True, overflow="ellipsis", ratio=1)
    for agent in run.fleet[:max_rows]:
        row = snapshot.rows.get(agent.number)
        answered = f"{run.answered(agent.number)}/{len(agent.tasks)}"
        if row is None:
            state = "done" if run.answered(agent.number) else "starting"
            table.add_row(str(agent.number), Text(state, STYLES[state]), "", "", "", answered)
        else:
            table.add_row(str(agent.number), *_cells(row, answered))
    parts: list[RenderableType] = [heading, pool_bar(snapshot.pool), table]
    hidden = len(run.fleet) - max_rows
    if hidden > 0:
        parts.append(Text(f"... and {hidden} more; a taller window shows them", "dim"))
    parts.append(
        Text(
            f"recomputed {snapshot.tokens_recomputed:,} tokens, swapped {megabytes(snapshot.bytes_swapped)}, "
            f"waste {snapshot.waste_token_s:,.0f}; keep, swap, drop and waste in token-seconds",
            "dim",
        )
    )
    return Group(*parts)


def _cells(row: ContextRow, answered: str) -> list[RenderableType]:
    cells: list[RenderableType] = [
        Text(row.state, STYLES.get(row.state, "")),
        Text(row.tool),
        f"{row.elapsed_s:.1f}s" if row.tool else "",
        f"{row.num_tokens:,}",
        answered,
    ]
    decision = row.decision
    if decision is None:
        return cells
    costs = decision.costs
    style = "" if row.fresh else "dim"
    cells += [Text(_short(cost), style) for cost in (costs.preserve_token_s, costs.swap_token_s, costs.discard_token_s)]
    cells.append(
        Text.assemble(
            (SHORT[decision.action.value], "bold" if row.fresh else "dim"), ": ", decision.reason, style=style
        )
    )
    return cells


def pool_bar(pool: PoolView) -> Text:
    """The device pool as a bar: running, preserved, cached, free."""
    parts = (
        ("running", pool.running, "green", "█"),
        ("preserved", pool.preserved, "cyan", "▓"),
        ("cached", pool.cached, "magenta", "▒"),
        ("free", pool.free, "dim", "░"),
    )
    text = Text("KV ")
    drawn, seen = 0, 0
    for _, pages, style, char in parts:
        seen += pages
        width = round(BAR_CHARS * seen / max(1, pool.total)) - drawn
        text.append(char * width, style)
        drawn += width
    text.append(f" {pool.total * pool.page_size:,} tokens")
    for name, pages, style, char in parts:
        text.append(f"  {char} ", style)
        text.append(f"{name} {100 * pages / max(1, pool.total):.0f}%")
    return text


def report_view(report: Report, *, trace: Path | None) -> RenderableType:
    """The final table with what belongs below it."""
    lines: list[RenderableType] = [_table(report)]
    unaided = report.unaided
    if unaided is not None:
        lines.append(
            Text.assemble(
                "Without the tool the same model answers ",
                (f"{unaided.answers_right} of {unaided.answers_total}", "bold"),
                " of the same questions.",
            )
        )
    if len(report.outcomes) > 1:
        same = "The answers are the same, word for word, under every policy."
        lines.append(Text(same if report.same_answers else "The answers differ between policies.", ""))
    lines += [Text(f"failed: {line}", "red") for line in report.failures]
    if trace is not None:
        lines.append(
            Text.assemble("Who ran, waited and moved when: open ", (str(trace), "bold"), " at https://ui.perfetto.dev")
        )
    lines.append(Text.assemble(("next: ", "bold"), "caesura chat"))
    return Group(*lines)


Column = tuple[str, Callable[[Outcome], float], Callable[[Outcome], str], bool]


def _columns() -> list[Column]:
    """Heading, value, text, and whether less is better."""
    return [
        ("wall time", lambda o: o.wall_s, lambda o: f"{o.wall_s:.1f} s", True),
        ("computed", lambda o: o.tokens_computed, lambda o: f"{o.tokens_computed:,}", True),
        ("recomputed", lambda o: o.tokens_recomputed, lambda o: f"{o.tokens_recomputed:,}", True),
        ("swapped", lambda o: o.bytes_swapped, lambda o: megabytes(o.bytes_swapped), True),
        ("waste", lambda o: o.waste_token_s, lambda o: f"{o.waste_token_s:,.0f}", True),
        ("right", lambda o: o.answers_right, lambda o: f"{o.answers_right}/{o.answers_total}", False),
    ]


def _table(report: Report) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{report.agents} agents, one KV pool of {report.pool_tokens:,} tokens",
        title_justify="left",
        caption="tokens, token-seconds of waste, ratios to the first row; one run each, so near ties are noise",
        caption_justify="left",
        padding=(0, 1, 0, 0),
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("policy", style="bold", no_wrap=True)
    columns = _columns()
    for heading, *_ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    outcomes = list(report.outcomes.values())
    if not outcomes:
        return table
    baseline = outcomes[0]
    for name, outcome in report.outcomes.items():
        cells: list[Any] = []
        for heading, value, text, less in columns:
            values = [value(other) for other in outcomes]
            best = value(outcome) == (min(values) if less else max(values)) and min(values) != max(values)
            cell = Text(text(outcome), "bold green" if best else "")
            if heading in ("wall time", "waste") and outcome is not baseline and value(baseline) > 0:
                cell.append(f" {value(outcome) / value(baseline):.2f}x", "dim")
            cells.append(cell)
        table.add_row(name, *cells)
    return table


def megabytes(count: int) -> str:
    """Bytes in MB, or kB below one."""
    return f"{count / 1e6:,.0f} MB" if count >= 1e6 or not count else f"{count / 1e3:,.0f} kB"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 0.1 else f"{value:.3f}"
