"""Every error the language raises, on one screen. A failed tool is a value (`ToolResult`) unless asked to raise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from caesura.lang.tools import ToolResult


class LangError(Exception):
    """Base of all errors of the language."""


class DefinitionError(LangError, TypeError):
    """A program, tool or expression is put together wrongly; raised where it is written."""


class NoBackend(LangError):
    """A program was run with neither ``backend=`` nor a default backend."""


class UnsupportedByBackend(LangError, NotImplementedError):
    """The backend does not declare the capability that an expression needs."""


class StateError(LangError):
    """A state was used wrongly: nested roles, an append after the end, a foreign snapshot."""


class UnknownVariable(LangError, KeyError):
    """No expression sets the variable that was read."""

    __str__ = Exception.__str__  # KeyError's own str() quotes the message


class BlockingCall(LangError, RuntimeError):
    """A blocking read on the event loop outside any program; it would wait for itself."""


class OutputError(LangError, ValueError):
    """A generated text does not parse as the type that was asked for."""


class ToolError(LangError):
    """A tool failed and was called with ``on_error="raise"``. ``result`` is the whole ToolResult."""

    def __init__(self, message: str, result: ToolResult | None = None) -> None:
        super().__init__(message)
        self.result = result


class ToolTimeout(ToolError, TimeoutError):
    """A tool outlasted its ``timeout_s``."""


class ProgramCancelled(LangError):
    """The program was cancelled through ``state.cancel()``."""


class DeadlineExceeded(LangError, TimeoutError):
    """The program outlasted its ``deadline_s``."""


class TraceStopped(LangError):
    """A symbolic run met something that only a real run can know."""


class ScriptError(LangError):
    """A ScriptedBackend has no answer, or its answer breaks what the request demands."""


class RemoteError(LangError):
    """A server behind a backend answered with an error of its own, or with something that makes no sense."""


class ServerUnavailable(RemoteError, ConnectionError):
    """A server cannot be reached, refuses work for too long, or has lost the program's context."""


class ReplayError(LangError):
    """A replayed program asked for something else than what was recorded."""


class NoRecording(ReplayError):
    """A file that was given as a recording is none, or cannot be read or written."""


class BatchError(LangError):
    """Some programs of a batch failed. ``states`` holds all of them, finished ones with their results."""

    def __init__(self, states: list[Any], errors: dict[int, BaseException]) -> None:
        first = min(errors)
        super().__init__(
            f"{len(errors)} of {len(states)} programs failed; the first is number {first}: {errors[first]} "
            "(finished results are in .states, errors in .errors; return_exceptions=True returns them in place)"
        )
        self.states = states
        self.errors = errors


class ProgramError(LangError):
    """What every read of a failed program raises.

    ``cause`` is the original error, ``program`` and ``node`` say where it happened. The raised class also derives
    from the class of the cause where Python permits it, so ``except ToolError`` catches a program's failed tool.
    """

    program: str
    node: str
    cause: BaseException

    def __str__(self) -> str:
        kind = "" if isinstance(self.cause, ProgramError) else f"{type(self.cause).__name__}: "
        return f"program {self.program!r} failed at {self.node}: {kind}{self.cause}"

    @property
    def root(self) -> BaseException:
        """The innermost cause, behind all nested programs."""
        cause: BaseException = self
        while isinstance(cause, ProgramError):
            cause = cause.cause
        return cause

    @staticmethod
    def wrap(cause: BaseException, program: str, node: str) -> ProgramError:
        """Build the error for ``cause``; class creation is cached per type."""
        error = _instance(_class_for(type(cause)), cause)
        error.program, error.node, error.cause = program, node, cause
        error.__cause__ = cause
        return error

    def __reduce__(self) -> tuple[Any, ...]:
        return ProgramError.wrap, (self.cause, self.program, self.node)

    def copy(self) -> ProgramError:
        """A fresh object for each reader: two threads raising one object would mix their tracebacks."""
        return ProgramError.wrap(self.cause, self.program, self.node)


_CLASSES: dict[type[BaseException], type[ProgramError]] = {}


def _class_for(kind: type[BaseException]) -> type[ProgramError]:
    if kind not in _CLASSES:
        made: type[ProgramError] = ProgramError
        # StopIteration and non-Exceptions have a meaning to the interpreter itself; a property of ours cannot be set.
        taken = any(isinstance(getattr(kind, name, None), property) for name in ("program", "node", "cause"))
        if issubclass(kind, Exception) and not issubclass(kind, (StopIteration, StopAsyncIteration)) and not taken:
            try:
                bases = (kind,) if issubclass(kind, ProgramError) else (ProgramError, kind)
                made = type(f"ProgramError[{kind.__name__}]", bases, {"__str__": ProgramError.__str__})
            except TypeError:  # a final class, or layouts that do not mix
                made = ProgramError
        _CLASSES[kind] = made
    return _CLASSES[kind]


def _instance(kind: type[ProgramError], cause: BaseException) -> ProgramError:
    try:
        error = kind.__new__(kind, *cause.args)
        error.__dict__.update(getattr(cause, "__dict__", {}))
        error.args = cause.args
    except Exception:
        error = ProgramError(str(cause))
    return error
