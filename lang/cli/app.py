"""The commands and their options. What they do is imported when they run, so that ``--help`` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from caesura.lang.cli.output import POLICY_HELP, guarded
from caesura.lang.cli.serve_command import serve

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
Url = Annotated[
    str | None,
    typer.Option(
        help="A server instead of an engine here: http://..., openai+http://... or sglang+http://...; its key comes "
        "from CAESURA_API_KEY, OPENAI_API_KEY or SGLANG_API_KEY."
    ),
]


@app.callback(invoke_without_command=True)
def caesura(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Programs that pause at tool calls, and a runtime that knows what to do with their KV meanwhile."""
    if version:
        from importlib.metadata import version as version_of

        typer.echo(f"caesura {version_of('caesura')}")
        raise typer.Exit


@app.command()
@guarded
def demo(
    agents: Annotated[int, typer.Option(min=1, max=200, help="Agents in the fleet.")] = 24,
    seed: Annotated[int, typer.Option(help="Seed of questions and tool durations.")] = 0,
    policies: Annotated[str, typer.Option(help="Pause policies to compare, in this order.")] = (
        "discard,lru,infercept,min_waste"
    ),
    trace: Annotated[Path, typer.Option(help="Where to write the trace for Perfetto.")] = Path("trace.json"),
    svg: Annotated[Path | None, typer.Option(help="Also draw the demo into this SVG file.")] = None,
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


@app.command()
@guarded
def run(
    target: Annotated[str, typer.Argument(metavar="FILE[:PROGRAM]", help="A Python file with an @function program.")],
    model: Annotated[str | None, typer.Option(help="Checkpoint folder or hub id; embedded by default.")] = None,
    policy: Annotated[str | None, typer.Option(help=POLICY_HELP)] = None,
    url: Url = None,
    arg: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="An argument; repeatable.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature where the program has none.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it is generated.")] = False,
    record: Annotated[Path | None, typer.Option(help="Write the run to this JSONL file.")] = None,
    replay: Annotated[
        Path | None, typer.Option(help="Repeat the run of this file: no model and no tool runs, any difference fails.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on with the run of this file, or begin it; run the same command again after a stop."),
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="What happened when: into a .html or .json (Perfetto) file, or -."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a program on the engine, or on a server, and print what it wrote."""
    from caesura.lang.cli.run_command import choose_tape, run_command

    run_command(
        target,
        model=model,
        policy=policy,
        url=url,
        arguments=arg or (),
        temperature=temperature,
        stream=stream,
        tape=choose_tape(record=record, replay=replay, resume=resume),
        trace=trace,
        as_json=as_json,
    )


@app.command()
@guarded
def chat(
    model: Annotated[str | None, typer.Option(help="Checkpoint folder or hub id; embedded by default.")] = None,
    url: Url = None,
    system: Annotated[str, typer.Option(help="System prompt.")] = "",
    no_tools: Annotated[
        bool, typer.Option("--no-tools", help="Without the calculator that the embedded model has.")
    ] = False,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature.")] = None,
    as_json: Json = False,
) -> None:
    """Talk to a model. Reads standard input when that is no terminal."""
    from caesura.lang.cli.chat_command import chat_command

    chat_command(
        model=model,
        url=url,
        system_text=system,
        with_tools=not no_tools,
        temperature=temperature,
        as_json=as_json,
    )


@app.command()
@guarded
def doctor(
    model: Annotated[str | None, typer.Option(help="Checkpoint folder or hub id; embedded by default.")] = None,
    as_json: Json = False,
) -> None:
    """Check this machine, the installation, the model and the measured costs."""
    from caesura.lang.cli.doctor_command import doctor_command

    doctor_command(model=model, as_json=as_json)


@app.command()
@guarded
def simulate(
    workload: Annotated[str, typer.Argument(help="A workload by name, for example mix, or a trace file.")],
    policy: Annotated[str | None, typer.Option(help=POLICY_HELP)] = None,
    rate: Annotated[float | None, typer.Option(help="Requests per second.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Simulated minutes.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of programs and arrivals.")] = None,
    profile: Annotated[str | None, typer.Option(help="The machine: gptj-6b-a100, 13b-2a100, ... or a file.")] = None,
    kv_tokens: Annotated[int | None, typer.Option(help="Tokens the device pool holds.")] = None,
    host_tokens: Annotated[int | None, typer.Option(help="Tokens the host pool holds.")] = None,
    as_json: Json = False,
) -> None:
    """A workload under a pause policy in virtual time: the engine's own loop on a cost profile."""
    from caesura.lang.cli.simulate_command import simulate_command

    options = {"policy": policy, "rate": rate, "minutes": minutes, "seed": seed, "profile": profile}
    simulate_command(workload, {**options, "kv_tokens": kv_tokens, "host_tokens": host_tokens}, as_json=as_json)


@app.command(name="eval")
@guarded
def evaluate(
    what: Annotated[str, typer.Argument(help="What to evaluate: embedded.")],
    model: Annotated[str | None, typer.Option(help="A checkpoint folder in place of the embedded one.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the tasks.")] = 0,
    tasks: Annotated[int, typer.Option(min=1, max=100_000, help="Tasks, each with and without its tools.")] = 1000,
    as_json: Json = False,
) -> None:
    """How many held-out tasks the embedded model solves, by skill, with its tools and without."""
    from caesura.lang.cli.eval_command import eval_command

    eval_command(what, model=model, seed=seed, tasks=tasks, as_json=as_json)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@guarded
def bench(
    context: typer.Context,
    what: Annotated[str, typer.Argument(help="Which benchmark, for example engine or pause.")],
) -> None:
    """Run a benchmark of the repository; what follows its name (--quick, --json FILE, -- --help) goes to it."""
    from caesura.lang.cli.bench_command import bench_command

    bench_command(what, context.args)


app.command()(guarded(serve))
config_app = typer.Typer(help="The server's settings.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(config_app, name="config")


@config_app.command("show", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@guarded
def config_show(
    context: typer.Context,
    style: Annotated[str, typer.Option("--format", help="table, json, or toml for --config.")] = "table",
    as_json: Json = False,
) -> None:
    """Every setting, its value and where that came from; with the options that caesura serve has."""
    from caesura.lang.cli.config_command import config_show

    config_show(context.args, serve, "json" if as_json else style)


@app.command()
@guarded
def top(
    url: Annotated[str, typer.Option(envvar="CAESURA_URL", help="The server.")] = "http://127.0.0.1:30000",
    key: Annotated[
        str | None,
        typer.Option(envvar=["CAESURA_API_KEY", "CAESURA_KEY"], help="An API key, where the server wants one."),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one view and leave.")] = False,
    as_json: Json = False,
) -> None:
    """Watch a running server: contexts, memory, decisions, tools."""
    from caesura.lang.cli.top_command import top_command

    top_command(url=url, key=key, once=once, as_json=as_json)
