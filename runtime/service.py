"""The door to the engine for asyncio code: an engine on its own thread, contexts as handles.

Coroutines may run on any event loop. Commands reach the engine between two steps; its events come back on
the loop that asked. The engine thread is the only one that touches the engine.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from caesura.runtime.api import PendingCall
from caesura.runtime.build import Runtime, build
from caesura.runtime.config import EngineConfig
from caesura.runtime.engine import Engine, Observer
from caesura.runtime.errors import CaesuraError, ContextClosed, EngineStopped, GrammarError, InvalidRequest
from caesura.runtime.executors.base import SampledToken
from caesura.runtime.futures import shielded
from caesura.runtime.generation import Generation, TokenChunk, ToolCalling
from caesura.runtime.history import History
from caesura.runtime.logs import note
from caesura.runtime.model.grammar import GrammarCompiler
from caesura.runtime.sampling import GRAMMAR_FAULT, Constraint, ConstraintKind, SamplerState, SamplingParams
from caesura.runtime.snapshot import EngineSnapshot, take_snapshot
from caesura.runtime.telemetry import Telemetry, stats_of
from caesura.runtime.text.detokenizer import StopChecker
from caesura.runtime.text.template import ChatTemplate
from caesura.runtime.text.tokenizer import Tokenizer
from caesura.runtime.text.tool_parser import ToolFormat, detect_format, tool_grammar
from caesura.scheduler.context import Call
from caesura.scheduler.types import ContextId, PauseDecision

__all__ = ["ContextHandle", "EngineService", "PendingCall"]

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
        self._stopped_because: Exception | None = None
        self._grammars = GrammarCompiler(runtime.tokenizer)
        self.tool_format = detect_format(runtime.template.source)
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

        handle.id = await self._owned(self.submit(run), lambda context: [context])
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
        self._commands.append(lambda: command(self._engine))
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

    async def _owned(self, future: Future[T], contexts: Callable[[T], Sequence[ContextId]]) -> T:
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
                    break
        self._finish()

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
            self._engine.close(context, reason)
        self._drain()
        self._engine.executor.close()

    def _refuse(self) -> None:
        """Commands that arrive after the end fail in the caller's hands instead of waiting for ever."""
        self._thread.join(timeout=5.0)
        while self._commands:
            self._commands.popleft()()


class ContextHandle:
    """One context, as asyncio code sees it. Made by ``EngineService.open`` and ``fork``."""

    id: ContextId

    def __init__(self, service: EngineService) -> None:
        self._service = service
        self._closed: Exception | None = None
        self.num_tokens = 0
        self.on_closed: Callable[[Exception], None] | None = None  # hears of an end nobody asked for, on any thread

    def _engine_closed(self, reason: Exception) -> None:
        self._closed = reason
        if self.on_closed is not None:
            self.on_closed(reason)

    @property
    def is_open(self) -> bool:
        """Neither closed nor lost with its engine, as far as is known here."""
        return self._closed is None and self._service.ready

    async def _call(self, command: Callable[[Engine], T]) -> T:
        if self._closed is not None:
            raise self._closed
        return await self._service.call(command)

    async def append(self, token_ids: Sequence[int]) -> int:
        """Add tokens; returns the context's new length. Computed with the next request. Raises InvalidRequest for an id
        that the model does not have, be it the tokenizer's."""
        tokens, limit = list(token_ids), self._service.vocab_size
        if tokens and not 0 <= min(tokens) <= max(tokens) < limit:
            wrong = next(token for token in tokens if not 0 <= token < limit)
            raise InvalidRequest(f"token id {wrong} is outside the model's vocabulary: ids are 0 to {limit - 1}")
        self.num_tokens = await self._call(lambda engine: engine.append(self.id, tokens))
        return self.num_tokens

    async def generate(self, params: SamplingParams, tools: ToolCalling | None = None) -> AsyncIterator[TokenChunk]:
        """Generate from the end of the context; the last chunk has ``finish``. Leaving early aborts."""
        sampler, tool_format = await self._prepare(params, tools)
        stops = await _stops_of(params)
        loop = asyncio.get_running_loop()
        chunks: asyncio.Queue[TokenChunk] = asyncio.Queue()

        def sink(chunk: TokenChunk) -> None:
            try:
                loop.call_soon_threadsafe(chunks.put_nowait, chunk)
            except RuntimeError:  # that loop is gone, and with it whoever was listening
                self._service.post(lambda engine: engine.stop(self.id))

        def begin(engine: Engine) -> None:
            names = tuple(str(tool["name"]) for tool in tools.tools) if tools else ()
            sampler.prompt_ids = frozenset(engine.tokens(self.id)) if params.repetition_penalty != 1.0 else frozenset()
            generation = Generation(
                params,
                sampler,
                self._service.tokenizer,
                self._service.tokenizer.eos_ids,
                engine.num_tokens(self.id),
                sink,
                tool_format,
                names,
                stops,
            )
            engine.generate(self.id, generation)

        begun = finished = False
        try:
            await self._call(begin)
            begun = True
            while not finished:
                chunk = await chunks.get()
                finished = chunk.finish is not None
                if chunk.finish is not None and chunk.finish.error is not None:
                    raise self._closed or _failure(chunk.finish.error)
                if finished:
                    self.num_tokens = await self._call(lambda engine: engine.num_tokens(self.id))
                yield chunk
        except asyncio.CancelledError:  # the command may still be on its way
            begun = True
            raise
        finally:
            if begun and not finished:
                self._service.post(lambda engine: engine.stop(self.id))

    async def _prepare(
        self, params: SamplingParams, tools: ToolCalling | None
    ) -> tuple[SamplerState, ToolFormat | None]:
        constraint, tool_format = params.constraint, None
        if tools is not None:
            tool_format = self._service.tool_format
            source = tool_grammar(
                tool_format,
                list(tools.tools),
                choice=tools.choice,
                parallel=tools.parallel,
                special_ids=self._service.tokenizer.special_ids,
            )
            if source is not None and constraint is None:
                constraint = Constraint(ConstraintKind.EBNF, source)
        matcher = None if constraint is None else await self._service.compile(constraint)
        seed = params.seed if params.seed is not None else secrets.randbits(62)
        return SamplerState(params, seed, matcher=matcher), tool_format

    async def score(self, start: int) -> list[float]:
        """Logprobs of the context's tokens from ``start`` (>= 1) on."""
        scores: list[float] = await self._request(lambda engine, done: engine.score(self.id, start, done))
        return scores

    async def score_top(self, start: int, top: int) -> list[SampledToken]:
        """As ``score``, with the ``top`` likeliest tokens in each place."""
        scored: list[SampledToken] = await self._request(
            lambda engine, done: engine.score(self.id, start, done, top=top)
        )
        return scored

    async def prefill(self) -> int:
        """Compute everything appended so far, so that others can share it; returns the number of tokens."""
        computed: int = await self._request(lambda engine, done: engine.prefill(self.id, done))
        return computed

    async def _request(self, begin: Callable[[Engine, Callable[[Any], None]], None]) -> Any:
        answer: Future[Any] = Future()

        def done(result: Any) -> None:
            if isinstance(result, Exception):
                answer.set_exception(self._closed or result)
            else:
                answer.set_result(result)

        try:
            await self._call(lambda engine: begin(engine, done))
            return await shielded(answer)
        except asyncio.CancelledError:
            self._service.post(lambda engine: engine.stop(self.id))
            raise

    async def fork(self, count: int) -> list[ContextHandle]:
        """``count`` copies that share this context's KV."""
        handles = [ContextHandle(self._service) for _ in range(count)]

        def run(engine: Engine) -> list[ContextId]:
            for handle in handles:
                handle.id = engine.fork(self.id, handle._engine_closed)
                handle.num_tokens = engine.num_tokens(handle.id)
            return [handle.id for handle in handles]

        if self._closed is not None:
            raise self._closed
        await self._service._owned(self._service.submit(run), lambda made: made)
        return handles

    async def truncate(self, num_tokens: int) -> None:
        """Roll back to the first ``num_tokens`` tokens."""
        await self._call(lambda engine: engine.truncate(self.id, num_tokens))
        self.num_tokens = num_tokens

    async def pause(self, calls: Sequence[PendingCall], wait: str = "all") -> None:
        """These tools are about to start; the runtime may take the KV for something better."""
        deadlines = [call.deadline_s for call in calls if call.deadline_s is not None]

        def run(engine: Engine) -> None:
            deadline_at = engine.clock.now() + max(deadlines) if deadlines else None
            pending = [Call(call.tool, call.expected_s) for call in calls]
            engine.pause(self.id, pending, wait_any=wait == "any", deadline_at=deadline_at)

        await self._call(run)

    async def resume(self, deadline_s: float | None = None) -> None:
        """The tools have answered. Idempotent. ``deadline_s`` from now takes the place of the context's deadline."""

        def run(engine: Engine) -> None:
            engine.resume(self.id, None if deadline_s is None else engine.clock.now() + deadline_s)

        await self._call(run)

    async def token_ids(self) -> list[int]:
        """The context's tokens."""
        return await self._call(lambda engine: engine.tokens(self.id))

    async def read_decisions(self) -> list[PauseDecision]:
        """As ``decisions``, without blocking the event loop."""
        return await self._call(lambda engine: engine.decisions(self.id))

    def decisions(self) -> list[PauseDecision]:
        """The latest pause decisions, oldest first."""
        return self._service.call_now(lambda engine: engine.decisions(self.id))

    async def close(self) -> None:
        """Close the context, aborting what it does. Idempotent."""
        self._service.post(lambda engine: engine.close(self.id))
        self._closed = self._closed or ContextClosed(f"context {self.id} is closed")


def _failure(reason: str) -> CaesuraError:
    """What a generation that failed for ``reason`` raises: a grammar at fault is the request's."""
    return GrammarError(reason) if reason.startswith(GRAMMAR_FAULT) else ContextClosed(reason)


async def _stops_of(params: SamplingParams) -> StopChecker | None:
    """What looks for the stops of a generation. Patterns are compiled on a thread of their own."""
    if params.stop_regex:
        return await asyncio.to_thread(StopChecker, params.stop, params.stop_regex)
    return StopChecker(params.stop) if params.stop else None
