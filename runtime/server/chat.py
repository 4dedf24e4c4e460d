"""``POST /v1/chat/completions``. A tool call is a pause: the next request goes on in the same context."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from caesura.runtime.api import Handle
from caesura.runtime.errors import ContextClosed, ContextTooLong, DeadlineExceeded, EngineStopped
from caesura.runtime.generation import Finish, TokenChunk, ToolCalling
from caesura.runtime.sampling import Constraint, ConstraintKind, SamplingParams
from caesura.runtime.server.answer import AnswerReader, Delta, Ended, usage
from caesura.runtime.server.chat_protocol import ChatRequest
from caesura.runtime.server.conversation import (
    Conversation,
    conversation_of,
    open_calls,
    prompt_tokens,
    result_tokens,
)
from caesura.runtime.server.http import DONE, event, read, reply, stream, until_disconnect
from caesura.runtime.server.params import constraint_of, json_schema_of
from caesura.runtime.server.state import ServerState
from caesura.runtime.server.work import Aborted, Work, merged
from caesura.runtime.text.tool_parser import ToolCallParser, ToolFormat, tool_grammar
from starlette.requests import Request
from starlette.responses import Response

CALL_MARK = "<tool_call>"


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """A checked request: what to render, and how to generate."""

    body: ChatRequest
    conversation: Conversation
    constraint: Constraint | None
    tools: ToolCalling | None
    bias: tuple[tuple[int, float], ...]

    def params(self, choice: int, max_new_tokens: int) -> SamplingParams:
        body = self.body
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        made = body.params(max_new_tokens, logprobs=logprobs, constraint=self.constraint, choice=choice)
        if not self.bias:
            return made
        return dataclasses.replace(made, logit_bias=(*made.logit_bias, *self.bias))


class Chat:
    """The route."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._service = state.service

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
        async with work, contextlib.aclosing(self._produce(body, work, readers)) as items:
            async for item in items:
                if isinstance(item, Delta):
                    logprobs.setdefault(item.choice, []).extend(item.logprobs)
                elif isinstance(item, Ended):
                    ends[item.choice] = item
                else:
                    cached = item
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
        finishes = [ends[index].finish for index in sorted(ends)]
        return {**head, "object": "chat.completion", "choices": choices, "usage": usage(finishes, cached)}

    async def _stream(self, body: ChatRequest, work: Work, head: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        head = {**head, "object": "chat.completion.chunk"}
        wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        extra = {"usage": None} if wants_usage else {}
        finishes: list[Finish] = []
        cached: int | None = None
        begun: set[int] = set()

        def chunk(choice: int, delta: dict[str, Any], **more: Any) -> bytes:
            one = {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None, **more}
            return event({**head, "choices": [one], **extra})

        async with work, contextlib.aclosing(self._produce(body, work, {})) as items:
            async for item in items:
                if isinstance(item, int):
                    cached = item
                    continue
                if item.choice not in begun:
                    begun.add(item.choice)
                    yield chunk(item.choice, {"role": "assistant", "content": ""})
                if isinstance(item, Ended):
                    finishes.append(item.finish)
                    yield chunk(item.choice, {}, finish_reason=item.reason, matched_stop=item.matched)
                    continue
                delta: dict[str, Any] = {"content": item.content} if item.content or item.logprobs else {}
                if item.tool_calls:
                    delta["tool_calls"] = item.tool_calls
                more = {"logprobs": {"content": item.logprobs, "refusal": None}} if body.logprobs else {}
                yield chunk(item.choice, delta, **more)
        if wants_usage:
            yield event({**head, "choices": [], "usage": usage(finishes, cached)})
        yield DONE

    # -- the work ---------------------------------------------------------------------------------------------

    async def _produce(
        self, body: ChatRequest, work: Work, readers: dict[int, AnswerReader]
    ) -> AsyncGenerator[Delta | Ended | int, None]:
        """Deltas and ends of all choices; an int tells how many prompt tokens of several choices were cached."""
        plan = await self._state.on_text_thread(lambda: self._plan(body))
        handle = await self._context(plan.conversation, work)
        handles = [handle]
        num_choices = body.n or 1
        if num_choices > 1:
            yield await self._prefill(work, handle)
            handles += await work.fork(handle, num_choices - 1)
        sources = [self._choose(plan, work, i, one, readers) for i, one in enumerate(handles)]
        async with contextlib.aclosing(merged(sources)) as items:
            async for item in items:
                yield item

    def _plan(self, body: ChatRequest) -> ChatPlan:
        """Checks and conversions that may take a while; runs on a text thread."""
        conversation = conversation_of(body)
        schema = json_schema_of(body.response_format)
        constraint = constraint_of(regex=body.regex, ebnf=body.ebnf, schema=schema)
        choice = body.choice
        specs = tuple(tool["function"] for tool in conversation.tools)
        bias: tuple[tuple[int, float], ...] = ()
        if choice == "none":
            mark = self._service.tokenizer.special_ids.get(CALL_MARK)
            if specs and mark is not None and self._service.tool_format is ToolFormat.HERMES:
                bias = ((mark, -100.0),)
            return ChatPlan(body, conversation, constraint, None, bias)
        parallel = body.parallel_tool_calls is not False
        if choice != "auto":
            constraint = None  # the call's own grammar holds the answer
        elif schema is not None:
            constraint = self._call_or_json(specs, parallel, schema)
        return ChatPlan(body, conversation, constraint, ToolCalling(specs, choice, parallel), bias)

    def _call_or_json(self, specs: tuple[dict[str, Any], ...], parallel: bool, schema: dict[str, Any]) -> Constraint:
        """Tools and a response format: either calls, or an answer in that format."""
        calls = tool_grammar(
            self._service.tool_format,
            specs,
            choice="required",
            parallel=parallel,
            special_ids=self._service.tokenizer.special_ids,
        )
        assert calls is not None
        rest = calls.removeprefix("start: ")
        return Constraint(
            ConstraintKind.EBNF, f"start: all_calls | answer\nanswer: %json {json.dumps(schema)}\nall_calls: {rest}"
        )

    async def _context(self, conversation: Conversation, work: Work) -> Handle:
        """A context that holds the prompt: the one that was waiting for these tool results, else a new one."""
        template, tokenizer = self._service.template, self._service.tokenizer
        await self._state.kept.expire()
        at, ids = open_calls(conversation)
        kept = self._state.kept.find(work.namespace, ids)
        if (
            kept is not None
            and kept.wrote(conversation.messages[at - 1])
            and kept.fingerprint == conversation.fingerprint(at - 1)
        ):
            new = await self._state.on_text_thread(lambda: result_tokens(conversation, at, template, tokenizer))
            waiting = self._state.kept.take_handle(kept)
            if waiting is not None:
                work.adopt(waiting)
                with contextlib.suppress(ContextClosed, DeadlineExceeded, EngineStopped):  # lost: its tokens are enough
                    await waiting.append(new)
                    self._state.kept.continued += 1
                    return waiting
            self._state.kept.rebuilt += 1
            tokens = [*kept.token_ids, *new]
        else:
            tokens = await self._state.on_text_thread(lambda: prompt_tokens(conversation, template, tokenizer))
        handle = await work.open(self._state.config.request_deadline_s)
        await handle.append(tokens)
        return handle

    async def _prefill(self, work: Work, handle: Handle) -> int:
        """Compute the prompt once for all choices; how much of it was cached."""
        cached = 0
        async with contextlib.aclosing(work.generate(handle, SamplingParams(max_new_tokens=0))) as chunks:
            async for chunk in chunks:
                if chunk.finish is not None:
                    cached = chunk.finish.cached_tokens
        return cached

    async def _choose(
        self, plan: ChatPlan, work: Work, index: int, handle: Handle, readers: dict[int, AnswerReader]
    ) -> AsyncGenerator[Delta | Ended | int, None]:
        """One choice."""
        names = [str(tool["name"]) for tool in plan.tools.tools] if plan.tools else []
        parser = ToolCallParser(self._service.tool_format, names) if plan.tools else None
        reader = readers[index] = AnswerReader(index, self._service.tokenizer, parser)
        async with contextlib.aclosing(self._generate(plan, work, index, handle)) as chunks:
            async for chunk in chunks:
                delta = reader.read(chunk)
                if delta is not None:
                    yield delta
                if chunk.finish is not None:
                    if reader.calls and reader.whole:
                        await self._keep(plan, work, handle, reader)
                    yield reader.end(chunk.finish, plan.body.choice)

    async def _generate(
        self, plan: ChatPlan, work: Work, index: int, handle: Handle
    ) -> AsyncGenerator[TokenChunk, None]:
        """Chunks of one choice. Without a limit of the client's, as many tokens as fit."""
        body = plan.body
        wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        budget = self._state.config.default_max_tokens if wanted is None else wanted
        while True:
            try:
                async with contextlib.aclosing(work.generate(handle, plan.params(index, budget), plan.tools)) as chunks:
                    async for chunk in chunks:
                        yield chunk
                return
            except ContextTooLong:  # comes before the first chunk
                if wanted is not None or budget <= 1:
                    raise
                budget //= 2
            except Aborted:
                yield TokenChunk("", (), (), Finish("abort", None, (), handle.num_tokens, 0, 0))
                return

    async def _keep(self, plan: ChatPlan, work: Work, handle: Handle, reader: AnswerReader) -> None:
        """The context waits for its tools from here on."""
        fingerprint = plan.conversation.fingerprint(len(plan.conversation.messages))
        work.hand_on(handle)
        try:
            await self._state.kept.keep(handle, work.namespace, fingerprint, reader.content, reader.calls)
        except BaseException:
            work.adopt(handle)
            raise
