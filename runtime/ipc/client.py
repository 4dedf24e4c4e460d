"""An engine in a process of its own, with the interface of ``EngineService``. Loads no torch."""

from __future__ import annotations

import asyncio
import operator
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from caesura.runtime.api import PendingCall, checked_share
from caesura.runtime.config import EngineConfig
from caesura.runtime.errors import CaesuraError, ContextClosed, EngineStopped
from caesura.runtime.executors.base import SampledToken
from caesura.runtime.futures import shielded
from caesura.runtime.generation import TokenChunk, ToolCalling
from caesura.runtime.ipc import messages as m
from caesura.runtime.ipc.connection import Connection, State, Supervision
from caesura.runtime.sampling import SamplingParams
from caesura.runtime.snapshot import EngineSnapshot
from caesura.runtime.text.template import ChatTemplate, load_template
from caesura.runtime.text.tokenizer import Tokenizer, load_tokenizer
from caesura.runtime.text.tool_parser import detect_format
from caesura.scheduler.types import ContextId, PauseDecision

A = TypeVar("A", bound=m.Answer)


@dataclass(frozen=True, slots=True)
class _Sent(Generic[A]):
    """A request on its way: the future of its answer, its number, and the engine process it went to."""

    future: Future[A]
    number: int
    life: int


class EngineClient:
    """The client of one engine process, which is restarted when it dies. Coroutines may run on any event loop.

    While no engine is ready, and for contexts of one that died, every call raises EngineStopped with the reason.
    """

    def __init__(self, connection: Connection, tokenizer: Tokenizer, template: ChatTemplate, model_name: str) -> None:
        self._connection = connection
        self.tokenizer = tokenizer
        self.template = template
        self.tool_format = detect_format(template.source)
        self.model_name = model_name
        self._handles: weakref.WeakValueDictionary[tuple[int, ContextId], RemoteHandle] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()
        connection.on_context_closed = self._context_closed

    @classmethod
    def start(cls, config: EngineConfig | None = None, supervision: Supervision | None = None) -> EngineClient:
        """Start the engine process and wait until it is ready. Raises what building the engine raised there."""
        config = config or EngineConfig()
        connection = Connection(config, supervision or Supervision())
        try:
            folder = Path(connection.started.result().folder)
            tokenizer = load_tokenizer(folder)
            return cls(connection, tokenizer, load_template(folder, tokenizer), config.model)
        except BaseException:
            connection.close(0.0)
            raise

    @property
    def ready(self) -> bool:
        """The engine process takes requests."""
        return self._connection.state is State.READY

    @property
    def lost(self) -> EngineStopped | None:
        """Why the engine is not restarted any more."""
        return self._connection.given_up

    @property
    def life(self) -> int:
        """Counts engine processes: what was said to an earlier one, or learned of it, holds no more."""
        return self._connection.life

    @property
    def state(self) -> State:
        """Where the engine process is in its life."""
        return self._connection.state

    @property
    def engine_pid(self) -> int | None:
        """The engine's process id; None while there is none."""
        return self._connection.pid

    async def open(self, namespace: str = "", deadline_s: float | None = None) -> RemoteHandle:
        """A new, empty context; closed with DeadlineExceeded after ``deadline_s`` seconds."""
        answer, life = await self._ask(
            m.Opened,
            lambda number: m.Open(number, namespace, deadline_s),
            unwanted=lambda late, life: self._connection.post(m.Close(late.context), life),
        )
        return self._handle(answer.context, life)

    async def flush_cache(self) -> None:
        """Forget every cached prefix no context holds."""
        await self._ask(m.Done, m.FlushCache)

    async def hold(self, *, retract: bool) -> None:
        """No steps until ``go_on``: contexts stay as they are and wait. ``retract`` gives up their KV and the cache."""
        await self._ask(m.Done, lambda number: m.Hold(number, retract))

    async def go_on(self) -> None:
        """Take steps again. Idempotent."""
        await self._ask(m.Done, m.GoOn)

    async def read_stats(self) -> dict[str, Any]:
        """The running account and the pools; under ``ipc`` restarts and dropped frames."""
        answer, _ = await self._ask(m.Account, m.Stats)
        return answer.values

    async def read_snapshot(self, since: int = 0) -> EngineSnapshot:
        """The engine as it is, and what happened after event ``since``."""
        answer, _ = await self._ask(m.Seen, lambda number: m.Look(number, since))
        return answer.snapshot

    def stats(self) -> dict[str, Any]:
        """As ``read_stats``, blocking the calling thread."""
        return self._submit(m.Account, m.Stats).future.result().values

    def close(self, drain_s: float = 0.0) -> None:
        """Take no new contexts, let requests finish for up to ``drain_s``, end the process. Blocks. Idempotent."""
        self._connection.close(drain_s)

    async def aclose(self, drain_s: float = 0.0) -> None:
        """As ``close``, without blocking the event loop."""
        await asyncio.to_thread(self._connection.close, drain_s)

    def __enter__(self) -> EngineClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- plumbing ---------------------------------------------------------------------------------------------

    def _submit(self, kind: type[A], make: Callable[[int], m.Command], life: int | None = None) -> _Sent[A]:
        """Send a request."""
        future: Future[A] = Future()

        def sink(answer: m.Answer | CaesuraError) -> None:
            if isinstance(answer, kind):
                future.set_result(answer)
            else:
                future.set_exception(_as_error(answer))

        return _Sent(future, *self._connection.request(make, sink, life))

    async def _ask(
        self,
        kind: type[A],
        make: Callable[[int], m.Command],
        life: int | None = None,
        unwanted: Callable[[A, int], None] | None = None,
        *,
        stops: bool = False,
    ) -> tuple[A, int]:
        """A request and its answer, with the number of the engine process that gave it.

        When the caller is cancelled the request is aborted if it ``stops``, else it runs anyway; ``unwanted`` gets the
        answer that nobody waits for any more, whenever it comes.
        """
        sent = self._submit(kind, make, life)
        try:
            # Shielded: a cancelled caller must not cancel the future, or an answer on its way could get lost.
            return await shielded(sent.future), sent.life
        except asyncio.CancelledError:
            if stops:
                self._connection.post(m.Stop(sent.number), sent.life)
            if unwanted is not None:
                late = unwanted
                sent.future.add_done_callback(lambda done: done.exception() or late(done.result(), sent.life))
            raise

    def _handle(self, context: ContextId, life: int, num_tokens: int = 0) -> RemoteHandle:
        handle = RemoteHandle(self, self._connection, context, life, num_tokens)
        with self._lock:
            self._handles[life, context] = handle
        return handle

    def _context_closed(self, life: int, context: ContextId, reason: CaesuraError) -> None:
        with self._lock:
            handle = self._handles.get((life, context))
        if handle is not None:
            handle._closed = handle._closed or reason


class RemoteHandle:
    """One context of the engine process. Made by ``EngineClient.open`` and ``fork``."""

    def __init__(
        self, client: EngineClient, connection: Connection, context: ContextId, life: int, num_tokens: int
    ) -> None:
        self._client = client
        self._connection = connection
        self._life = life
        self._closed: CaesuraError | None = None
        self.id = context
        self.num_tokens = num_tokens

    @property
    def is_open(self) -> bool:
        """Neither closed nor lost with its engine, as far as is known here."""
        return self._closed is None and self._connection.life == self._life

    async def _ask(
        self,
        kind: type[A],
        make: Callable[[int], m.Command],
        *,
        stops: bool = False,
        unwanted: Callable[[A, int], None] | None = None,
    ) -> A:
        """A request about this context."""
        if self._closed is not None:
            raise self._closed
        answer, _ = await self._client._ask(kind, make, self._life, unwanted, stops=stops)
        return answer

    async def append(self, token_ids: Sequence[int]) -> int:
        """Add tokens; returns the context's new length. Computed with the next request."""
        tokens = tuple(token_ids)
        answer = await self._ask(m.Length, lambda number: m.Append(number, self.id, tokens))
        self.num_tokens = answer.num_tokens
        return answer.num_tokens

    async def generate(self, params: SamplingParams, tools: ToolCalling | None = None) -> AsyncIterator[TokenChunk]:
        """Generate from the end of the context; the last chunk has ``finish``. Leaving early aborts."""
        if self._closed is not None:
            raise self._closed
        loop = asyncio.get_running_loop()
        answers: asyncio.Queue[m.Answer | CaesuraError] = asyncio.Queue()
        listening = True

        def sink(answer: m.Answer | CaesuraError) -> None:
            nonlocal listening
            try:
                loop.call_soon_threadsafe(answers.put_nowait, answer)
            except RuntimeError:  # that loop is gone, and with it whoever was listening
                if listening:
                    listening = False
                    self._connection.post(m.Stop(number), self._life)

        number, _ = self._connection.request(
            lambda number: m.Generate(number, self.id, params, tools), sink, self._life
        )
        finished = False
        try:
            while not finished:
                answer = await answers.get()
                if not isinstance(answer, m.Chunk):
                    finished = True
                    raise self._closed or _as_error(answer)
                if answer.num_tokens is not None:
                    finished = True
                    self.num_tokens = answer.num_tokens
                yield answer.chunk
        finally:
            if not finished:
                self._connection.post(m.Stop(number), self._life)

    async def score(self, start: int) -> list[float]:
        """Logprobs of the context's tokens from ``start`` (>= 1) on."""
        return (await self._ask(m.Scores, lambda number: m.Score(number, self.id, start), stops=True)).logprobs

    async def score_top(self, start: int, top: int) -> list[SampledToken]:
        """As ``score``, with the ``top`` likeliest tokens in each place."""
        ask = self._ask(m.ScoredTokens, lambda number: m.Score(number, self.id, start, top), stops=True)
        return (await ask).tokens

    async def prefill(self) -> int:
        """Compute everything appended so far, so that others can share it; returns the number of tokens."""
        return (await self._ask(m.Length, lambda number: m.Prefill(number, self.id), stops=True)).num_tokens

    async def fork(self, count: int) -> list[RemoteHandle]:
        """``count`` copies that share this context's KV."""

        def unwanted(late: m.Forked, life: int) -> None:
            for context in late.contexts:
                self._connection.post(m.Close(context), life)

        answer = await self._ask(m.Forked, lambda number: m.Fork(number, self.id, count), unwanted=unwanted)
        return [self._client._handle(context, self._life, answer.num_tokens) for context in answer.contexts]

    async def truncate(self, num_tokens: int) -> None:
        """Roll back to the first ``num_tokens`` tokens."""
        await self._ask(m.Done, lambda number: m.Truncate(number, self.id, num_tokens))
        self.num_tokens = num_tokens

    async def pause(self, calls: Sequence[PendingCall], wait: str = "all", deadline_s: float | None = None) -> None:
        """These tools are about to start; the runtime may take the KV for something better. ``deadline_s``
        from now takes the place of the context's deadline."""
        pending = tuple(calls)
        await self._ask(m.Done, lambda number: m.Pause(number, self.id, pending, wait, deadline_s))

    def report(self, fraction: float, call: int = 0) -> None:
        """Tool ``call`` of the pause has done this share of its work. Posted: what follows comes after it."""
        self._connection.post(m.Report(self.id, checked_share(fraction), operator.index(call)), self._life)

    async def resume(self, deadline_s: float | None = None) -> None:
        """The tools have answered. Idempotent. ``deadline_s`` from now takes the place of the context's deadline."""
        await self._ask(m.Done, lambda number: m.Resume(number, self.id, deadline_s))

    async def token_ids(self) -> list[int]:
        """The context's tokens."""
        return (await self._ask(m.TokenIds, lambda number: m.Tokens(number, self.id))).token_ids

    async def read_decisions(self) -> list[PauseDecision]:
        """The latest pause decisions, oldest first."""
        return (await self._ask(m.Decided, lambda number: m.Decisions(number, self.id))).decisions

    def decisions(self) -> list[PauseDecision]:
        """As ``read_decisions``, blocking the calling thread."""
        sent = self._client._submit(m.Decided, lambda number: m.Decisions(number, self.id), self._life)
        return sent.future.result().decisions

    async def close(self) -> None:
        """Close the context, aborting what it does. Idempotent."""
        self._connection.post(m.Close(self.id), self._life)
        self._closed = self._closed or ContextClosed(f"context {self.id} is closed")


def _as_error(answer: m.Answer | CaesuraError) -> CaesuraError:
    if isinstance(answer, CaesuraError):
        return answer
    if isinstance(answer, m.Failed):
        return m.revive(answer.error)
    return EngineStopped(f"the engine answered with {type(answer).__name__}, which was not asked for")
