"""``/v1/responses``: one answer as typed items and events; the next one may go on from it by its id alone."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import msgspec
from caesura.runtime.server import limits
from caesura.runtime.server.answer import AnswerReader, Delta, Ended, usage
from caesura.runtime.server.chat_protocol import ChatRequest, Message
from caesura.runtime.server.chat_work import Before, ChatWork
from caesura.runtime.server.errors import ApiError
from caesura.runtime.server.guard import refuse
from caesura.runtime.server.http import (
    DONE,
    START_WAIT_S,
    event,
    principal_of,
    read,
    reply,
    settled,
    stream,
    until_disconnect,
)
from caesura.runtime.server.responses_items import check_calls, items_of, listed, message_of, messages_of
from caesura.runtime.server.responses_output import Event, ResponseBuilder
from caesura.runtime.server.responses_protocol import InputItem, ResponsesRequest
from caesura.runtime.server.responses_store import BYTES_PER_TOKEN, StoredResponse
from caesura.runtime.server.state import ServerState
from caesura.runtime.server.work import Work
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope


@dataclass(frozen=True, slots=True)
class _Asked:
    """A checked request. ``messages`` is the conversation without the instructions, ``items`` what is new in it."""

    body: ResponsesRequest
    key_id: str
    items: list[InputItem]
    messages: list[Message]
    chat: ChatRequest
    before: Before | None
    bytes_before: int


class Responses:
    """The routes."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._store = state.responses
        self._answers = ChatWork(state)
        self._running: dict[tuple[str, str], ResponseBuilder] = {}

    async def create(self, request: Request) -> Response:
        """Answer, and keep the answer unless ``store`` is false."""
        body = await read(request, ResponsesRequest)
        body.check()
        asked = self._asked(body, principal_of(request).key_id)
        work = self._state.work(request, rid=None, cache_salt=body.cache_salt)
        builder = ResponseBuilder(f"resp_{work.request_id}", self._state.model_name, body.echo())
        if body.stream:
            events = self._stream(request.scope, asked, work, builder)
            return await stream(request, events, send_deadline_s=self._state.config.send_deadline_s, named=True)
        return reply(await until_disconnect(request, self._whole(asked, work, builder)))

    async def show(self, request: Request) -> Response:
        """A stored response."""
        if request.query_params.get("stream", "false") not in ("false", "0"):
            raise ApiError(400, "a stored response cannot be streamed again", param="stream")
        return reply(self._get(request).body)

    async def input_items(self, request: Request) -> Response:
        """What a stored response answered: its own input, newest first unless ``order=asc``."""
        found = self._get(request)
        data = listed(found.items, found.id.replace("resp_", "in_"))
        if request.query_params.get("order", "desc") != "asc":
            data.reverse()
        first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        return reply({"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": False})

    async def delete(self, request: Request) -> Response:
        """Forget a response, and the context that waits for its calls."""
        found = self._store.delete(principal_of(request).key_id, request.path_params["response_id"])
        if found.answer is not None:
            await self._state.kept.drop(found.answer)
        return reply({"id": found.id, "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        """End a response that is being made. One that has ended stays as it is."""
        key_id, response_id = principal_of(request).key_id, str(request.path_params["response_id"])
        running = self._running.get((key_id, response_id))
        if running is not None and await self._state.board.abort(key_id, response_id.removeprefix("resp_")):
            return reply({**running.response(), "status": "cancelled"})
        found = self._get(request)
        raise ApiError(400, f"the response is {found.body['status']}: there is nothing to cancel", code="not_running")

    def _get(self, request: Request) -> StoredResponse:
        return self._store.get(principal_of(request).key_id, request.path_params["response_id"])

    # -- what was asked ---------------------------------------------------------------------------------------

    def _asked(self, body: ResponsesRequest, key_id: str) -> _Asked:
        """Put the conversation together. Raises ApiError."""
        items = items_of(body.input)
        before: Before | None = None
        messages: list[Message] = []
        num_bytes = 0
        first = [Message("system", body.instructions)] if body.instructions else []
        if body.previous_response_id is not None:
            try:
                previous = self._store.get(key_id, body.previous_response_id)
            except ApiError as error:
                raise ApiError(
                    400, error.message, param="previous_response_id", code="previous_response_not_found"
                ) from None
            messages, num_bytes = list(previous.messages), previous.message_bytes
            if previous.answer is not None:
                before = Before(previous.answer, len(first) + len(messages))
        messages += messages_of(items)
        if not messages or len(messages) >= limits.MAX_MESSAGES:
            raise ApiError(400, f"the conversation must have 1 to {limits.MAX_MESSAGES - 1} messages", param="input")
        check_calls(messages)
        return _Asked(body, key_id, items, messages, body.as_chat([*first, *messages]), before, num_bytes)

    # -- the two shapes of an answer --------------------------------------------------------------------------

    async def _whole(self, asked: _Asked, work: Work, builder: ResponseBuilder) -> dict[str, Any]:
        async with contextlib.aclosing(self._events(asked, work, builder)) as events:
            async for _ in events:
                pass
        return builder.response()

    async def _stream(
        self, scope: Scope, asked: _Asked, work: Work, builder: ResponseBuilder
    ) -> AsyncGenerator[bytes, None]:
        """Events as they come, numbered. What fails soon, and before anything was told, is an ordinary error."""
        numbers = itertools.count()

        def told(one: Event) -> bytes:
            return event({**one, "sequence_number": next(numbers)}, one["type"])

        begin = builder.begin()
        async with contextlib.aclosing(self._events(asked, work, builder)) as events:
            first = asyncio.ensure_future(anext(events, None))
            try:
                await asyncio.wait({first}, timeout=START_WAIT_S / 2)
                if first.done():
                    first.result()
                for one in begin:
                    yield told(one)
                try:
                    found = await first
                    while found is not None:
                        yield told(found)
                        found = await anext(events, None)
                except Exception as error:
                    for one in builder.fail(refuse(scope, error)):
                        yield told(one)
            finally:
                first.cancel()
                await settled(asyncio.gather(first, return_exceptions=True))
        yield told(builder.finish())
        yield DONE

    async def _events(self, asked: _Asked, work: Work, builder: ResponseBuilder) -> AsyncGenerator[Event, None]:
        """Everything between the response's beginning and its end."""
        body = asked.body
        readers: dict[int, AnswerReader] = {}
        answers = self._answers.run(
            asked.chat,
            work,
            readers,
            before=asked.before,
            remember=body.stores,
            truncate=body.truncation == "auto",
        )
        async with work, contextlib.aclosing(answers) as items:
            self._running[asked.key_id, builder.id] = builder
            try:
                async for item in items:
                    if isinstance(item, Delta):
                        for one in builder.take(item):
                            yield one
                    elif isinstance(item, Ended):
                        for one in builder.end(item, usage([item.finish], None, item.reasoning_tokens)):
                            yield one
                        self._keep(asked, builder, readers[item.choice])
            finally:
                self._running.pop((asked.key_id, builder.id), None)

    def _keep(self, asked: _Asked, builder: ResponseBuilder, reader: AnswerReader) -> None:
        """Store the response, before its client hears of its end."""
        if not asked.body.stores:
            return
        answer = message_of(reader.content, builder.calls)
        answer.reasoning_content = reader.reasoning or None
        response = builder.response()
        message_bytes = asked.bytes_before + len(msgspec.json.encode([asked.items, answer]))
        num_bytes = message_bytes + len(msgspec.json.encode(response))
        if reader.kept is not None:
            num_bytes += BYTES_PER_TOKEN * len(reader.kept.token_ids)
        messages = (*asked.messages, answer)
        self._store.put(
            StoredResponse(asked.key_id, response, asked.items, messages, reader.kept, num_bytes, message_bytes)
        )
