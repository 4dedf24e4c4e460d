"""``/v1/contexts``: contexts as a resource. What no other server offers: pause, resume, fork, rollback, decisions."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from dataclasses import asdict
from typing import Any, TypeVar

from caesura.runtime.api import Handle, PendingCall
from caesura.runtime.errors import ContextClosed, DeadlineExceeded
from caesura.runtime.generation import Finish, TokenChunk
from caesura.runtime.scoring import TextScore, TokenScore, score_own, score_texts, token_text
from caesura.runtime.server.contexts_protocol import (
    AppendRequest,
    ContextPiece,
    ContextRequest,
    ForkRequest,
    GenerateSpec,
    PauseRequest,
    ProgressRequest,
    RollbackRequest,
    ScoreRequest,
    SnapshotRequest,
    TruncateRequest,
)
from caesura.runtime.server.contexts_template import result_pieces
from caesura.runtime.server.errors import ApiError
from caesura.runtime.server.http import event, principal_of, read, reply, stream, until_disconnect
from caesura.runtime.server.kept import namespace_of
from caesura.runtime.server.registry import ContextRegistry, NamedContext
from caesura.runtime.server.state import ServerState
from caesura.runtime.server.textgen import checked_ids
from caesura.runtime.server.work import Aborted, Work
from caesura.runtime.text.tokenizer import encode_pieces
from caesura.runtime.text.tool_parser import parse
from starlette.requests import Request
from starlette.responses import Response

T = TypeVar("T")


class Contexts:
    """The routes."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._service = state.service
        self._contexts: ContextRegistry = state.contexts

    # -- making and ending ------------------------------------------------------------------------------------

    async def create(self, request: Request) -> Response:
        """A new context, with its first pieces."""
        body = await read(request, ContextRequest)
        key_id = principal_of(request).key_id
        ttl_s = min(body.ttl_s or self._state.config.context_ttl_s, self._state.config.context_ttl_s)

        async def make(made: list[NamedContext]) -> dict[str, Any]:
            ids = await self._encode(body.pieces, 0)
            async with self._contexts.room(key_id):
                work = Work(self._service, self._state.board, key_id, "", namespace_of(key_id, body.cache_salt))
                handle = await work.open(body.deadline_s)
                try:
                    if ids:
                        await handle.append(ids)
                except (ContextClosed, DeadlineExceeded):
                    await handle.close()
                    message = f"deadline_s is {body.deadline_s}: it passed before the context had its first pieces"
                    raise ApiError(408, message, param="deadline_s", code="deadline_exceeded") from None
                except BaseException:
                    await handle.close()
                    raise
                made.append(self._contexts.add(key_id, handle, ttl_s))
            return self._described(made[0])

        return await self._made(request, make)

    async def show(self, request: Request) -> Response:
        """A context's id and length."""
        async with self._using(request) as context:
            return reply(self._described(context))

    async def delete(self, request: Request) -> Response:
        """Close a context, aborting what it does."""
        context = self._contexts.get(principal_of(request).key_id, request.path_params["context_id"])
        if context is None:
            raise ApiError(404, "there is no context of this id", code="context_not_found")
        await self._contexts.delete(context)
        return reply({"id": context.id, "deleted": True})

    async def fork(self, request: Request) -> Response:
        """Copies that share the context's KV."""
        body = await read(request, ForkRequest)

        async def make(made: list[NamedContext]) -> dict[str, Any]:
            async with self._using(request) as context, self._contexts.room(context.key_id, body.count):
                work = Work(self._service, self._state.board, context.key_id, "", "")
                handles = await work.fork(context.handle, body.count)
                made += [self._contexts.add(context.key_id, handle, context.ttl_s) for handle in handles]
                for fork in made:
                    fork.snapshots = dict(context.snapshots)
                return {"contexts": [self._described(fork) for fork in made]}

        return await self._made(request, make)

    async def _made(
        self, request: Request, make: Callable[[list[NamedContext]], Coroutine[Any, Any, dict[str, Any]]]
    ) -> Response:
        """The answer that tells of new contexts. A client that leaves before it never learns their names."""
        made: list[NamedContext] = []
        try:
            return reply(await until_disconnect(request, make(made)), 201)
        except BaseException:
            for context in made:
                await self._contexts.delete(context)
            raise

    # -- tokens -----------------------------------------------------------------------------------------------

    async def append(self, request: Request) -> Response:
        """Add pieces, or tool results as the chat template writes them."""
        body = await read(request, AppendRequest)
        async with self._using(request) as context:
            ids = await self._encode(body.pieces, context.handle.num_tokens)
            if body.tool_results:
                ids += await self._state.on_text_thread(lambda: self._results(body))
            if ids:
                await context.handle.append(ids)
            return reply(self._described(context))

    async def truncate(self, request: Request) -> Response:
        """Roll back to the first tokens."""
        body = await read(request, TruncateRequest)
        async with self._using(request) as context:
            await context.roll_back(body.num_tokens)
            return reply(self._described(context))

    async def snapshot(self, request: Request) -> Response:
        """Name the context's present state, to come back to it by ``rollback``."""
        body = await read(request, SnapshotRequest)
        async with self._using(request) as context:
            context.snapshot(body.name)
            return reply({**self._described(context), "snapshots": context.snapshots})

    async def rollback(self, request: Request) -> Response:
        """Back to a snapshot, or to the first tokens."""
        body = await read(request, RollbackRequest)
        if (body.snapshot is None) == (body.num_tokens is None):
            raise ApiError(400, "exactly one of snapshot and num_tokens must be given", param="snapshot")
        async with self._using(request) as context:
            num_tokens = body.num_tokens if body.num_tokens is not None else context.snapshots.get(body.snapshot or "")
            if num_tokens is None:
                known = ", ".join(sorted(context.snapshots)) or "none"
                message = f"there is no snapshot {body.snapshot!r} (known: {known}), or it was rolled over"
                raise ApiError(404, message, param="snapshot", code="snapshot_not_found")
            await context.roll_back(num_tokens)
            return reply({**self._described(context), "snapshots": context.snapshots})

    async def tokens(self, request: Request) -> Response:
        """All token ids."""
        async with self._using(request) as context:
            return reply({"token_ids": await context.handle.token_ids()})

    # -- computing --------------------------------------------------------------------------------------------

    async def prefill(self, request: Request) -> Response:
        """Compute what was appended, so that others can share it."""
        return await self._compute(request, lambda handle: handle.prefill(), "computed_tokens")

    async def score(self, request: Request) -> Response:
        """Logprobs of the context's own tokens, or of texts that could follow it."""
        body = await read(request, ScoreRequest)
        body.check()
        start = body.start
        if start is None:
            return await self._compute(request, lambda handle: self._score_texts(request, handle, body), "options")

        async def own(handle: Handle) -> list[TokenScore]:
            return await score_own(self._service, handle, start)

        return await self._compute(request, own, "tokens", lambda scores: {"logprobs": [one.logprob for one in scores]})

    async def _score_texts(self, request: Request, handle: Handle, body: ScoreRequest) -> list[TextScore]:
        namespace = namespace_of(principal_of(request).key_id, None)
        texts, unconditional = body.texts, body.unconditional
        return await score_texts(self._service, handle, texts, unconditional=unconditional, namespace=namespace)

    async def generate(self, request: Request) -> Response:
        """Generate from the end of the context: events ``chunk`` and ``finish``, or one object without ``stream``."""
        spec = await read(request, GenerateSpec)
        if spec.stream:
            events = self._events(request, spec)
            return await stream(request, events, send_deadline_s=self._state.config.send_deadline_s, named=True)

        async def whole() -> dict[str, Any]:
            text: list[str] = []
            ids: list[int] = []
            logprobs: list[Any] = []
            out: dict[str, Any] = {}
            async with contextlib.aclosing(self._chunks(request, spec)) as chunks:
                async for chunk, finished in chunks:
                    text.append(chunk.text)
                    ids.extend(chunk.token_ids)
                    logprobs += self._logprobs(chunk)
                    out = finished or out
            return {**out, "text": "".join(text), "token_ids": ids, "logprobs": logprobs}

        return reply(await until_disconnect(request, whole()))

    async def _events(self, request: Request, spec: GenerateSpec) -> AsyncGenerator[bytes, None]:
        async with contextlib.aclosing(self._chunks(request, spec)) as chunks:
            async for chunk, finished in chunks:
                if chunk.text or chunk.token_ids:
                    piece = {"text": chunk.text, "token_ids": chunk.token_ids, "logprobs": self._logprobs(chunk)}
                    yield event(piece, "chunk")
                if finished is not None:
                    yield event(finished, "finish")

    async def _chunks(
        self, request: Request, spec: GenerateSpec
    ) -> AsyncGenerator[tuple[TokenChunk, dict[str, Any] | None], None]:
        """Chunks as they come, the last one with the body of the ``finish`` event. What is refused appends nothing."""
        async with self._at_work(request) as work, self._using(request) as context:
            params, calling, before, begun = spec.params(), spec.calling(), context.handle.num_tokens, False
            ids = await self._encode(spec.pieces, before)
            if ids:
                await context.handle.append(ids)
            start, text, count = context.handle.num_tokens, "", 0
            chunks = work.generate(context.handle, params, calling)
            context.cut_off = True
            try:
                async with contextlib.aclosing(chunks):
                    async for chunk in chunks:
                        text, count, finish = text + chunk.text, count + len(chunk.token_ids), chunk.finish
                        begun, context.cut_off = True, finish is None
                        told = None if finish is None else await self._finished(context, spec, finish, start, text)
                        yield chunk, told
                        if told is not None:  # what comes now is too late for this request
                            return
            except Aborted:
                await context.measure()
                finish = Finish("abort", None, (), start, count, 0)
                yield TokenChunk("", (), (), finish), await self._finished(context, spec, finish, start, text)
            except Exception:
                if not begun:
                    with contextlib.suppress(Exception):  # a context that has ended
                        await context.roll_back(before)
                raise

    async def _compute(
        self,
        request: Request,
        do: Callable[[Handle], Awaitable[T]],
        name: str,
        more: Callable[[T], dict[str, Any]] = lambda _: {},
    ) -> Response:
        async def work() -> dict[str, Any]:
            async with self._at_work(request) as at_work, self._using(request) as context:
                try:
                    found = await at_work.unless_aborted(lambda: do(context.handle))
                except Aborted:  # an end like any other; there is no result
                    return {**self._described(context), "reason": "abort"}
                return {name: found, **more(found), **self._described(context)}

        return reply(await until_disconnect(request, work()))

    # -- pausing ----------------------------------------------------------------------------------------------

    async def pause(self, request: Request) -> Response:
        """Tools are about to run; the runtime may use the context's memory for something better meanwhile."""
        body = await read(request, PauseRequest)
        async with self._using(request) as context:
            calls = [PendingCall(call.tool, call.expected_s, call.deadline_s) for call in body.calls]
            await context.handle.pause(calls, body.wait)
            return reply(self._described(context))

    async def progress(self, request: Request) -> Response:
        """A tool says how far it is. Advice, which never stands in the way of another request on this context."""
        body = await read(request, ProgressRequest)
        await self._contexts.expire()
        context = self._present(request)
        self._contexts.touch(context)
        context.handle.report(body.fraction, body.call)
        return reply(self._described(context))

    async def resume(self, request: Request) -> Response:
        """The tools have answered; their results may come along. Without any, idempotent."""
        body = await read(request, AppendRequest)
        async with self._using(request) as context:
            ids = await self._encode(body.pieces, context.handle.num_tokens)
            if body.tool_results:
                ids += await self._state.on_text_thread(lambda: self._results(body))
            if ids:  # first: results that are refused do not end the pause
                await context.handle.append(ids)
            await context.handle.resume()
            return reply(self._described(context))

    async def decisions(self, request: Request) -> Response:
        """What was decided about the context's memory while it paused, and why."""
        decisions = await self._present(request).handle.read_decisions()
        return reply({"decisions": [asdict(decision) for decision in decisions]})

    # -- parts ------------------------------------------------------------------------------------------------

    def _using(self, request: Request) -> contextlib.AbstractAsyncContextManager[NamedContext]:
        return self._contexts.using(principal_of(request).key_id, request.path_params["context_id"])

    def _present(self, request: Request) -> NamedContext:
        """The context, whatever it is doing."""
        context = self._contexts.get(principal_of(request).key_id, request.path_params["context_id"])
        if context is None:
            raise ApiError(404, "there is no context of this id", code="context_not_found")
        if not context.handle.is_open:
            raise ApiError(410, "the context has ended, by its deadline or with its engine", code="context_gone")
        return context

    def _at_work(self, request: Request) -> Work:
        """Counts this request among those at work."""
        return self._state.work(request, rid=None, cache_salt=None)

    def _results(self, body: AppendRequest) -> list[int]:
        pieces = result_pieces(self._service, body.tool_results, body.tools)
        return encode_pieces(self._service.tokenizer, pieces, continuation=True)

    async def _encode(self, pieces: list[ContextPiece], num_before: int) -> list[int]:
        """Token ids of pieces. A context that begins with plain text begins with BOS; templates write their own."""
        tokenizer = self._service.tokenizer

        def encode() -> list[int]:
            ids: list[int] = []
            for piece in pieces:
                if piece.token_ids is not None:
                    ids += checked_ids(tokenizer, piece.token_ids, "token_ids") if piece.token_ids else []
                    continue
                begins = num_before == 0 and not ids
                if begins and not piece.special and tokenizer.bos_id is not None:
                    ids.append(tokenizer.bos_id)
                ids += tokenizer.encode(piece.text or "", allow_special=piece.special, continuation=not begins)
            return ids

        return await self._state.on_text_thread(encode) if pieces else []

    @staticmethod
    def _described(context: NamedContext) -> dict[str, Any]:
        return {"id": context.id, "object": "context", "num_tokens": context.handle.num_tokens}

    def _logprobs(self, chunk: TokenChunk) -> list[dict[str, Any]]:
        """Logprobs with the tokens' texts; ``top_logprobs`` are [token id, logprob, text]."""

        def text(token_id: int) -> str:
            return token_text(self._service.tokenizer, token_id)

        return [
            {
                "token_id": token.token_id,
                "logprob": token.logprob,
                "text": text(token.token_id),
                "top_logprobs": [(other, logprob, text(other)) for other, logprob in token.top_logprobs],
            }
            for token in chunk.logprobs
        ]

    async def _finished(
        self, context: NamedContext, spec: GenerateSpec, finish: Finish, start: int, text: str
    ) -> dict[str, Any]:
        """The end of a generation. ``content`` is the text apart from calls; ``kept_token_ids`` what stays in the
        context when a stop string cut the last tokens off. Null where that is all of it."""
        content = kept = None
        if finish.tool_calls:
            names = [tool.function.name for tool in spec.tools]
            content = parse(text, self._service.tool_format, names, cut_off=finish.cut_off)[0]
        if isinstance(finish.matched, str):
            kept = (await context.handle.token_ids())[start:]
        return {
            **self._described(context),
            "content": content,
            "kept_token_ids": kept,
            "reason": finish.reason,
            "matched": finish.matched,
            "tool_calls": [asdict(call) for call in finish.tool_calls],
            "usage": {
                "prompt_tokens": finish.prompt_tokens,
                "completion_tokens": finish.completion_tokens,
                "cached_tokens": finish.cached_tokens,
            },
        }
