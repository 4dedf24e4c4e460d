"""``POST /v1/chat/completions``. A tool call is a pause: the next request goes on in the same context."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any

from caesura.runtime.server.answer import AnswerReader, Delta, Ended, usage
from caesura.runtime.server.chat_protocol import ChatRequest
from caesura.runtime.server.chat_work import ChatWork
from caesura.runtime.server.http import DONE, event, read, reply, stream, until_disconnect
from caesura.runtime.server.state import ServerState
from caesura.runtime.server.work import Work
from starlette.requests import Request
from starlette.responses import Response


class Chat:
    """The route."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._answers = ChatWork(state)

    async def __call__(self, request: Request) -> Response:
        body = await read(request, ChatRequest)
        body.check()
        work = self._state.work(request, rid=body.rid, cache_salt=body.cache_salt)
        head = {"id": f"chatcmpl-{work.request_id}", "created": int(time.time()), "model": self._state.model_name}
        if body.stream:
            events = self._stream(body, work, head)
            return await stream(request, events, send_deadline_s=self._state.config.send_deadline_s)
        return reply(await until_disconnect(request, self._whole(body, work, head)))

    # -- the two shapes of an answer --------------------------------------------------------------------------

    async def _whole(self, body: ChatRequest, work: Work, head: dict[str, Any]) -> dict[str, Any]:
        logprobs: dict[int, list[dict[str, Any]]] = {}
        ends: dict[int, Ended] = {}
        readers: dict[int, AnswerReader] = {}
        cached: int | None = None
        try:
            async with work, contextlib.aclosing(self._answers.run(body, work, readers)) as items:
                async for item in items:
                    if isinstance(item, Delta):
                        logprobs.setdefault(item.choice, []).extend(item.logprobs)
                    elif isinstance(item, Ended):
                        ends[item.choice] = item
                    else:
                        cached = item
        except BaseException:  # the client hears of no choice, so of none that had ended either
            await self._answers.forget(readers.values())
            raise
        choices = [
            {
                "index": index,
                "message": readers[index].message(),
                "logprobs": {"content": logprobs.get(index, []), "refusal": None} if body.logprobs else None,
                "finish_reason": ends[index].reason,
                "matched_stop": ends[index].matched,
            }
            for index in sorted(ends)
        ]
        return {**head, "object": "chat.completion", "choices": choices, "usage": _usage(list(ends.values()), cached)}

    async def _stream(self, body: ChatRequest, work: Work, head: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        head = {**head, "object": "chat.completion.chunk"}
        wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        extra = {"usage": None} if wants_usage else {}
        ends: list[Ended] = []
        cached: int | None = None
        begun: set[int] = set()

        def chunk(choice: int, delta: dict[str, Any], **more: Any) -> bytes:
            one = {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None, **more}
            return event({**head, "choices": [one], **extra})

        async with work, contextlib.aclosing(self._answers.run(body, work, {})) as items:
            async for item in items:
                if isinstance(item, int):
                    cached = item
                    continue
                if item.choice not in begun:
                    begun.add(item.choice)
                    yield chunk(item.choice, {"role": "assistant", "content": ""})
                if isinstance(item, Ended):
                    ends.append(item)
                    yield chunk(item.choice, {}, finish_reason=item.reason, matched_stop=item.matched)
                    continue
                delta: dict[str, Any] = {"reasoning_content": item.reasoning} if item.reasoning else {}
                if item.content or (item.logprobs and not item.reasoning):
                    delta["content"] = item.content
                if item.tool_calls:
                    delta["tool_calls"] = item.tool_calls
                more = {"logprobs": {"content": item.logprobs, "refusal": None}} if body.logprobs else {}
                yield chunk(item.choice, delta, **more)
        if wants_usage:
            yield event({**head, "choices": [], "usage": _usage(ends, cached)})
        yield DONE


def _usage(ends: list[Ended], cached: int | None) -> dict[str, Any]:
    ordered = sorted(ends, key=lambda one: one.choice)
    return usage([one.finish for one in ordered], cached, sum(one.reasoning_tokens for one in ordered))
