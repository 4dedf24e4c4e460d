"""The commands and their options. What they do is imported when they run, so that ``--help`` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from caesura.lang.cli.output import guarded

app = typer.Typer(
    name="caesura",
    help="Programs that pause at tool calls, and a runtime that knows what to do with their KV meanwhile.",
    epilog="Exit codes: 0 done, 1 the program failed, 2 wrong usage or input, 3 model or engine cannot start.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


@app.callback()
def caesura(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Programs that pause at tool calls, and a runtime that knows what to do with their KV meanwhile."""


@app.command()
@guarded
def demo(
    agents: Annotated[int, typer.Option(min=1, max=200, help="Agents in the fleet.")] = 24,
    seed: Annotated[int, typer.Option(help="Seed of questions and tool durations.")] = 0,
    policies: Annotated[str, typer.Option(help="Pause policies to compare, in this order.")] = (
        "discard,lru,infercept,min_waste"
    ),
    trace: Annotated[Path, typer.Option(help="Where to write the trace for Perfetto.")] = Path("trace.json"),
    svg: Annotated[Optional[Path], typer.Option(help="Also draw the demo into this SVG file.")] = None,  # noqa: UP045
    no_live: Annotated[bool, typer.Option("--no-live", help="No live view, only results.")] = False,
    as_json: Json = False,
) -> None:
    """A fleet of agents on the embedded model, under several pause policies, in too little KV memory."""
    from caesura.lang.cli.demo import parse_policies
    from caesura.lang.cli.demo_command import demo_command

    demo_command(
        agents=agents,
        seed=seed,
        policies=parse_policies(policies),
        trace=trace,
        svg=svg,
        live=not no_live,
        as_json=as_json,
    )
