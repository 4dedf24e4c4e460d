"""What answers a chat, whatever protocol asked: a checked plan, a context with the prompt, choices as they come."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from array import array
from bisect import bisect_left
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any

from caesura.runtime.api import Handle
from caesura.runtime.errors import ContextClosed, DeadlineExceeded, EngineStopped
from caesura.runtime.generation import Finish, TokenChunk, ToolCalling
from caesura.runtime.sampling import Constraint, ConstraintKind, SamplingParams, spaced
from caesura.runtime.server.answer import AnswerReader, Delta, Ended
from caesura.runtime.server.chat_protocol import ChatRequest
from caesura.runtime.server.conversation import (
    Conversation,
    Prompt,
    conversation_of,
    from_start,
    later_starts,
    next_prompt,
    open_calls,
    prompt_of,
)
from caesura.runtime.server.kept import KeptContext
from caesura.runtime.server.params import constraint_of, json_schema_of
from caesura.runtime.server.state import ServerState
from caesura.runtime.server.work import Aborted, Work, merged
from caesura.runtime.text.reasoning import ThinkMarks, ThinkSplitter, detect_marks, ends_thinking, opens_thinking
from caesura.runtime.text.think_grammar import after_thinking
from caesura.runtime.text.tool_parser import ToolCallParser, ToolFormat, tool_grammar

CALL_MARK = "<tool_call>"


@dataclass(frozen=True, slots=True)
class Before:
    """A kept answer, and how many messages of a conversation end with it."""

    kept: KeptContext
    num_messages: int


@dataclass(frozen=True, slots=True)
class _Opened:
    """A context that holds a prompt, the conversation as it went in, and how its text ends."""

    handle: Handle
    conversation: Conversation
    end: str


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """A checked request: what to render, and how to generate."""

    body: ChatRequest
    conversation: Conversation
    constraint: Constraint | None
    tools: ToolCalling | None
    bias: tuple[tuple[int, float], ...]
    remember: bool = False
    marks: ThinkMarks | None = None  # of thinking that is to come apart
    opened: bool = False  # the prompt opened it

    @property
    def is_held(self) -> bool:
        """Whether a grammar holds the answer from its first token on."""
        return self.constraint is not None or (self.tools is not None and self.tools.choice != "auto")

    def params(self, choice: int, max_new_tokens: int) -> SamplingParams:
        body = self.body
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        made = body.params(max_new_tokens, logprobs=logprobs, constraint=self.constraint, choice=choice)
        if not self.bias:
            return made
        return dataclasses.replace(made, logit_bias=(*made.logit_bias, *self.bias))


class ChatWork:
    """Answers chats on one server's engine."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._service = state.service

    async def run(
        self,
        body: ChatRequest,
        work: Work,
        readers: dict[int, AnswerReader],
        *,
        before: Before | None = None,
        remember: bool = False,
        truncate: bool = False,
    ) -> AsyncGenerator[Delta | Ended | int, None]:
        """Deltas and ends of all choices; an int tells how many prompt tokens of several choices were cached.

        ``before`` is an answer that the conversation goes on from; with ``remember`` the new answer's tokens are
        kept in its reader for that. With ``truncate`` the oldest turns go when the conversation is too long.
        """
        plan = await self._state.on_text_thread(lambda: self._plan(body, remember))
        room = await self._room(body) if truncate else None
        num_choices, num_prompt, ended = body.n or 1, 0, set[int]()
        try:
            opened = await self._context(plan.conversation, work, before, room)
            num_prompt = opened.handle.num_tokens
            plan = dataclasses.replace(plan, conversation=opened.conversation)
            marks = detect_marks(self._service.template.source)
            if marks is not None and body.separate_reasoning is not False and not plan.conversation.continue_final:
                plan = await self._state.on_text_thread(lambda: self._thinking(plan, marks, opened.end))
            handles = [opened.handle]
            if num_choices > 1:
                yield await self._prefill(work, opened.handle)
                handles += await work.fork(opened.handle, num_choices - 1)
            sources = [self._choose(plan, work, i, one, readers) for i, one in enumerate(handles)]
            async with contextlib.aclosing(merged(sources)) as items:
                async for item in items:
                    yield item
                    if isinstance(item, Ended):
                        ended.add(item.choice)
        except (Aborted, ContextClosed) as error:  # an abort is an end like any other, also of what has not begun
            if not work.was_aborted(error):
                raise
            for index in sorted(set(range(num_choices)) - ended):
                reader = readers.setdefault(index, AnswerReader(index, self._service.tokenizer))
                yield reader.end(Finish("abort", None, (), num_prompt, 0, 0), body.choice)
        finally:  # the client left before it heard of these ends: nobody will come back for them
            await self.forget([readers[index] for index in readers.keys() - ended])

    async def forget(self, readers: Iterable[AnswerReader]) -> None:
        """Nothing is kept of these answers."""
        for reader in readers:
            if reader.kept is not None:
                await self._state.kept.drop(reader.kept)

    # -- the plan ---------------------------------------------------------------------------------------------

    def _plan(self, body: ChatRequest, remember: bool) -> ChatPlan:
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
            return ChatPlan(body, conversation, constraint, None, bias, remember)
        parallel = body.parallel_tool_calls is not False and self._service.template.takes_calls_at_once
        if choice != "auto":
            constraint = None  # the call's own grammar holds the answer
        elif schema is not None:
            constraint = self._call_or_json(specs, parallel, schema)
        return ChatPlan(body, conversation, constraint, ToolCalling(specs, choice, parallel), bias, remember)

    def _thinking(self, plan: ChatPlan, marks: ThinkMarks, prompt_end: str) -> ChatPlan:
        """The plan for a model that thinks: its thinking comes apart, and a grammar begins only after it."""
        if plan.is_held and ends_thinking(prompt_end, marks):
            return plan
        opened = opens_thinking(prompt_end, marks)
        held = plan.constraint
        if held is not None:  # that of tool calls the engine puts there
            held = after_thinking(held, marks, opened=opened, special_ids=self._service.tokenizer.special_ids)
        return dataclasses.replace(plan, marks=marks, opened=opened, constraint=held)

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
            ConstraintKind.EBNF,
            f"start: all_calls | answer\nanswer: %json {json.dumps(spaced(schema))}\nall_calls: {rest}",
        )

    # -- the prompt -------------------------------------------------------------------------------------------

    async def _room(self, body: ChatRequest) -> int:
        """Tokens of the window that a shortened prompt leaves for the answer."""
        if body.budget is not None:
            return body.budget
        return min(self._state.config.default_max_tokens, await self._state.max_context_tokens() // 4)

    async def _context(
        self, conversation: Conversation, work: Work, before: Before | None, room: int | None
    ) -> _Opened:
        """A context that holds the prompt: the one that was waiting for these tool results, else a new one. With
        ``room`` the oldest turns are left out where so many tokens would not fit behind it."""
        await self._state.kept.expire()
        found = self._goes_on_from(conversation, work.namespace, before)
        if found is not None:
            more = await self._state.on_text_thread(
                lambda: next_prompt(conversation, found.num_messages, self._service.template, self._service.tokenizer)
            )
            if more is not None and await self._fits(len(found.kept.token_ids) + len(more.token_ids), room):
                return _Opened(await self._continue(found.kept, more, work), conversation, more.end)
        conversation, prompt = await self._whole_prompt(conversation, room)
        handle = await work.open(self._state.config.request_deadline_s)
        await handle.append(prompt.token_ids)
        return _Opened(handle, conversation, prompt.end)

    def _goes_on_from(self, conversation: Conversation, namespace: str, before: Before | None) -> Before | None:
        """The kept answer with which the conversation, unchanged, ends but for what is new."""
        at, ids = open_calls(conversation)
        kept = self._state.kept.find(namespace, ids)
        found = Before(kept, at) if kept is not None else before
        if found is None or not 0 < found.num_messages < len(conversation.messages):
            return None
        kept, last = found.kept, conversation.messages[found.num_messages - 1]
        if kept.namespace != namespace or last["role"] != "assistant" or not kept.wrote(last):
            return None
        if kept.calls and (at, ids) != (found.num_messages, frozenset(call.id for call in kept.calls)):
            return None
        if kept.thought and not kept.calls:  # what templates leave of old thinking is theirs to say
            return None
        return found if kept.fingerprint == conversation.fingerprint(found.num_messages - 1) else None

    async def _continue(self, kept: KeptContext, more: Prompt, work: Work) -> Handle:
        """The context that waits, or its tokens in a new one, and what comes next."""
        if work.aborted:  # before it took the context, which goes on once
            raise Aborted
        waiting = self._state.kept.take_handle(kept)
        if waiting is not None:
            work.adopt(waiting)
            with contextlib.suppress(ContextClosed, DeadlineExceeded, EngineStopped):  # lost: its tokens are enough
                await waiting.append(more.token_ids)
                await waiting.resume(self._state.config.request_deadline_s)
                self._state.kept.continued += 1
                return waiting
        self._state.kept.rebuilt += 1
        handle = await work.open(self._state.config.request_deadline_s)
        await handle.append([*kept.token_ids, *more.token_ids])
        return handle

    async def _fits(self, num_tokens: int, room: int | None) -> bool:
        return room is None or num_tokens + room <= await self._state.max_context_tokens()

    async def _whole_prompt(self, conversation: Conversation, room: int | None) -> tuple[Conversation, Prompt]:
        template, tokenizer = self._service.template, self._service.tokenizer
        prompt = await self._state.on_text_thread(lambda: prompt_of(conversation, template, tokenizer))
        starts = [] if await self._fits(len(prompt.token_ids), room) else later_starts(conversation)
        if not starts:
            return conversation, prompt
        longest = await self._state.max_context_tokens() - (room or 0)

        def shortened() -> tuple[Conversation, Prompt]:
            def fits(start: int) -> bool:
                return len(prompt_of(from_start(conversation, start), template, tokenizer).token_ids) <= longest

            at = bisect_left(starts, True, key=fits)
            short = from_start(conversation, starts[min(at, len(starts) - 1)])
            return short, prompt_of(short, template, tokenizer)

        return await self._state.on_text_thread(shortened)

    # -- the answer -------------------------------------------------------------------------------------------

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
        splitter = None if plan.marks is None else ThinkSplitter(plan.marks, inside=plan.opened)
        reader = AnswerReader(index, self._service.tokenizer, parser, splitter, plan.body.stream_reasoning is not False)
        readers[index] = reader
        async with contextlib.aclosing(self._generate(plan, work, index, handle)) as chunks:
            async for chunk in chunks:
                delta = reader.read(chunk)
                if delta is not None:
                    yield delta
                if chunk.finish is not None:
                    finish = chunk.finish
                    try:
                        await self._keep(plan, work, handle, reader, finish)
                    except ContextClosed as error:
                        if not work.was_aborted(error):
                            raise
                        finish = dataclasses.replace(finish, reason="abort", matched=None, tool_calls=())
                    yield reader.end(finish, plan.body.choice)

    async def _generate(
        self, plan: ChatPlan, work: Work, index: int, handle: Handle
    ) -> AsyncGenerator[TokenChunk, None]:
        """Chunks of one choice. Without a limit of the client's, as many tokens as fit and the server gives."""
        budget, num_prompt, num_sent = plan.body.budget, handle.num_tokens, 0
        if budget is None:
            room = await self._state.max_context_tokens() - num_prompt
            budget = max(1, min(self._state.config.default_max_tokens, room))
        try:
            async with contextlib.aclosing(work.generate(handle, plan.params(index, budget), plan.tools)) as chunks:
                async for chunk in chunks:
                    num_sent += len(chunk.token_ids)
                    yield chunk
        except Aborted:
            yield TokenChunk("", (), (), Finish("abort", None, (), num_prompt, num_sent, 0))

    async def _keep(self, plan: ChatPlan, work: Work, handle: Handle, reader: AnswerReader, finish: Finish) -> None:
        """A context that called tools waits for them from here on; of another one, its tokens if they are wanted."""
        calls = bool(reader.calls and reader.whole)
        if finish.reason == "abort" or not (calls or plan.remember):
            return
        fingerprint = plan.conversation.fingerprint(len(plan.conversation.messages))
        thought = bool(reader.reasoning)
        if not calls:
            token_ids = array("i", await handle.token_ids())
            reader.kept = KeptContext(
                work.namespace, fingerprint, reader.content, (), token_ids, math.inf, thought=thought
            )
            return
        work.hand_on(handle)
        try:
            reader.kept = await self._state.kept.keep(
                handle, work.namespace, fingerprint, reader.content, reader.calls, thought=thought
            )
        except BaseException:
            work.adopt(handle)
            raise
