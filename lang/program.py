"""``@function``: from a Python function to a program that runs, in the background, on a backend."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, overload

from caesura.lang import ir
from caesura.lang.backend import Backend
from caesura.lang.errors import DefinitionError, NoBackend, TraceStopped
from caesura.lang.execution import Execution, RunOptions, current_execution
from caesura.lang.fibers import finished
from caesura.lang.runner import runner
from caesura.lang.sampling import Sampling
from caesura.lang.state import ProgramState
from caesura.lang.tools import Tool, as_tools, is_number
from caesura.lang.trace import Trace, is_tracer, is_tracing, trace_program

T = TypeVar("T")

# Arguments of run() besides the program's own; sampling arguments carry SGLang's names.
_SAMPLING_OPTIONS = {
    "max_new_tokens": "max_tokens",
    **{name: name for name in Sampling.__dataclass_fields__ if name != "max_tokens"},
}
_RUN_OPTIONS = ("stream", "backend", "use_thread", "deadline_s", "namespace")


class _Default:
    """The process's default backend, as in SGLang."""

    backend: Backend | None = None


def set_default_backend(backend: Backend | str | None) -> None:
    """The backend of programs that are run without ``backend=``: an object, or an address as `connect` takes it."""
    _Default.backend = default_backend(backend) if isinstance(backend, str) else backend


def default_backend(backend: Backend | str | None = None) -> Backend:
    """``backend``, or else the one of the program that is asking, or else the default one. Raises NoBackend."""
    outer = current_execution()
    chosen = backend or (outer.backend if outer is not None else _Default.backend)
    if isinstance(chosen, str):
        from caesura.lang.backends.connect import shared

        return shared(chosen)
    if chosen is None:
        raise NoBackend(
            "no backend: give one with run(backend=...) or set_default_backend(...), for example Engine() for the "
            'in-process engine, "http://127.0.0.1:30000" for a server or ScriptedBackend([...]) in tests'
        )
    if isinstance(chosen, type) or not hasattr(chosen, "capabilities"):
        raise DefinitionError(f"backend is {chosen!r}; it must be an object, as Engine() gives one, or an address")
    return chosen


class Program:
    """A program. Its first parameter (the one after ``self`` in a method) is the state, whatever it is called.

    Call it inside another program to get an expression that runs it in place; call it with a state as first argument
    to run it in place at once and get its return value; call it anywhere else to run it on its own.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        *,
        tools: Sequence[Any] = (),
        name: str | None = None,
        bound: Mapping[str, Any] | None = None,
        instance: Any = None,
    ) -> None:
        if not callable(func):
            raise DefinitionError(f"a program must be a function, not {type(func).__name__}")
        if inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
            raise DefinitionError(f"program {func.__name__!r} is a generator; use s += ... instead of yield")
        self.func = func
        self.name: str = name or getattr(func, "__name__", None) or "program"
        self.tools: tuple[Tool, ...] = as_tools(tools, f"program {self.name!r}")
        self.bound = dict(bound or {})
        self._instance = instance
        parameters = list(inspect.signature(func).parameters.values())
        if not parameters or parameters[0].kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
            raise DefinitionError(f"program {self.name!r} needs a first parameter, which becomes the state")
        if instance is not None and len(parameters) == 1 and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
            raise DefinitionError(f"program {self.name!r} needs a parameter after self, which becomes the state")
        self.__doc__ = func.__doc__
        self.__name__ = self.name

    @property
    def own_parameters(self) -> list[inspect.Parameter]:
        """The program's parameters after the state."""
        skipped = 1 if self._instance is None else 2
        return list(inspect.signature(self.func).parameters.values())[skipped:]

    @property
    def arg_names(self) -> list[str]:
        """Names of the program's own parameters."""
        return [parameter.name for parameter in self.own_parameters]

    def __get__(self, instance: Any, owner: type | None = None) -> Program:
        if instance is None:
            return self
        return Program(self.func, tools=self.tools, name=self.name, bound=self.bound, instance=instance)

    def __repr__(self) -> str:
        return f"<Program {self.name}({', '.join(self.arg_names)})>"

    def _repr_html_(self) -> str:
        from caesura.lang.display.program import program_html

        return program_html(self)

    def body(self, state: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the function itself. Raises TraceStopped for a symbolic run of one that is async."""
        if is_tracer(state) and inspect.iscoroutinefunction(self.func):
            raise TraceStopped(f"{self.name} is async, and not traced")
        first = (state,) if self._instance is None else (self._instance, state)
        return self.func(*first, *args, **{**kwargs, **self.bound})

    # -- running -------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and (isinstance(args[0], ProgramState) or is_tracer(args[0])):
            return finished(self.body(args[0], args[1:], kwargs))
        if current_execution() is not None or is_tracing():
            self._check(args, kwargs)
            return ir.ProgramCall(self, args, kwargs)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> ProgramState:
        """Start the program and return its state at once; reading from it waits.

        Besides the program's own arguments: SGLang's sampling arguments (``max_new_tokens=128, temperature=1.0,
        top_p, top_k, min_p, stop, ...``), ``stream``, ``backend`` (an object, or an address as `connect` takes it),
        ``use_thread`` (False waits for the end), ``deadline_s`` (the program is ended then), ``namespace`` (cached
        prefixes are shared within one only). A program's own parameter of the same name comes first.
        """
        own, backend, options, background = self.split(kwargs)
        self._check(args, own)
        execution = Execution(self.name, lambda state: self.body(state, args, own), default_backend(backend), options)
        state = execution.start()
        if not background:
            state.sync()
        return state

    async def arun(self, *args: Any, **kwargs: Any) -> ProgramState:
        """Run and await the end, from any event loop. Cancelling the awaiting task cancels the program."""
        state = self.run(*args, **{**kwargs, "use_thread": True} if "use_thread" in kwargs else kwargs)
        try:
            return await state.wait_async()
        except BaseException:
            if not state.done:
                state.cancel()
            raise

    def run_batch(self, batch_kwargs: Sequence[Any], **options: Any) -> Any:
        """Run once for each item of ``batch_kwargs`` (dicts, or tuples of positional arguments).

        ``num_threads`` bounds how many run at once ("auto": 1024; programs take no threads). ``progress_bar`` shows
        one. ``generator_style=True`` yields states in order as they finish. When some fail, all others finish, then
        BatchError is raised with all states; ``return_exceptions=True`` puts the errors in the places of the states.
        Other options are those of `run`.
        """
        from caesura.lang.batch import run_batch

        return run_batch(self, batch_kwargs, **options)

    def split(
        self, kwargs: Mapping[str, Any], also: Iterable[str] = ()
    ) -> tuple[dict[str, Any], Backend | str | None, RunOptions, bool]:
        """Separate the program's own keyword arguments from the run's. Raises DefinitionError for one that is neither;
        ``also`` are other names that it may be meant for."""
        parameters = {parameter.name for parameter in self.own_parameters}
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in self.own_parameters)
        own: dict[str, Any] = {}
        sampling: dict[str, Any] = {}
        run: dict[str, Any] = {}
        for key, value in kwargs.items():
            if key in parameters:
                own[key] = value
            elif key in _SAMPLING_OPTIONS:
                sampling[_SAMPLING_OPTIONS[key]] = value
            elif key in _RUN_OPTIONS:
                run[key] = value
            elif takes_any:
                own[key] = value
            else:
                raise DefinitionError(self._no_argument(key, also))
        deadline_s = run.get("deadline_s")
        if deadline_s is not None and not (is_number(deadline_s) and deadline_s > 0):
            raise DefinitionError(f"deadline_s is {deadline_s!r}; it must be a number above 0")
        options = RunOptions(
            Sampling.of(sampling),
            bool(run.get("stream", False)),
            None if deadline_s is None else float(deadline_s),
            run.get("namespace", ""),
            self.tools,
        )
        return own, run.get("backend"), options, bool(run.get("use_thread", True))

    def _no_argument(self, name: str, others: Iterable[str]) -> str:
        known = [*self.arg_names, *_SAMPLING_OPTIONS, *_RUN_OPTIONS, *others]
        close = difflib.get_close_matches(name, known, 1)
        also = ", ".join(_RUN_OPTIONS)
        hint = f"did you mean {close[0]!r}?" if close else f"every run takes {also} and sampling arguments"
        own = ", ".join(self.arg_names) or "none"
        return f"program {self.name!r} takes no argument {name!r}; its own are: {own}; {hint}"

    def _check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Arguments fit the signature; said where the program is called, not later in the background."""
        first: tuple[Any, ...] = (None,) if self._instance is None else (None, None)
        try:
            inspect.signature(self.func).bind(*first, *args, **{**kwargs, **self.bound})
        except TypeError as error:
            raise DefinitionError(f"program {self.name!r}: {error}") from None

    # -- before running ------------------------------------------------------------------------------------------

    def bind(self, **kwargs: Any) -> Program:
        """A program with some arguments fixed. Fixed values win over those given later."""
        unknown = [key for key in kwargs if key not in self.arg_names]
        if unknown:
            raise DefinitionError(f"program {self.name!r} has no argument {unknown[0]!r}; there are {self.arg_names}")
        bound = {**self.bound, **kwargs}
        return Program(self.func, tools=self.tools, name=self.name, bound=bound, instance=self._instance)

    def trace(self, backend: Backend | None = None, **kwargs: Any) -> Trace:
        """Run symbolically: the nodes that do not depend on generated values, and the constant prefix.

        The function runs with placeholders for arguments that are neither given nor bound. ``backend`` is accepted
        for SGLang's sake; none is needed.
        """
        return trace_program(self, {**kwargs, **self.bound})

    def cache(self, backend: Backend | str | None = None) -> int:
        """Compute the program's constant prefix now, so that runs find it cached. Returns its characters."""
        prefix = self.trace().prefix
        if not prefix:
            return 0

        def body(s: ProgramState) -> None:
            for node in prefix:
                s.submit(node)
            s.submit(ir.Commit())

        options = RunOptions(tools=self.tools)
        state = Execution(f"{self.name}.cache", body, default_backend(backend), options).start()
        return len(state.text())


@overload
def function(func: Callable[..., Any], /) -> Program: ...
@overload
def function(
    func: None = None,
    *,
    num_api_spec_tokens: int | None = None,
    tools: Sequence[Any] = (),
    name: str | None = None,
) -> Callable[[Callable[..., Any]], Program]: ...


def function(
    func: Callable[..., Any] | None = None,
    num_api_spec_tokens: int | None = None,
    *,
    tools: Sequence[Any] = (),
    name: str | None = None,
) -> Program | Callable[[Callable[..., Any]], Program]:
    """Make a function, sync or async, a program: ``@function`` or ``@function(tools=[...])``.

    ``tools`` are declared to the model in the first turn. ``num_api_spec_tokens`` is accepted for SGLang's sake and
    has no effect: it speeds up remote completion APIs only.
    """
    if func is not None:
        return Program(func, tools=tools, name=name)
    return lambda wrapped: Program(wrapped, tools=tools, name=name)


def flush_cache(backend: Backend | str | None = None) -> None:
    """Drop the backend's cached prefixes."""
    runner().wait(_flush(default_backend(backend)))


async def _flush(backend: Backend) -> None:
    await backend.flush_cache()


def get_server_info(backend: Backend | str | None = None) -> dict[str, Any]:
    """The backend's model, limits and counters."""
    return runner().wait(_info(default_backend(backend)))


async def _info(backend: Backend) -> dict[str, Any]:
    return dict(await backend.server_info())
