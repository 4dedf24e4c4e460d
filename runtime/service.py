"""The door to the engine for asyncio code: an engine on its own thread, contexts as handles.

Coroutines may run on any event loop. Commands reach the engine between two steps; its events come back on
the loop that asked. The engine thread is the only one that touches the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from caesura.runtime.build import Runtime, build
from caesura.runtime.config import EngineConfig
from caesura.runtime.engine import Engine, Observer
from caesura.runtime.errors import EngineStopped
from caesura.runtime.futures import shielded
from caesura.runtime.handle import ContextHandle
from caesura.runtime.history import History
from caesura.runtime.logs import note
from caesura.runtime.model.grammar import GrammarCompiler
from caesura.runtime.sampling import Constraint
from caesura.runtime.snapshot import EngineSnapshot, take_snapshot
from caesura.runtime.telemetry import Telemetry, stats_of
from caesura.runtime.text.reasoning import detect_marks
from caesura.runtime.text.template import ChatTemplate
from caesura.runtime.text.tokenizer import Tokenizer
from caesura.runtime.text.tool_parser import detect_format
from caesura.scheduler.types import ContextId

T = TypeVar("T")
log = logging.getLogger("caesura.engine")
MAX_FAILED_STEPS = 3
GRAMMAR_DEADLINE_S = 5.0


class EngineService:
    """An engine thread and its command queue. ``start`` builds it, ``close`` ends it; both may block."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._engine = runtime.engine
        self._telemetry = Telemetry(runtime.engine)
        self._history = History()
        self._engine.observers.append(self._history)
        self._commands: deque[Callable[[], object]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._engine.inbox = lambda: bool(self._commands) or self._stopping
        self._stopped_because: Exception | None = None
        self._grammars = GrammarCompiler(runtime.tokenizer)
        self.tool_format = detect_format(runtime.template.source)
        self.think_marks = detect_marks(runtime.template.source)
        self._thread = threading.Thread(target=self._run, name="caesura-engine", daemon=True)
        self._thread.start()

    @property
    def vocab_size(self) -> int:
        """Token ids that the model has an embedding for: 0 to this less one."""
        return self._runtime.vocab_size

    @classmethod
    def start(cls, config: EngineConfig | None = None) -> EngineService:
        """Build an engine and run it on a thread of its own."""
        return cls(build(config or EngineConfig()))

    @property
    def ready(self) -> bool:
        """The engine thread takes commands."""
        return self._thread.is_alive() and not self._stopping and self._stopped_because is None

    @property
    def lost(self) -> EngineStopped | None:
        """Why the engine has failed for good."""
        return None if self._stopping or self._stopped_because is None else self.stopped()

    @property
    def life(self) -> int:
        """Counts engines: this one is never replaced."""
        return 0

    @property
    def tokenizer(self) -> Tokenizer:
        return self._runtime.tokenizer

    @property
    def template(self) -> ChatTemplate:
        return self._runtime.template

    @property
    def model_name(self) -> str:
        return self._runtime.model_name

    async def open(self, namespace: str = "", deadline_s: float | None = None) -> ContextHandle:
        """A new, empty context; closed with DeadlineExceeded after ``deadline_s`` seconds."""
        handle = ContextHandle(self)

        def run(engine: Engine) -> ContextId:
            deadline_at = None if deadline_s is None else engine.clock.now() + deadline_s
            return engine.open(namespace, deadline_at, handle._engine_closed)

        handle.id = await self.owned(self.submit(run), lambda context: [context])
        return handle

    async def flush_cache(self) -> None:
        """Forget every cached prefix no context holds."""
        await self.call(lambda engine: engine.flush_cache())

    async def hold(self, *, retract: bool) -> None:
        """No steps until ``go_on``: contexts stay as they are and wait. ``retract`` gives up their KV and the cache."""
        await self.call(lambda engine: engine.hold(retract=retract))

    async def go_on(self) -> None:
        """Take steps again. Idempotent."""
        await self.call(lambda engine: engine.go_on())

    async def read_stats(self) -> dict[str, Any]:
        """As ``stats``, without blocking the event loop."""
        return await self.call(self._account)

    def stats(self) -> dict[str, Any]:
        """The running account and the pools, as of now."""
        return self.call_now(self._account)

    async def read_snapshot(self, since: int = 0) -> EngineSnapshot:
        """The engine as it is, and what happened after event ``since``."""
        return await self.call(lambda engine: take_snapshot(engine, self._history, since))

    def _account(self, engine: Engine) -> dict[str, Any]:
        return {**stats_of(engine), "telemetry": self._telemetry.account(engine)}

    def observe(self, observer: Observer) -> None:
        """Let ``observer`` see every step from now on (called on the engine thread)."""
        self.call_now(lambda engine: engine.observers.append(observer))

    def close(self) -> None:
        """Stop the thread and free the pools. Contexts still open get ContextClosed. Idempotent."""
        self._stopping = True
        self._wake.set()
        self._grammars.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> EngineService:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stopped(self) -> EngineStopped:
        """Why the engine no longer runs."""
        cause = self._stopped_because
        if isinstance(cause, EngineStopped):
            return cause
        return EngineStopped(f"the engine stopped: {cause}" if cause else "the engine was closed")

    # -- commands ---------------------------------------------------------------------------------------------

    def post(self, command: Callable[[Engine], object]) -> None:
        """Run on the engine thread between two steps; nobody waits for it."""

        def run() -> None:
            if self._stopped_because is None:
                command(self._engine)

        self._commands.append(run)
        self._wake.set()

    def submit(self, command: Callable[[Engine], T]) -> Future[T]:
        """Run on the engine thread between two steps; the future carries result or error."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if self._stopped_because is not None:  # nobody would step what this began
                    raise self.stopped()
                future.set_result(command(self._engine))
            except Exception as error:
                future.set_exception(error)

        self._commands.append(run)
        self._wake.set()
        if self._stopped_because is not None or not self._thread.is_alive():
            self._refuse()
        return future

    async def owned(self, future: Future[T], contexts: Callable[[T], Sequence[ContextId]]) -> T:
        """Await contexts being made; if the caller is cancelled meanwhile, close them, for nobody else will."""
        try:
            return await shielded(future)
        except asyncio.CancelledError:

            def close(made: Future[T]) -> None:
                for context in contexts(made.result()) if made.exception() is None else ():
                    self.post(lambda engine, context=context: engine.close(context))  # type: ignore[misc]

            future.add_done_callback(close)
            raise

    async def call(self, command: Callable[[Engine], T]) -> T:
        """``submit``, awaited. The command runs even if the caller is cancelled meanwhile."""
        return await shielded(self.submit(command))

    def call_now(self, command: Callable[[Engine], T]) -> T:
        """``submit``, waited for by the calling thread."""
        return self.submit(command).result()

    async def compile(self, constraint: Constraint) -> Any:
        """A matcher for ``constraint``, compiled outside the engine loop."""
        return await self._grammars.compile_async(constraint, deadline_s=GRAMMAR_DEADLINE_S)

    # -- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # of a command that nobody waits for
            note(log, logging.ERROR, "engine_failed", exc_info=True)
            self._stopped_because = error
        self._finish()

    def _work(self) -> None:
        failures = 0
        while not self._stopping:
            self._drain()
            if not self._engine.has_work and not self._deadline_due():
                self._sleep()
                continue
            if self._engine.held:
                self._engine.expire()
                continue
            try:
                self._engine.step()
                failures = 0
            except Exception as error:  # the contexts of the step have been told; the others go on
                failures += 1
                note(log, logging.ERROR, "step_failed", exc_info=True, in_a_row=failures)
                if failures >= MAX_FAILED_STEPS:
                    self._stopped_because = error
                    return

    def _drain(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _deadline_due(self) -> bool:
        deadline = self._engine.next_deadline()
        return deadline is not None and self._engine.clock.now() >= deadline

    def _sleep(self) -> None:
        deadline = self._engine.next_deadline()
        timeout_s = None if deadline is None else max(0.0, deadline - self._engine.clock.now())
        self._wake.wait(timeout_s)
        self._wake.clear()

    def _finish(self) -> None:
        reason = self.stopped()
        self._stopped_because = self._stopped_because or reason
        for context in list(self._engine.scheduler.contexts):
            with contextlib.suppress(Exception):  # what is broken may be its accounting; it has been told
                self._engine.close(context, reason)
        self._drain()
        self._engine.executor.close()

    def _refuse(self) -> None:
        """Commands that arrive after the end fail in the caller's hands instead of waiting for ever."""
        self._thread.join(timeout=5.0)
        while self._commands:
            self._commands.popleft()()
