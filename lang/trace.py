"""Symbolic runs: a program's nodes without a backend, as far as they do not depend on generated values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from caesura.lang import ir
from caesura.lang.errors import TraceStopped
from caesura.lang.symbols import tracing

if TYPE_CHECKING:
    from caesura.lang.program import Program

MAX_NODES = 5_000
MAX_DEPTH = 100


def is_tracing() -> bool:
    """Whether the calling code belongs to a symbolic run."""
    return tracing.get()


@dataclass(frozen=True, slots=True)
class Trace:
    """What a symbolic run found. ``complete`` is false when it met something that only a real run can know; the
    nodes up to there are still true, and ``stopped_by`` says what it was."""

    program: str
    nodes: tuple[ir.Expr, ...]
    branches: tuple[Trace, ...] = ()
    complete: bool = True
    stopped_by: str = ""

    @property
    def prefix(self) -> tuple[ir.Expr, ...]:
        """The nodes before the first one whose text is not constant."""
        constant = []
        for node in self.nodes:
            if not isinstance(node, (ir.Text, ir.RoleBegin, ir.RoleEnd)):
                break
            constant.append(node)
        return tuple(constant)

    @property
    def prefix_text(self) -> str:
        """The constant text of the prefix, without what a chat template adds."""
        return "".join(node.text for node in self.prefix if isinstance(node, ir.Text))

    def print_graph_dfs(self, write: Callable[[str], object] | None = None) -> str:
        """The nodes as text, one a line, branches indented; also passed to ``write`` if given."""
        lines = [node.label() for node in self.nodes]
        for i, branch in enumerate(self.branches):
            lines.append(f"branch {i}:")
            lines += ["  " + line for line in branch.print_graph_dfs().splitlines()]
        if not self.complete:
            lines.append(f"stopped: {self.stopped_by}")
        text = "\n".join(lines)
        if write is not None:
            write(text)
        return text

    def _repr_html_(self) -> str:
        from caesura.lang.display.program import trace_html

        return trace_html(self)


class Tracer:
    """Stands in for a ProgramState: collects nodes, and hands out symbols for variables.

    A body may loop without end: ``steps`` counts what this and its branches may still collect, ``depth`` how deep in
    forks this one is.
    """

    def __init__(self, steps: Iterator[int] | None = None, depth: int = 0) -> None:
        self.nodes: list[ir.Expr] = []
        self.branches: list[Tracer] = []
        self._steps = iter(range(MAX_NODES)) if steps is None else steps
        self._depth = depth

    def __iadd__(self, other: object) -> Tracer:
        self.submit(ir.as_expr(other))
        return self

    def submit(self, node: ir.Expr) -> None:
        """Collect a node; sequences are taken apart."""
        if isinstance(node, ir.Seq):
            for part in node.parts:
                self.submit(part)
        elif isinstance(node, ir.ProgramCall):
            self._step()
            node.program.body(self, node.args, node.kwargs)
        else:
            self._step()
            self.nodes.append(node)

    def _step(self) -> None:
        if next(self._steps, None) is None:
            raise TraceStopped(f"a trace has at most {MAX_NODES} nodes")

    def __getitem__(self, name: str) -> ir.Var:
        return ir.Var(name)

    get_var = __getitem__

    def __contains__(self, name: str) -> bool:
        return any(getattr(node, "name", None) == name for node in self.nodes)

    def set_var(self, name: str, value: Any) -> None:
        self.submit(ir.SetVar(name, value))

    def fork(self, size: int = 1, position_ids_offset: list[int] | None = None) -> TracerGroup:
        children = [self._branch() for _ in range(size)]
        return TracerGroup(children)

    def _branch(self) -> Tracer:
        self._step()
        if self._depth == MAX_DEPTH:
            raise TraceStopped(f"a trace has forks in forks up to {MAX_DEPTH} deep")
        self.branches.append(Tracer(self._steps, self._depth + 1))
        return self.branches[-1]

    @contextlib.contextmanager
    def copy(self) -> Iterator[Tracer]:
        yield self.fork(1).states[0]

    @contextlib.contextmanager
    def var_scope(self, name: str) -> Iterator[None]:
        self.submit(ir.ScopeBegin(name))
        yield
        self.submit(ir.ScopeEnd(name))

    def role(self, role: str, expr: object = None) -> Any:
        if expr is None:
            return self._role_scope(role)
        self.submit(ir.Seq((ir.RoleBegin(role), ir.as_expr(expr), ir.RoleEnd(role))))
        return None

    @contextlib.contextmanager
    def _role_scope(self, role: str) -> Iterator[None]:
        self.submit(ir.RoleBegin(role))
        yield
        self.submit(ir.RoleEnd(role))

    def system(self, expr: object = None) -> Any:
        return self.role("system", expr)

    def user(self, expr: object = None) -> Any:
        return self.role("user", expr)

    def assistant(self, expr: object = None) -> Any:
        return self.role("assistant", expr)

    def sync(self) -> None:
        """Nothing to wait for."""

    def __getattr__(self, name: str) -> Any:
        raise TraceStopped(f"s.{name} is known only when the program runs")

    def result(self, program: str, stopped_by: str = "") -> Trace:
        """What was collected."""
        branches = tuple(branch.result(program) for branch in self.branches)
        return Trace(program, tuple(self.nodes), branches, not stopped_by, stopped_by)


class TracerGroup:
    """Children of a traced fork."""

    def __init__(self, states: list[Tracer]) -> None:
        self.states = states

    def __getitem__(self, i: int) -> Tracer:
        return self.states[i]

    def __setitem__(self, i: int, state: Tracer) -> None:
        self.states[i] = state

    def __iter__(self) -> Iterator[Tracer]:
        return iter(self.states)

    def __len__(self) -> int:
        return len(self.states)

    def __iadd__(self, other: Any) -> TracerGroup:
        for i, state in enumerate(self.states):
            if callable(other) and not isinstance(other, ir.Expr):
                state += other(i)
            else:
                state += other[i] if isinstance(other, (list, tuple)) else other
        return self

    def __enter__(self) -> TracerGroup:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def join(self, mode: str = "gather_variable") -> None:
        """Nothing to wait for; texts that are joined cannot be shown."""
        if mode != "gather_variable":
            raise TraceStopped(f"join({mode!r}) adds the texts of the branches, which are known only when it runs")


def is_tracer(value: object) -> bool:
    """Whether ``value`` is the state of a symbolic run."""
    return isinstance(value, Tracer)


def trace_program(program: Program, arguments: Mapping[str, Any]) -> Trace:
    """Run ``program`` with a Tracer and placeholders for the arguments that are not given."""
    filled = dict(arguments)
    for parameter in program.own_parameters:
        named = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if named and parameter.name not in filled and parameter.default is parameter.empty:
            filled[parameter.name] = ir.Argument(parameter.name)
    tracer = Tracer()
    token = tracing.set(True)
    try:
        program.body(tracer, (), filled)
    except Exception as error:  # whatever a body does with a symbol; what came before it is still constant
        return tracer.result(program.name, f"{type(error).__name__}: {error}")
    finally:
        tracing.reset(token)
    return tracer.result(program.name)
