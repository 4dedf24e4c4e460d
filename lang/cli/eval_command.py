"""``caesura eval``: how well a model does on generated tasks that it has not seen."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from caesura.lang.cli.output import CliError, print_json, stdout

if TYPE_CHECKING:
    from caesura.runtime.embedded.examine import Tally

KV_TOKENS = 1 << 16


def eval_command(what: str, *, model: str | None, seed: int, tasks: int, as_json: bool) -> None:
    """Run the evaluation and print what came out; a progress bar meanwhile on a terminal."""
    if what != "embedded":
        raise CliError(f"there is no evaluation {what!r}; there is: embedded", "caesura eval embedded")
    from caesura.runtime.config import EMBEDDED, EngineConfig
    from caesura.runtime.embedded.examine import Terms, examine
    from caesura.runtime.service import EngineService

    with (
        EngineService.start(EngineConfig(model=model or EMBEDDED, kv_tokens=KV_TOKENS)) as service,
        _Bar(len(Terms) * tasks, quiet=as_json) as bar,
    ):
        report = asyncio.run(examine(service, seed, tasks, progress=bar.advance))
    found = {
        "with_tools": _counts(report.tallies[Terms.HELD]),
        "without_tools": _counts(report.tallies[Terms.ALONE]),
        "skills": {skill: _counts(each) for skill, each in report.skills.items()},
        "without_grammar": _counts(report.tallies[Terms.FREE]),
        "tool_calls": report.free_calls,
        "malformed_calls": report.malformed_calls,
    }
    if as_json:
        print_json(found)
    else:
        _print_table(found)


def _counts(tally: Tally) -> dict[str, int]:
    return {"right": tally.right, "total": tally.total}


def _print_table(found: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("tasks", "right", "of", "share")
    named = ("with_tools", "without_grammar", "without_tools")
    rows = {**{name.replace("_", " "): found[name] for name in named}, **found["skills"]}
    for name, tally in rows.items():
        share = tally["right"] / max(1, tally["total"])
        table.add_row(name, str(tally["right"]), str(tally["total"]), f"{share:.1%}")
    console = stdout()
    console.print(table)
    console.print(f"{found['malformed_calls']} of {found['tool_calls']} tool calls were malformed, without a grammar.")


class _Bar:
    """A progress bar on standard error."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        from caesura.lang.cli.output import stderr
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("tasks"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=stderr(), disable=quiet, transient=True)
        self._task = self._progress.add_task("tasks", total=total)

    def advance(self) -> None:
        self._progress.advance(self._task)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
