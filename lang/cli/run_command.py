"""``caesura run``: the program on the engine, its text with roles and tool calls, or JSON."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Literal

from caesura.lang.backend import Backend
from caesura.lang.cli.output import (
    USAGE,
    CliError,
    cannot_write,
    check_writable,
    print_json,
    report,
    stderr,
    stdout,
)
from caesura.lang.cli.program_file import (
    choose_program,
    load_programs,
    parse_arguments,
    program_failure,
    split_target,
)
from caesura.lang.errors import ProgramError
from caesura.lang.printable import printable
from caesura.lang.program import Program
from caesura.lang.state import ProgramState
from rich.console import Console
from rich.text import Text

ROLE_STYLES = {"system": "dim", "user": "bold cyan", "assistant": "bold green", "tool": "bold magenta"}
INSTEAD_OF_TRACE = "caesura run ... --trace -"


TapeKind = Literal["record", "replay", "resume"]
TapeChoice = tuple[TapeKind, Path]


def choose_tape(*, record: Path | None, replay: Path | None, resume: Path | None) -> TapeChoice | None:
    """The one of the options that was given. Raises CliError for several, and for what no run can be written to."""
    options: dict[TapeKind, Path | None] = {"record": record, "replay": replay, "resume": resume}
    given = [(kind, path) for kind, path in options.items() if path is not None]
    if len(given) > 1:
        raise CliError("--record, --replay and --resume do not go together", "caesura run --help", USAGE)
    for kind, path in given:
        if kind != "replay" and path.exists() and not path.is_file():
            raise CliError(f"{path} is no file that a run is written to", f"caesura run FILE --{kind} run.jsonl")
    return given[0] if given else None


def run_command(
    target: str,
    *,
    model: str | None,
    policy: str | None,
    url: str | None = None,
    arguments: Sequence[str],
    temperature: float | None,
    stream: bool,
    tape: TapeChoice | None = None,
    trace: str | None = None,
    as_json: bool,
) -> None:
    """Find, run and show a program. Raises CliError; the engine's errors pass through."""
    _check_trace(trace)
    path, name = split_target(target)
    program = choose_program(path, load_programs(path), name)
    values = parse_arguments(program, arguments, target)
    options: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
    _check_names(program, {"backend", "stream", *options})
    with start_taped(model, policy, url, tape) as backend:
        state = program.run(**values, **options, backend=backend, stream=stream)
        with _traced(state, trace):
            try:
                if stream and not as_json:
                    _stream(state, stdout())
                state.sync()
            except ProgramError as error:
                raise program_failure(error, target) from error
            except KeyboardInterrupt:
                state.cancel()
                state.error()
                raise
            if as_json:
                print_json(as_document(state))
            elif not stream:
                show(state, stdout())


def _check_names(program: Program, taken: set[str]) -> None:
    both = sorted(taken & {parameter.name for parameter in program.own_parameters})
    if both:
        told = f"{program.name} has a parameter {both[0]!r}, which is the name of an option of every run"
        raise CliError(f"{told}; give the parameter another name", "caesura run --help", USAGE)


def _check_trace(where: str | None) -> None:
    if where is None or where == "-":
        return
    if Path(where).suffix not in (".html", ".json"):
        raise CliError(f"--trace is {where!r}; it must end in .html or .json, or be -", "caesura run --help", USAGE)
    check_writable(Path(where), INSTEAD_OF_TRACE)


@contextlib.contextmanager
def _traced(state: ProgramState, where: str | None) -> Iterator[None]:
    """Show the trace in the end, of a failed program above all. A trace that fails, too, does not hide why it did."""
    try:
        yield
    except BaseException:
        try:
            _show_trace(state, where)
        except CliError as error:
            report(error)
        raise
    _show_trace(state, where)


def _show_trace(state: ProgramState, where: str | None) -> None:
    if where == "-":
        stderr().print(state.trace().tree())
    elif where is not None:
        try:
            state.trace().save(where)
        except OSError as error:
            raise cannot_write(Path(where), error, INSTEAD_OF_TRACE) from None


def start_engine(model: str | None, policy: str | None) -> Any:
    """An engine backend; a context manager that stops it."""
    from caesura.lang.backends.engine import EngineBackend

    options = {} if policy is None else {"policy": policy}
    return EngineBackend.start(model, **options)


def start_backend(model: str | None, policy: str | None, url: str | None) -> Any:
    """A backend for the server at ``url``, or an engine; a context manager that ends it. Raises CliError when options
    do not go together, DefinitionError for an address of another shape."""
    if url is None:
        return start_engine(model, policy)
    from caesura.lang.backends.connect import connect, split_address

    kind, _, _ = split_address(url)
    if policy is not None:
        raise CliError("--policy is the server's affair when there is a --url", "caesura serve --policy ...")
    if model is not None and kind != "openai":
        raise CliError("--model goes with a --url of openai+http://... only; other servers serve one", "caesura serve")
    return connect(url, **({} if model is None else {"model": model}))


@contextlib.contextmanager
def start_taped(model: str | None, policy: str | None, url: str | None, tape: TapeChoice | None) -> Iterator[Backend]:
    """A backend as `start_backend` gives it, behind a recording if there is one. A replay starts none."""
    from caesura.lang import durable, record, replay

    if tape is None:
        with start_backend(model, policy, url) as backend:
            yield backend
        return
    kind, path = tape
    if kind == "replay":
        if any((model, policy, url)):
            raise CliError(
                "--replay runs no model; --model, --policy and --url do not go with it",
                f"caesura run FILE --replay {path}",
            )
        with replay(path, strict=True) as backend:
            yield backend
        return
    make = record if kind == "record" else durable
    with start_backend(model, policy, url) as live, make(live, path) as backend:
        yield backend


def as_document(state: ProgramState) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "text": state.text(),
        "variables": state.variables,
        "usage": asdict(state.usage()),
        "decisions": [
            asdict(item) if is_dataclass(item) and not isinstance(item, type) else str(item)
            for item in state.decisions()
        ],
    }


def _stream(state: ProgramState, console: Console) -> None:
    for text in state.text_iter():
        console.print(Text(printable(text)), end="", soft_wrap=True)
    console.print()


def show(state: ProgramState, console: Console) -> None:
    """The turns with their roles and the plain text around them; then what it took."""
    for part in _parts(state):
        if isinstance(part, str):
            console.print(Text(printable(part)), soft_wrap=True)
        else:
            _show_message(part, console)
    if state.ret_value is not None:
        console.print(Text.assemble(("returned: ", "bold"), printable(str(state.ret_value))), soft_wrap=True)
    usage = state.usage()
    decided = [str(item.action.value) for item in state.decisions() if hasattr(item, "action")]
    parts = [f"{usage.generations} generations", f"{usage.completion_tokens} tokens"]
    if usage.tool_calls:
        parts.append(f"{usage.tool_calls} tool calls in {usage.tool_s:.2f} s")
    if decided:
        parts.append(f"KV while paused: {', '.join(decided)}")
    console.print(Text(f"[{', '.join(parts)}]", "dim"))


def _parts(state: ProgramState) -> Iterator[Mapping[str, Any] | str]:
    """The messages, and what stands between them."""
    messages = iter(state.messages())
    outside, plain = True, ""
    for segment in state.core.log:
        if segment.marker is None:
            plain += segment.text if outside else ""
            continue
        if plain.strip():
            yield plain
        outside, plain = segment.marker == "close", ""
        if outside or segment.calls:  # calls end a turn as well, and a result follows each
            yield from itertools.islice(messages, 1 + len(segment.calls))
    yield from messages
    if plain.strip():
        yield plain


def _show_message(message: Mapping[str, Any], console: Console) -> None:
    role = str(message["role"])
    label = f"{role} {message['name']}" if role == "tool" and "name" in message else role
    content = str(message.get("content") or "")
    if content:
        told = Text.assemble((f"{printable(label)}: ", ROLE_STYLES.get(role, "bold")), printable(content))
        console.print(told, soft_wrap=True)
    for call in message.get("tool_calls") or ():
        function = call["function"]
        console.print(
            Text.assemble(
                (f"{role} calls: ", ROLE_STYLES.get(role, "bold")),
                printable(f"{function['name']}({call_arguments(function['arguments'])})"),
            ),
            soft_wrap=True,
        )


def call_arguments(arguments: str) -> str:
    """JSON arguments as one would write them in Python."""
    try:
        values = json.loads(arguments)
        return ", ".join(f"{key}={value!r}" for key, value in values.items())
    except (ValueError, AttributeError):
        return arguments
