"""``caesura config show``: every setting of the server, its value, and where that came from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import typer
from caesura.lang.cli.output import CliError, print_json, stdout
from caesura.lang.cli.serve_command import resolve

if TYPE_CHECKING:
    from caesura.runtime.server.settings import Setting

FORMATS = ("table", "json", "toml")


def config_show(arguments: Sequence[str], serve: Callable[..., None], style: str) -> None:
    """Show what ``caesura serve`` with these arguments would use. Secrets are not told."""
    if style not in FORMATS:
        raise CliError(f"format is {style!r}; it must be one of {', '.join(FORMATS)}", "caesura config show --help")
    flags = _parsed(arguments, serve)
    settings = resolve(flags, flags.pop("config")).settings
    if style == "json":
        print_json({one.name: {"value": one.shown, "source": one.source} for one in settings})
    elif style == "toml":
        from caesura.runtime.server.settings import as_toml

        sys.stdout.write(as_toml(settings))
    else:
        stdout().print(_table(settings))


def _parsed(arguments: Sequence[str], serve: Callable[..., None]) -> dict[str, Any]:
    """The arguments as ``caesura serve`` reads them."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(serve)
    command = typer.main.get_command(app)
    return dict(command.make_context("caesura serve", list(arguments)).params)


def _table(settings: Sequence[Setting]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table("setting", "value", "from", box=None, pad_edge=False)
    for one in settings:
        plain = one.source == "default"
        value = "" if one.value is None else ", ".join(one.shown) if isinstance(one.shown, list) else str(one.shown)
        table.add_row(one.name, Text(value), Text(one.source), style="dim" if plain else "bold")
    return table
