"""``s``: what a program adds expressions to and reads variables from.

Adding only enqueues; each state has a drain task that executes its nodes in order. Reading waits: the fiber inside a
program, the thread outside. After a failure every read and every further ``+=`` raises it, nothing blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from caesura.lang import ir
from caesura.lang.core import Core, Saved, Usage
from caesura.lang.decisions import Decisions
from caesura.lang.drain import Drain
from caesura.lang.errors import ProgramError, StateError, UnknownVariable
from caesura.lang.group import ProgramStateGroup
from caesura.lang.interpreter import check, execute
from caesura.lang.reading import Reading, Stream
from caesura.lang.runner import runner

if TYPE_CHECKING:
    from caesura.lang.execution import Execution
    from caesura.lang.tools import ToolCall, ToolResult
    from caesura.lang.traces import RunTrace


class Snapshot:
    """A point to return to with `ProgramState.rollback`."""

    def __init__(self) -> None:
        self.saved: Saved | None = None


class ProgramState:
    """One context of a running or finished program. Safe to use from any thread."""

    def __init__(self, execution: Execution, core: Core | None, *, has_body: bool = False) -> None:
        self._execution = execution
        self._core = core
        self.drain = Drain(self._execute, self._node_failed, self.notify)
        self.drain.open = core is not None
        self._reading = Reading(self)
        self._waiters: list[asyncio.Future[None]] = []
        self.body_running = has_body
        self.closed: str | None = None  # why nothing can be added any more
        self.failure: ProgramError | None = None
        self.failure_seen = False
        self.position = "its body"  # the node that runs, for messages
        self.ret: Any = None
        execution.states.append(self)

    # -- adding --------------------------------------------------------------------------------------------------

    def __iadd__(self, other: object) -> ProgramState:
        self.submit(ir.as_expr(other))
        return self

    def submit(self, node: ir.Expr) -> None:
        """Enqueue a node. Raises the state's failure, StateError after its end, and what `check` finds."""
        self._check_open()
        for inner in ir.walk(node):
            check(inner, self._execution.backend, self._execution.options.sampling)
        if not self.drain.add(node):
            self._check_open()  # it was closed meanwhile

    def _check_open(self) -> None:
        self.check_failure()
        if self.closed is not None:
            raise StateError(f"nothing can be added to this state of {self._execution.program!r}: {self.closed}")

    async def _execute(self, node: ir.Expr, context: contextvars.Context) -> None:
        await execute(self, node, context)

    def _node_failed(self, error: BaseException) -> None:
        self.fail(ProgramError.wrap(error, self._execution.program, self.position))

    # -- life, on the loop ---------------------------------------------------------------------------------------

    @property
    def core(self) -> Core:
        assert self._core is not None
        return self._core

    @property
    def core_or_none(self) -> Core | None:
        return self._core

    @property
    def execution(self) -> Execution:
        """The run this state belongs to."""
        return self._execution

    @property
    def idle(self) -> bool:
        """Nothing is enqueued and nothing runs."""
        return self.drain.idle

    def adopt(self, core: Core) -> None:
        """A fork has reached this child: from now on it runs."""
        self._core = core
        self.drain.open = True
        self.drain.kick()
        self.notify()

    def notify(self) -> None:
        """Wake everyone who waits for this state."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
        if self._core is not None:
            self._core.notify()

    async def change(self) -> None:
        """Wait for the next change."""
        if self._core is not None:
            await self._core.change()
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def fail(self, failure: ProgramError) -> None:
        """Record the failure; children that were still to be forked fail with it."""
        self.abandon_forks(self._failed(failure), failure)

    def _failed(self, failure: ProgramError) -> list[ir.Expr]:
        """Record the failure; gives what will not run any more."""
        if self.failure is not None:
            return []
        self.failure = failure
        dropped = self.drain.clear()
        self.notify()
        return dropped

    def abandon_forks(self, nodes: Iterable[ir.Expr], failure: ProgramError) -> None:
        """Children of forks that will not come have failed, and theirs as well, so that nobody waits for them."""
        ahead = list(nodes)
        while ahead:
            node = ahead.pop()
            for child in node.children if isinstance(node, ir.ForkInto) else ():
                if child.core_or_none is None:
                    ahead += child._failed(failure)
                    child.failure_seen = True

    def close(self, why: str) -> None:
        """Nothing can be added any more; what was added still runs."""
        self.closed = self.closed or why
        self.drain.seal()

    def finish(self, failure: ProgramError | None) -> None:
        """The run is over."""
        self.body_running = False
        if self.failure is None and failure is not None:
            self.failure = failure
        if self._core is not None:
            self._core.session = None
        self.notify()

    def check_failure(self) -> None:
        """Raise the failure, if there is one."""
        failure = self.failure  # a rollback may revive the state from another thread
        if failure is not None:
            self.failure_seen = True
            raise failure.copy()

    # -- reading -------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Any:
        """The value of a variable; waits for it. Raises UnknownVariable (a KeyError) when nothing sets it."""
        return runner().wait(self._reading.value(name))

    def get_var(self, name: str) -> Any:
        """As ``s[name]``."""
        return self[name]

    async def get_async(self, name: str) -> Any:
        """As ``s[name]``, awaitable from any event loop."""
        return await runner().wait_async(self._reading.value(name))

    def __contains__(self, name: str) -> bool:
        """Whether the variable is set, or an expression that sets it is enqueued. Does not wait."""
        return self.drain.announced(name) or (self._core is not None and name in self._core.values.variables)

    def set_var(self, name: str, value: Any) -> None:
        """Set a variable, in order with what was added before."""
        self.submit(ir.SetVar(name, value))

    def _read(self, name: str, table: Callable[[Core], dict[str, Any]], what: str) -> Any:
        async def read() -> Any:
            await self._reading.value(name)
            entries = table(self.core)
            if name not in entries:
                raise UnknownVariable(f"variable {name!r} has no {what}")
            return entries[name]

        return runner().wait(read())

    def text_of(self, name: str) -> str:
        """The raw text behind a variable, also when its value is typed."""
        text: str = self._read(name, lambda core: core.values.texts, "text")
        return text

    def get_meta_info(self, name: str) -> dict[str, Any]:
        """Tokens, finish reason and, when asked for, logprobs of a generation, with SGLang's keys."""
        return dict(self._read(name, lambda core: core.values.meta, "meta info"))

    def tool_result(self, name: str) -> ToolResult:
        """The result of ``call_tool(name, ...)``; of ``call_tools``, the first."""
        return self.tool_results(name)[0]

    def tool_results(self, name: str) -> list[ToolResult]:
        """The results of ``call_tools(name, ...)`` in the order of the calls."""
        return list(self._read(name, lambda core: core.values.tool_results, "tool result"))

    def tool_calls(self, name: str) -> list[tuple[ToolCall, ToolResult]]:
        """The calls that the model made in ``gen(name, tools=...)``, with their results."""
        return list(self._read(name, lambda core: core.values.tool_calls, "tool calls"))

    def text(self) -> str:
        """All text so far (inside the program) or in the end (outside)."""
        self.sync()
        return self.core.text()

    async def text_async(self) -> str:
        """As `text`, awaitable."""
        await self.wait_async()
        return self.core.text()

    def messages(self) -> list[dict[str, Any]]:
        """The turns as OpenAI-style messages; contents are exactly what was written."""
        self.sync()
        return self.core.messages()

    def sync(self) -> None:
        """Wait until everything added so far has run (inside the program) or the program is done (outside)."""
        runner().wait(self._reading.done())

    async def wait_async(self) -> ProgramState:
        """As `sync`, awaitable from any event loop; returns the state."""
        await runner().wait_async(self._reading.done())
        return self

    def error(self) -> ProgramError | None:
        """Wait for the end and return the failure, None when there is none. Never raises it."""
        with contextlib.suppress(ProgramError):
            self.sync()
        self.failure_seen = True
        return self.failure

    @property
    def ret_value(self) -> Any:
        """What the program's function returned; waits for the end."""
        self.sync()
        return self.ret

    @property
    def done(self) -> bool:
        """Whether the program has ended. Does not wait."""
        return self._execution.done

    @property
    def variables(self) -> dict[str, Any]:
        """What is set by now, also after a failure. Does not wait."""
        return dict(self._core.values.variables) if self._core is not None else {}

    def usage(self) -> Usage:
        """Token and tool totals of the whole program, forks included. Does not wait."""
        return self._execution.usage

    def decisions(self) -> Decisions:
        """The backend's pause decisions for this context, with their reasons."""
        return runner().wait(self._read_decisions())

    async def _read_decisions(self) -> Decisions:
        return Decisions() if self._core is None else await self._core.read_decisions()

    def trace(self) -> RunTrace:
        """What the whole program did when, forks included: to print, to save, to export. Does not wait."""
        from caesura.lang.traces import RunTrace

        execution = self._execution
        return RunTrace(execution.span, execution.begun_at, execution.backend.name)

    def stop(self) -> asyncio.Task[None] | None:
        """Interrupt what this state is doing and drop what is enqueued; the program goes on. Loop thread only.

        The variable of an interrupted generation is not set, and the context ends somewhere inside it: take a
        snapshot before and roll back to it. Returns the task that is ending.
        """
        dropped = StateError("the fork never came: its state was stopped before")
        self.abandon_forks(self.drain.waiting, ProgramError.wrap(dropped, self._execution.program, self.position))
        return self.drain.stop()

    def watch(self) -> ProgramState:
        """Show how the program goes on, in place, until it has ended: in a notebook or in a terminal."""
        from caesura.lang.display import watch

        watch(self)
        return self

    def cancel(self) -> None:
        """End the program; its sessions go back. Reads raise ProgramCancelled."""
        self._execution.cancel()

    # -- streaming -----------------------------------------------------------------------------------------------

    def text_iter(self, var: str | None = None) -> Iterator[str]:
        """Text as it is generated, of one variable or of everything. Without ``stream=True`` it comes in few pieces."""
        stream = Stream(self._reading, var)
        while (found := runner().wait(stream.next())) is not None:
            if found[0]:
                yield found[0]

    async def text_async_iter(self, var: str | None = None, return_meta_data: bool = False) -> AsyncIterator[Any]:
        """As `text_iter`, for any event loop; with ``return_meta_data`` pairs of text and metadata, where ``rollback``
        says that what came since the snapshot is void, of one variable all that came before."""
        stream = Stream(self._reading, var)
        while (found := await runner().wait_async(stream.next())) is not None:
            if return_meta_data:
                yield found
            elif found[0]:
                yield found[0]

    # -- structure -----------------------------------------------------------------------------------------------

    def fork(self, size: int = 1, position_ids_offset: list[int] | None = None) -> ProgramStateGroup:
        """``size`` states that continue from here in parallel. ``position_ids_offset`` is accepted and not needed."""
        if not hasattr(size, "__index__") or size < 1:  # numpy's ints, too
            raise StateError(f"fork size is {size!r}; it must be an int of at least 1")
        children = tuple(ProgramState(self._execution, None) for _ in range(size))
        for child in children:
            child.drain.parent = self.drain
        try:
            self.submit(ir.ForkInto(children))
        except BaseException:
            for child in children:
                self._execution.states.remove(child)
            raise
        return ProgramStateGroup(list(children), self)

    @contextlib.contextmanager
    def copy(self) -> Iterator[ProgramState]:
        """``with s.copy() as c:`` - a single fork, joined at the end."""
        group = self.fork(1)
        try:
            yield group[0]
        finally:
            if self.failure is None and self.closed is None:
                group.join()

    @contextlib.contextmanager
    def var_scope(self, name: str) -> Iterator[None]:
        """Everything added inside becomes the variable ``name``."""
        self.submit(ir.ScopeBegin(name))
        yield
        self.submit(ir.ScopeEnd(name))

    def role(self, role: str, expr: object = None) -> Any:
        """Add a whole turn, or without ``expr`` give a context manager for one."""
        if expr is not None:
            self.submit(ir.Seq((ir.RoleBegin(role), ir.as_expr(expr), ir.RoleEnd(role))))
            return None
        return self._role_scope(role)

    @contextlib.contextmanager
    def _role_scope(self, role: str) -> Iterator[None]:
        self.submit(ir.RoleBegin(role))
        try:
            yield
        finally:  # the turn is closed when the block raises, too
            if self.failure is None and self.closed is None:
                self.submit(ir.RoleEnd(role))

    def system(self, expr: object = None) -> Any:
        """A system turn; ``with s.system():`` without an argument."""
        return self.role("system", expr)

    def user(self, expr: object = None) -> Any:
        """A user turn; ``with s.user():`` without an argument."""
        return self.role("user", expr)

    def assistant(self, expr: object = None) -> Any:
        """An assistant turn; ``with s.assistant():`` without an argument."""
        return self.role("assistant", expr)

    def snapshot(self) -> Snapshot:
        """Remember this point, with text, variables and turns."""
        snapshot = Snapshot()
        self.submit(ir.TakeSnapshot(snapshot))
        return snapshot

    def rollback(self, snapshot: Snapshot) -> None:
        """Return to a snapshot. A failed state works again, if the snapshot was reached before the failure."""
        if not isinstance(snapshot, Snapshot):
            raise StateError(f"rollback to {snapshot!r}: give what snapshot() gave")
        if self.failure is not None and snapshot.saved is not None and not self._execution.stopping:
            self.failure = None
        self.submit(ir.RollbackTo(snapshot))

    def __repr__(self) -> str:
        phase = "failed" if self.failure else "done" if self._execution.done else "running"
        return f"<ProgramState of {self._execution.program!r}: {phase}, variables {sorted(self.variables)}>"

    def _repr_html_(self) -> str:
        from caesura.lang.display.state import state_html

        return state_html(self)
