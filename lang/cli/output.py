"""How the command line speaks: consoles, JSON, and errors that end with the next command to try.

Exit codes: 0 done, 1 the program failed, 2 wrong usage or input, 3 the model or engine cannot start,
130 interrupted.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

from caesura.lang.printable import printable

POLICY_HELP = (  # spelled out, so that --help need not import them
    "Pause policy, or POLICY+ESTIMATOR. Policies: min_waste (default), discard, improved_discard, preserve, swap, "
    "swap_blocking, lru, lru_host, session_refs, admission_only, infercept, infercept_oracle, infercept_profiled, "
    "lamps, augserve, continuum, thunderagent, oracle. "
    "Estimators: elapsed, profiled, conditional, hint, progress, oracle."
)
SURROGATES = re.compile("[\ud800-\udfff]")
P = ParamSpec("P")
T = TypeVar("T")

FAILED, USAGE, NO_ENGINE, INTERRUPTED = 1, 2, 3, 130


class CliError(Exception):
    """What went wrong, in one sentence; ``next_command`` is what to try; ``code`` is the exit code."""

    def __init__(self, message: str, next_command: str, code: int = USAGE, details: str = "") -> None:
        super().__init__(message)
        self.next_command = next_command
        self.code = code
        self.details = details


def stdout() -> Any:
    """A console on standard output: styled on a terminal (NO_COLOR respected), plain text elsewhere."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def stderr() -> Any:
    """The same on standard error."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


def print_json(value: Any) -> None:
    """One JSON document on standard output; what JSON cannot say is shown as text, a number that is none as null."""
    ensure_ascii = not str(sys.stdout.encoding).lower().startswith("utf")
    sys.stdout.write(json.dumps(_sayable(value), indent=2, ensure_ascii=ensure_ascii) + "\n")
    sys.stdout.flush()


def _sayable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_sayable(_key(name)): _sayable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_sayable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, int):
        return value
    return SURROGATES.sub("\N{REPLACEMENT CHARACTER}", value if isinstance(value, str) else str(value))


def _key(name: Any) -> Any:
    return name if isinstance(name, int | float | None) else str(name)


def check_writable(path: Path, next_command: str, *, folders: bool = False) -> None:
    """Say so before the work, not after it. Raises CliError; a file that was not there is not there afterwards.
    ``folders``: those of ``path`` are made."""
    is_new = not os.path.lexists(path)
    try:
        if folders:
            path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        if is_new:
            path.unlink()
    except OSError as error:
        raise cannot_write(path, error, next_command) from None


def cannot_write(path: Path, error: OSError, next_command: str) -> CliError:
    """The error of a file that was to be written."""
    return CliError(f"cannot write {path}: {error.strerror or error}", next_command, USAGE)


def report(error: CliError) -> None:
    """Print the error, and what to try."""
    from rich.text import Text

    console = stderr()
    if error.details:
        console.print(Text(printable(error.details.rstrip())))
    console.print(Text.assemble(("error: ", "bold red"), printable(str(error))))
    console.print(Text.assemble(("try: ", "bold"), printable(error.next_command)))


def fail(error: CliError) -> NoReturn:
    """Print the error and leave with its code."""
    report(error)
    raise SystemExit(error.code)


def guarded(command: Callable[P, T]) -> Callable[P, T]:
    """Turn what users can cause into messages. Bugs of ours keep their traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        from caesura.lang.errors import LangError
        from caesura.runtime.errors import BrokenInvariant, CaesuraError

        try:
            return command(*args, **kwargs)
        except CliError as error:
            fail(error)
        except BrokenInvariant:
            raise
        except (CaesuraError, LangError) as error:
            fail(as_cli_error(error))
        except KeyboardInterrupt:
            stderr().print("interrupted")
            raise SystemExit(INTERRUPTED) from None

    return run


def as_cli_error(error: Exception) -> CliError:
    """The exit code and the next command for an error of the engine or the language."""
    from caesura.lang.errors import DefinitionError, NoRecording, ProgramError, ReplayError, ServerUnavailable
    from caesura.runtime.errors import EngineStopped, InvalidRequest, ModelError

    message = str(error) or type(error).__name__
    root = error.root if isinstance(error, ProgramError) else error
    if isinstance(root, ServerUnavailable):
        return CliError(str(root), "caesura serve", NO_ENGINE)
    if isinstance(error, (ModelError, EngineStopped)):
        return CliError(message, "caesura doctor", NO_ENGINE)
    if isinstance(error, (InvalidRequest, DefinitionError, NoRecording)):
        return CliError(message, "caesura --help", USAGE)
    if isinstance(error, ReplayError):
        return CliError(message, "caesura run FILE --record NEW.jsonl", FAILED)
    return CliError(message, "caesura doctor", FAILED)
