"""``caesura run``: the program on the engine, its text with roles and tool calls, or JSON."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Literal

from caesura.lang.backend import Backend
from caesura.lang.cli.output import USAGE, CliError, print_json, stderr, stdout
from caesura.lang.cli.program_file import (
    choose_program,
    load_programs,
    parse_arguments,
    program_failure,
    split_target,
)
from caesura.lang.errors import ProgramError
from caesura.lang.printable import printable
from caesura.lang.state import ProgramState
from rich.console import Console
from rich.text import Text

ROLE_STYLES = {"system": "dim", "user": "bold cyan", "assistant": "bold green", "tool": "bold magenta"}


TapeKind = Literal["record", "replay", "resume"]
TapeChoice = tuple[TapeKind, Path]


def choose_tape(*, record: Path | None, replay: Path | None, resume: Path | None) -> TapeChoice | None:
    """The one of the options that was given. Raises CliError for several."""
    options: dict[TapeKind, Path | None] = {"record": record, "replay": replay, "resume": resume}
    given = [(kind, path) for kind, path in options.items() if path is not None]
    if len(given) > 1:
        raise CliError("--record, --replay and --resume do not go together", "caesura run --help", USAGE)
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
    if trace is not None and trace != "-" and Path(trace).suffix not in (".html", ".json"):
        raise CliError(f"--trace is {trace!r}; it must end in .html or .json, or be -", "caesura run --help", USAGE)
    path, name = split_target(target)
    program = choose_program(path, load_programs(path), name)
    values = parse_arguments(program, arguments, target)
    options: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
    with start_taped(model, policy, url, tape) as backend:
        state = program.run(**values, **options, backend=backend, stream=stream)
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
        finally:  # of a failed program above all
            if trace is not None:
                _show_trace(state, trace)
        if as_json:
            print_json(as_document(state))
        elif not stream:
            show(state, stdout())


def _show_trace(state: ProgramState, where: str) -> None:
    if where == "-":
        stderr().print(state.trace().tree())
        return
    try:
        state.trace().save(where)
    except OSError as error:
        raise CliError(f"{where} cannot be written: {error.strerror}", "caesura run ... --trace -") from None


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
    """The turns with their roles, or the plain text of a program without roles; then what it took."""
    messages = state.messages()
    if messages:
        for message in messages:
            _show_message(message, console)
    else:
        console.print(Text(printable(state.text())), soft_wrap=True)
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
