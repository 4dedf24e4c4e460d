"""``caesura run FILE``: find the program in a Python file, parse its arguments, run it, show what it wrote."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from caesura.lang.cli.output import FAILED, NO_ENGINE, USAGE, CliError
from caesura.lang.errors import ProgramError, ServerUnavailable
from caesura.lang.program import Program

NOT_GIVEN = inspect.Parameter.empty
UNNAMED: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def split_target(target: str) -> tuple[Path, str | None]:
    """``FILE`` or ``FILE:program``. Raises CliError when there is no such file."""
    path, name = Path(target), None
    if not path.exists() and ":" in target:
        file, _, name = target.rpartition(":")
        path = Path(file)
    if not path.is_file():
        why = "is a folder" if path.is_dir() else "does not exist"
        raise CliError(f"{path} {why}; give a Python file with an @function program", "ls *.py", USAGE)
    return path, name or None


def load_programs(path: Path) -> dict[str, Program]:
    """The programs a file defines, by the names they have there. Raises CliError when it cannot be imported."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as for `python FILE`, so that it can import its neighbours
    spec = importlib.util.spec_from_file_location(f"caesura_run_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise CliError(f"{path} is no Python file", "caesura run FILE.py", USAGE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        place = f"{Path(error.filename or path).name}, line {error.lineno}"
        raise CliError(f"{place}: {error.msg}", f"python -m py_compile {path}", USAGE) from None
    except (Exception, SystemExit) as error:
        raise CliError(
            f"{path} failed while it was read: {type(error).__name__}: {error}",
            f"python {path}",
            FAILED,
            user_traceback(error),
        ) from None
    found = {name: value for name, value in vars(module).items() if isinstance(value, Program)}
    own = {name: value for name, value in found.items() if value.func.__module__ == spec.name}
    return own or found


def choose_program(path: Path, programs: Mapping[str, Program], name: str | None) -> Program:
    """The named program, or the only one. Raises CliError that lists what there is."""
    if not programs:
        raise CliError(
            f"{path} has no program; decorate one with @function (from caesura.lang import function)",
            "caesura run --help",
            USAGE,
        )
    names = ", ".join(programs)
    if name is not None:
        if name not in programs:
            raise CliError(
                f"{path} has no program {name!r}; there are: {names}", f"caesura run {path}:{_first(programs)}"
            )
        return programs[name]
    if len(programs) > 1:
        raise CliError(f"{path} has several programs: {names}; name one", f"caesura run {path}:{_first(programs)}")
    return programs[_first(programs)]


def _first(programs: Mapping[str, Program]) -> str:
    return next(iter(programs))


def parse_arguments(program: Program, given: Sequence[str], target: str) -> dict[str, Any]:
    """``k=v`` pairs as the program's annotations want them. Raises CliError with the signature."""
    hints = _hints(program)
    parameters = {parameter.name: parameter for parameter in program.own_parameters}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    signature = f"{program.name}({', '.join(_shown(parameter) for parameter in parameters.values())})"
    values: dict[str, Any] = {}
    for pair in given:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise CliError(f"--arg is {pair!r}; it must read name=value", _example(program, target))
        known = key in parameters and parameters[key].kind not in UNNAMED
        if not known and not takes_any:
            raise CliError(f"the program takes no argument {key!r}; it is {signature}", _example(program, target))
        values[key] = _parse(key, text, hints.get(key, str), program, target)
    missing = [name for name in _needed(program) if name not in values]
    if missing:
        raise CliError(f"missing {', '.join(missing)}; the program is {signature}", _example(program, target))
    return values


def _hints(program: Program) -> dict[str, Any]:
    try:
        return get_type_hints(program.func)
    except Exception:  # a name only known to type checkers: arguments stay text
        return {}


def _parse(key: str, text: str, kind: Any, program: Program, target: str) -> Any:
    if kind in (str, Any, NOT_GIVEN):
        return text
    from pydantic import PydanticUserError, TypeAdapter, ValidationError

    try:
        adapter: TypeAdapter[Any] = TypeAdapter(kind)
    except PydanticUserError:
        return text
    try:
        return adapter.validate_python(text)
    except ValidationError as first:
        try:
            return adapter.validate_json(text)
        except ValidationError:
            message = first.errors(include_url=False)[0]["msg"]
            name = getattr(kind, "__name__", str(kind))
            raise CliError(
                f"argument {key} is {text!r}, which is no {name}: {message}", _example(program, target)
            ) from None


def _shown(parameter: inspect.Parameter) -> str:
    annotation = parameter.annotation
    kind = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    name = UNNAMED.get(parameter.kind, "") + parameter.name
    shown = name if annotation is NOT_GIVEN else f"{name}: {kind}"
    return shown if parameter.default is NOT_GIVEN else f"{shown} = {parameter.default!r}"


def _example(program: Program, target: str) -> str:
    return " ".join(["caesura run", target, *(f"--arg {name}=..." for name in _needed(program))])


def _needed(program: Program) -> list[str]:
    return [
        parameter.name
        for parameter in program.own_parameters
        if parameter.default is NOT_GIVEN and parameter.kind not in UNNAMED and parameter.name not in program.bound
    ]


def program_failure(error: ProgramError, target: str) -> CliError:
    """The message and the user's own lines of a failed program. A server that is not there is not its fault."""
    if isinstance(error.root, ServerUnavailable):
        return CliError(str(error.root), "caesura serve", NO_ENGINE)
    return CliError(str(error), f"caesura run {target} --help", FAILED, user_traceback(error.root))


def user_traceback(error: BaseException) -> str:
    """The lines of a traceback that lie in the user's files: neither here nor in installed packages."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    return "".join(traceback.format_list(frames))


def _is_users(filename: str) -> bool:
    if filename.startswith("<"):
        return False
    path = Path(filename).resolve()
    ours = Path(__file__).resolve().parents[1]
    roots = [ours, ours.parent / "runtime", ours.parent / "scheduler", Path(inspect.__file__).resolve().parent]
    return not any(path.is_relative_to(root) for root in roots) and "site-packages" not in path.parts
