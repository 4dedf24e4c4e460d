"""One run of a program: its body, its states, its sessions, and the one way they all end."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from caesura.lang.backend import Backend, Session
from caesura.lang.core import Core, Usage
from caesura.lang.errors import DeadlineExceeded, LangError, ProgramCancelled, ProgramError
from caesura.lang.fibers import finished, run_in_fiber
from caesura.lang.runner import runner
from caesura.lang.sampling import Sampling
from caesura.lang.spans import Span
from caesura.lang.state import ProgramState

if TYPE_CHECKING:
    from caesura.lang.tools import Tool

log = logging.getLogger("caesura.lang")

CLOSE_TIMEOUT_S = 10.0
INSIST_AFTER_S = 1.0
MAKING_GRACE_S = 1.0  # sessions being made are better closed than cancelled


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What one run is told besides the program's own arguments."""

    sampling: Sampling = field(default_factory=Sampling)
    stream: bool = False
    deadline_s: float | None = None
    namespace: str = ""
    tools: tuple[Tool, ...] = ()


_current: contextvars.ContextVar[Execution | None] = contextvars.ContextVar("caesura_execution", default=None)


def current_execution() -> Execution | None:
    """The run that the calling code belongs to."""
    return _current.get()


class Execution:
    """Runs a body over a root state. Every session it opens is closed when it ends, however it ends."""

    def __init__(
        self, program: str, body: Callable[[ProgramState], Any], backend: Backend, options: RunOptions
    ) -> None:
        self.program = program
        self.backend = backend
        self.options = options
        self.states: list[ProgramState] = []
        self.done = False
        self.failure: ProgramError | None = None
        self._body = body
        self._sessions: list[Session] = []
        self._making: set[asyncio.Task[list[Session]]] = set()
        self._nested: set[Execution] = set()  # that have not ended
        self._outer: Execution | None = None
        self._task: asyncio.Task[None] | None = None
        self._stop: LangError | None = None
        self._begun = False
        self._ending = False
        self.begun_at = time.time()
        self.span = Span("program", program)
        self.root = ProgramState(self, Core(self, self.span), has_body=True)
        self.root.core.values.tools = options.tools

    def start(self) -> ProgramState:
        """Begin in the background; returns the root state at once."""
        outer = _current.get()
        if outer is not None and not outer.done:
            outer._nested.add(self)
            self._outer = outer
        context = contextvars.copy_context()

        def launch() -> None:
            self._task = runner().spawn(self._main(), context=context)

        runner().call(launch)
        return self.root

    def cancel(self, reason: LangError | None = None) -> None:
        """End the run from any thread. What was finished stays readable through `ProgramState.variables`."""

        def stop() -> None:
            if self._stop is not None or self.done:
                return
            self._stop = reason or ProgramCancelled(f"program {self.program!r} was cancelled")
            failure = ProgramError.wrap(self._stop, self.program, self.root.position)
            for state in self.states:  # a body that swallows the cancellation gets no further
                if state is self.root or not state.idle:
                    state.fail(failure)
                state.drain.stop()
            self._interrupt()

        runner().call(stop)

    def _interrupt(self) -> None:
        """Cancel the task, and again after a while if its body resists. One that has not begun ends by itself."""
        if self._task is not None and self._begun and not self._ending:
            self._task.cancel()
            asyncio.get_running_loop().call_later(INSIST_AFTER_S, self._interrupt)

    # -- on the loop ---------------------------------------------------------------------------------------------

    async def _main(self) -> None:
        _current.set(self)
        timer: asyncio.TimerHandle | None = None
        failure: ProgramError | None = None
        self._begun = True
        try:
            if self._stop is not None:
                raise asyncio.CancelledError
            if self.options.deadline_s is not None:
                late = DeadlineExceeded(
                    f"program {self.program!r} outlasted its deadline of {self.options.deadline_s:g} s"
                )
                timer = asyncio.get_running_loop().call_later(self.options.deadline_s, self.cancel, late)
            self.root.ret = await run_body(self.root, self._body, self.program)
            self.root.body_running = False
            failure = await self._all_idle()
        except asyncio.CancelledError:
            self._stop = self._stop or ProgramCancelled(f"program {self.program!r} was stopped with its event loop")
            failure = self.root.failure or ProgramError.wrap(self._stop, self.program, self.root.position)
        except BaseException as error:  # user code: even SystemExit must not end the loop
            failure = self._failure_from(error)
        finally:
            if timer is not None:
                timer.cancel()
        self._ending = True
        with contextlib.suppress(asyncio.CancelledError):
            await self._end(failure)
        self._finish(failure)

    def _failure_from(self, error: BaseException) -> ProgramError:
        own = self.root.failure
        if own is not None and (error is own or getattr(error, "cause", None) is own.cause):
            return own
        return ProgramError.wrap(error, self.program, "its body")

    async def _all_idle(self) -> ProgramError | None:
        """Wait for every state, forks that nobody joined included; gives the first failure that nobody has seen."""
        while True:
            for state in self.states:
                if state.failure is not None and not state.failure_seen and state is not self.root:
                    return ProgramError.wrap(state.failure, self.program, "a fork")
            if self.root.failure is not None:
                return self.root.failure
            busy = next((state for state in self.states if not state.idle and state.failure is None), None)
            if busy is None:
                break
            await busy.change()
        return None

    async def _end(self, failure: ProgramError | None) -> None:
        """Stop what still runs and give all sessions back. Nothing can be added any more: it would open new ones."""
        for state in self.states:
            state.close("its program has ended")
        if failure is not None:
            for state in self.states:
                if not state.idle:
                    state.fail(failure)
        drains = [task for state in self.states if (task := state.drain.stop()) is not None]
        if drains:
            await asyncio.wait(drains, timeout=CLOSE_TIMEOUT_S)
        if failure is not None:
            for nested in list(self._nested):
                nested.cancel(ProgramCancelled(f"program {self.program!r}, which ran this one, has ended"))
        if self._making:
            _, late = await asyncio.wait(set(self._making), timeout=MAKING_GRACE_S)
            for making in late:  # a server that has no room may keep us waiting for long
                making.cancel()
            if late:
                await asyncio.wait(late, timeout=CLOSE_TIMEOUT_S)
        sessions, self._sessions = self._sessions, []
        if sessions:
            cores = {id(core.session): core for core in self._cores}
            closing = [asyncio.ensure_future(_give_back(session, cores.get(id(session)))) for session in sessions]
            await asyncio.wait(closing, timeout=CLOSE_TIMEOUT_S)

    def _finish(self, failure: ProgramError | None) -> None:
        self.failure = failure
        try:
            self._end_span(failure)
        finally:  # whatever became of the trace, nobody may wait for ever
            self.done = True
            for state in self.states:
                state.finish(failure if state is self.root else None)
            self._nested.clear()
            if self._outer is not None:
                self._outer._nested.discard(self)
                self._outer = None

    def _end_span(self, failure: ProgramError | None) -> None:
        if failure is None:
            self.span.end()
            return
        kind = type(failure.root).__name__
        try:
            words = str(failure)
        except Exception:  # of an exception that does not tell its text
            words = kind
        self.span.end(words, kind)

    # -- sessions ------------------------------------------------------------------------------------------------

    async def open_session(self) -> Session:
        """Open a session that this run will close."""

        async def make() -> list[Session]:
            options = self.options
            return [await self.backend.open(namespace=options.namespace, deadline_s=options.deadline_s)]

        (session,) = await self._owned(make())
        return session

    async def fork_session(self, session: Session, n: int) -> Sequence[Session]:
        """Fork a session; the copies belong to this run too."""

        async def make() -> list[Session]:
            return list(await session.fork(n))

        return await self._owned(make())

    async def _owned(self, work: Coroutine[Any, Any, list[Session]]) -> list[Session]:
        """Wait for sessions that are being made. They belong to this run, also when it is cancelled meanwhile."""

        async def make() -> list[Session]:
            sessions = await work
            self._sessions.extend(sessions)
            return sessions

        task = runner().spawn(make())
        self._making.add(task)
        task.add_done_callback(self._making.discard)
        return await asyncio.shield(task)

    async def release(self, session: Session) -> None:
        """Close a session before the run ends."""
        await close_session(session)
        if session in self._sessions:
            self._sessions.remove(session)

    @property
    def stopping(self) -> bool:
        """Whether the run was cancelled or is over."""
        return self._stop is not None or self._ending

    @property
    def usage(self) -> Usage:
        """Totals over all states."""
        return sum((core.usage for core in self._cores), Usage())

    @property
    def _cores(self) -> list[Core]:
        """The contexts of all states, each once."""
        return list({id(core): core for state in self.states if (core := state.core_or_none) is not None}.values())


async def _give_back(session: Session, core: Core | None) -> None:
    """Close, after a last question."""
    if core is not None:
        await core.keep_decisions()
    await close_session(session)


async def close_session(session: Session) -> None:
    """Close, and only log what goes wrong: the program's own outcome matters more."""
    try:
        await session.close()
    except Exception:
        log.exception("closing a session failed")


async def run_body(state: ProgramState, body: Callable[[ProgramState], Any], label: str) -> Any:
    """Run a sync or async body in a fiber, with ``state`` marked as the one whose body this is."""

    def call() -> Any:
        return finished(body(state))

    token = state.drain.mark_body()
    try:
        return await run_in_fiber(call, f"program {label!r}")
    finally:
        state.drain.unmark_body(token)
        state.body_running = False
