"""One context of an engine on its own thread, as asyncio code sees it."""

from __future__ import annotations

import asyncio
import operator
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from caesura.runtime.api import PendingCall, checked_share
from caesura.runtime.engine import Engine
from caesura.runtime.errors import CaesuraError, ContextClosed, GrammarError, InvalidRequest
from caesura.runtime.executors.base import SampledToken
from caesura.runtime.futures import shielded
from caesura.runtime.generation import Generation, TokenChunk, ToolCalling
from caesura.runtime.sampling import GRAMMAR_FAULT, Constraint, ConstraintKind, SamplerState, SamplingParams
from caesura.runtime.text.detokenizer import StopChecker
from caesura.runtime.text.reasoning import ends_thinking, opens_thinking
from caesura.runtime.text.think_grammar import after_thinking
from caesura.runtime.text.tool_parser import ToolFormat, tool_grammar
from caesura.scheduler.context import Call
from caesura.scheduler.types import ContextId, PauseDecision

if TYPE_CHECKING:
    from caesura.runtime.service import EngineService

T = TypeVar("T")
PROMPT_END_TOKENS = 32  # that show whether a template has opened or ended the thinking


@dataclass(slots=True)
class _Request:
    """What the engine thread knows of a request."""

    begun: bool = False  # the engine took it on
    ended: bool = False


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
        tokens = list(token_ids)
        self._check_ids(tokens)
        self.num_tokens = await self._call(lambda engine: engine.append(self.id, tokens))
        return self.num_tokens

    def _check_ids(self, token_ids: Sequence[int], field: str = "") -> None:
        limit = self._service.vocab_size
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < limit:
            wrong = next(token for token in token_ids if not 0 <= token < limit)
            raise InvalidRequest(f"{field}token id {wrong} is outside the model's vocabulary: ids are 0 to {limit - 1}")

    async def generate(self, params: SamplingParams, tools: ToolCalling | None = None) -> AsyncIterator[TokenChunk]:
        """Generate from the end of the context; the last chunk has ``finish``. Leaving early aborts. Raises
        InvalidRequest for a token in ``logit_bias`` or ``stop_token_ids`` that the model does not have."""
        self._check_ids([token for token, _ in params.logit_bias], "logit_bias: ")
        self._check_ids(params.stop_token_ids, "stop_token_ids: ")
        sampler, tool_format = await self._prepare(params, tools)
        stops = await _stops_of(params)
        loop = asyncio.get_running_loop()
        chunks: asyncio.Queue[TokenChunk] = asyncio.Queue()
        request = _Request()

        def begin(engine: Engine) -> None:
            def sink(chunk: TokenChunk) -> None:
                request.ended = chunk.finish is not None
                if chunk.finish is not None and chunk.finish.error is None:
                    self.num_tokens = engine.num_tokens(self.id)
                try:
                    loop.call_soon_threadsafe(chunks.put_nowait, chunk)
                except RuntimeError:  # that loop is gone, and with it whoever was listening
                    self._stop(request)

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
            request.begun = True

        finished = False
        try:
            await self._call(begin)
            while not finished:
                chunk = await chunks.get()
                finished = chunk.finish is not None
                if chunk.finish is not None and chunk.finish.error is not None:
                    raise self._closed or _failure(chunk.finish.error)
                yield chunk
        finally:
            if not finished:
                self._stop(request)

    def _stop(self, request: _Request) -> None:
        """Abort a request, also one that is still on its way to the engine; never another one of this context."""

        def run(engine: Engine) -> None:
            if request.begun and not request.ended:
                engine.stop(self.id)

        self._service.post(run)

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
                constraint = await self._after_thinking(Constraint(ConstraintKind.EBNF, source))
        matcher = None if constraint is None else await self._service.compile(constraint)
        seed = params.seed if params.seed is not None else secrets.randbits(62)
        return SamplerState(params, seed, matcher=matcher), tool_format

    async def _after_thinking(self, constraint: Constraint) -> Constraint:
        """The grammar of calls, which begins where the thinking of a model that thinks has ended."""
        marks, tokenizer = self._service.think_marks, self._service.tokenizer
        if marks is None:
            return constraint
        ids = await self._call(lambda engine: engine.tokens(self.id)[-PROMPT_END_TOKENS:])
        end = tokenizer.decode(ids, skip_special=False)
        if ends_thinking(end, marks):
            return constraint
        opened = opens_thinking(end, marks)
        return after_thinking(constraint, marks, opened=opened, special_ids=tokenizer.special_ids)

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
        request = _Request()

        def run(engine: Engine) -> None:
            begin(engine, done)
            request.begun = True

        def done(result: Any) -> None:
            request.ended = True
            if isinstance(result, Exception):
                answer.set_exception(self._closed or result)
            else:
                answer.set_result(result)

        try:
            await self._call(run)
            return await shielded(answer)
        except asyncio.CancelledError:
            self._stop(request)
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
        await self._service.owned(self._service.submit(run), lambda made: made)
        return handles

    async def truncate(self, num_tokens: int) -> None:
        """Roll back to the first ``num_tokens`` tokens."""
        await self._call(lambda engine: engine.truncate(self.id, num_tokens))
        self.num_tokens = num_tokens

    async def pause(self, calls: Sequence[PendingCall], wait: str = "all", deadline_s: float | None = None) -> None:
        """These tools are about to start; the runtime may take the KV for something better. ``deadline_s``
        from now takes the place of the context's deadline."""
        deadlines = [call.deadline_s for call in calls if call.deadline_s is not None]

        def run(engine: Engine) -> None:
            now = engine.clock.now()
            deadline_at = now + max(deadlines) if deadlines else None
            lives_until = None if deadline_s is None else now + deadline_s
            pending = [Call(call.tool, call.expected_s) for call in calls]
            engine.pause(self.id, pending, wait_any=wait == "any", deadline_at=deadline_at, lives_until=lives_until)

        await self._call(run)

    def report(self, fraction: float, call: int = 0) -> None:
        """Tool ``call`` of the pause has done this share of its work. Posted: what follows comes after it."""
        share, number = checked_share(fraction), operator.index(call)
        if self.is_open:
            self._service.post(lambda engine: engine.report(self.id, share, number))

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
