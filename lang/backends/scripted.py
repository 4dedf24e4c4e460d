"""A backend without a model: answers come from a script. For tests of programs, in milliseconds and offline.

It behaves as an engine would where a program can tell: stop strings, token limits, grammars (an answer that breaks
one is an error), streaming in pieces, token counts, forks, rollback, pauses, open sessions.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from caesura.lang.backend import (
    Capabilities,
    ChatFormat,
    Constraint,
    Finish,
    GenChunk,
    GenRequest,
    OptionScore,
    PendingCall,
    Piece,
    TokenLogprob,
    Tokens,
    ToolCallRequest,
    ToolSpec,
)
from caesura.lang.backends.schema import schema_problem
from caesura.lang.errors import ScriptError, StateError

_TOKEN = re.compile(r"\s*\w+|\s*[^\w\s]|\s+")


@dataclass(frozen=True)
class ScriptedReply:
    """One answer. ``tool_calls`` are ``(name, arguments)`` with a dict or JSON text; ``latency_s`` overrides the
    backend's; ``raises`` is raised instead of answering."""

    text: str = ""
    tool_calls: Sequence[tuple[str, Mapping[str, Any] | str]] = ()
    latency_s: float | None = None
    raises: BaseException | None = None


Answer = str | ScriptedReply
Script = (
    Answer
    | Sequence[Answer]
    | Mapping[str, Answer | Sequence[Answer]]
    | Callable[[str, GenRequest], Answer | Awaitable[Answer]]
)


_END = Piece("<|end|>\n", special=True)


class PlainChat:
    """A chat format in plain marks: ``<|role|>`` opens a turn, ``<|end|>`` closes it."""

    stop: tuple[str, ...] = ()

    async def turn(
        self, role: str, *, first: bool, tools: Sequence[ToolSpec] | None = None
    ) -> tuple[Sequence[Piece], Sequence[Piece]]:
        opening = [Piece(f"<|{role}|>", special=True)]
        if tools:
            declared = Piece(json.dumps([spec["function"] for spec in tools]))
            opening = [Piece("<|tools|>", special=True), declared, _END, *opening]
        return opening, [_END]

    async def tool_results(
        self, results: Sequence[tuple[str, str]], *, tools: Sequence[ToolSpec] | None = None
    ) -> Sequence[Piece]:
        pieces = [_END]
        for name, content in results:
            pieces += [Piece(f"<|tool {name}|>", special=True), Piece(content), _END]
        return [*pieces, Piece("<|assistant|>", special=True)]


@dataclass(frozen=True)
class Recorded:
    """A request as the backend saw it: the whole context, and what was asked."""

    prompt: str
    request: GenRequest


@dataclass
class ScriptedBackend:
    """Answers from ``replies``: one answer for every time, a list (in order of the requests), a dict of
    either by variable name, or ``f(prompt, request)``, sync or async.

    ``scores`` are logprobs for `select`, by option text; without them the option the context mentions last, else the
    longest, wins. ``requests`` and ``events`` record what happened; ``open_sessions`` is zero when all programs have
    ended.
    """

    replies: Script = ()
    scores: Mapping[str, float] | None = None
    latency_s: float = 0.0
    piece_tokens: int = 4
    chat: ChatFormat | None = field(default_factory=PlainChat)
    capabilities: Capabilities = field(default_factory=Capabilities)
    name: str = "scripted"
    requests: list[Recorded] = field(default_factory=list, init=False)
    events: list[tuple[Any, ...]] = field(default_factory=list, init=False)
    open_sessions: int = field(default=0, init=False)
    most_open_sessions: int = field(default=0, init=False)
    num_flushes: int = field(default=0, init=False)
    _ids: dict[str, int] = field(default_factory=dict, init=False)
    _texts: list[str] = field(default_factory=list, init=False)
    _taken: dict[str, int] = field(default_factory=dict, init=False)
    _num_sessions: int = field(default=0, init=False)

    async def open(self, *, namespace: str = "", deadline_s: float | None = None) -> ScriptedSession:
        """A new session."""
        return self._session([])

    def _session(self, token_ids: list[int]) -> ScriptedSession:
        self._num_sessions += 1
        self.open_sessions += 1
        self.most_open_sessions = max(self.most_open_sessions, self.open_sessions)
        return ScriptedSession(self, self._num_sessions, token_ids)

    async def flush_cache(self) -> None:
        """Counts only."""
        self.num_flushes += 1

    async def server_info(self) -> Mapping[str, Any]:
        """Counters."""
        return {"model": self.name, "requests": len(self.requests), "open_sessions": self.open_sessions}

    def close(self) -> None:
        """Nothing to stop."""

    # -- tokens: a word with the blanks before it, each with an id of its own ---------------------------------------

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``."""
        return [self._id(token) for token in _TOKEN.findall(text)]

    def _id(self, token: str) -> int:
        if token not in self._ids:
            self._ids[token] = len(self._texts)
            self._texts.append(token)
        return self._ids[token]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ``token_ids``."""
        return "".join(self._texts[token_id] for token_id in token_ids)

    # -- the script -------------------------------------------------------------------------------------------------

    async def answer(self, prompt: str, request: GenRequest) -> ScriptedReply:
        """The script's answer. Raises ScriptError when there is none."""
        replies = self.replies
        if isinstance(replies, (str, ScriptedReply)):
            answer: Any = replies
        elif callable(replies):
            made = replies(prompt, request)
            answer = await made if inspect.isawaitable(made) else made
        elif isinstance(replies, Mapping):
            if request.name not in replies:
                raise ScriptError(f"no reply for {request.name!r}; the script has {sorted(replies)}")
            answer = replies[request.name]
            if not isinstance(answer, (str, ScriptedReply)):
                answer = self._next(answer, request.name, f"replies for {request.name!r}")
        else:
            answer = self._next(replies, "", f"replies; asked for {request.name!r}")
        if isinstance(answer, str):
            return ScriptedReply(answer)
        if not isinstance(answer, ScriptedReply):
            raise ScriptError(f"the reply for {request.name!r} is {type(answer).__name__}; give a str or ScriptedReply")
        return answer

    def _next(self, answers: Sequence[Answer], key: str, what: str) -> Answer:
        at = self._taken.get(key, 0)
        if at >= len(answers):
            raise ScriptError(f"the script is over after {len(answers)} {what}")
        self._taken[key] = at + 1
        return answers[at]


class ScriptedSession:
    """A context as a list of tokens."""

    def __init__(self, backend: ScriptedBackend, number: int, token_ids: list[int]) -> None:
        self._backend = backend
        self.number = number
        self.token_ids = token_ids
        self.num_cached = 0
        self.paused: tuple[PendingCall, ...] = ()
        self.closed = False
        self._note("open")

    def _note(self, what: str, *details: Any) -> None:
        self._backend.events.append((what, self.number, *details))

    def _alive(self) -> None:
        if self.closed:
            raise StateError(f"session {self.number} is closed")

    @property
    def text(self) -> str:
        """The whole context."""
        return self._backend.decode(self.token_ids)

    async def append(self, pieces: Sequence[Piece | Tokens]) -> None:
        self._alive()
        for piece in pieces:
            self.token_ids += self._backend.encode(piece.text)  # ids of a recording are those of another backend
            self._note("append", piece.text)

    async def generate(self, request: GenRequest) -> AsyncGenerator[GenChunk, None]:
        self._alive()
        backend, prompt_tokens, cached = self._backend, len(self.token_ids), self.num_cached
        prompt = self.text
        backend.requests.append(Recorded(prompt, request))
        self._note("generate", request.name)
        reply = await backend.answer(prompt, request)
        await asyncio.sleep(reply.latency_s if reply.latency_s is not None else backend.latency_s)
        self._alive()
        if reply.raises is not None:
            raise reply.raises
        calls = _calls(reply, request)
        text, finish = _finished(backend, reply, calls, request)
        ids = backend.encode(text)
        for start in range(0, len(ids), backend.piece_tokens):
            piece = ids[start : start + backend.piece_tokens]
            self.token_ids.extend(piece)
            logprobs = tuple(_logprob(backend, token_id, request) for token_id in piece)
            yield GenChunk(backend.decode(piece), tuple(piece), logprobs if request.logprobs is not None else ())
            if request.stream:
                await asyncio.sleep(0)
        self.num_cached = len(self.token_ids)
        yield GenChunk(
            finish=Finish(
                finish.reason, finish.matched, calls, finish.content, prompt_tokens, len(ids), cached, tuple(ids)
            )
        )

    async def score(self, texts: Sequence[str], *, unconditional: bool = False) -> list[OptionScore]:
        self._alive()
        self._note("score", *texts)
        return [self._score(text, list(texts), unconditional) for text in texts]

    def _score(self, text: str, texts: list[str], unconditional: bool) -> OptionScore:
        backend = self._backend
        if backend.scores is not None:
            if text not in backend.scores:
                raise ScriptError(f"no score for the option {text!r}; scores has {sorted(backend.scores)}")
            value = backend.scores[text]
        else:
            context = self.text
            order = sorted(texts, key=lambda option: (context.rfind(option), len(option)))
            value = -float(len(texts) - order.index(text))
        tokens = tuple(TokenLogprob(value, token_id, backend.decode([token_id])) for token_id in backend.encode(text))
        alone = tuple(TokenLogprob(-1.0, item.token_id, item.text) for item in tokens)
        return OptionScore(tokens, alone if unconditional else None)

    async def prompt_logprobs(self, start: int) -> list[TokenLogprob]:
        return [TokenLogprob(-1.0, token_id, self._backend.decode([token_id])) for token_id in self.token_ids[start:]]

    async def prefill(self) -> None:
        self._alive()
        self.num_cached = len(self.token_ids)
        self._note("prefill", len(self.token_ids))

    async def fork(self, n: int) -> list[ScriptedSession]:
        self._alive()
        self._note("fork", n)
        copies = [self._backend._session(list(self.token_ids)) for _ in range(n)]
        for copy in copies:
            copy.num_cached = self.num_cached
        return copies

    async def pause(self, calls: Sequence[PendingCall], *, wait: Literal["all", "any"] = "all") -> None:
        self._alive()
        self.paused = tuple(calls)
        self._note("pause", *(call.tool for call in calls))

    async def report(self, fraction: float, call: int = 0) -> None:
        self._alive()
        self._note("report", fraction, call)

    async def resume(self) -> None:
        self._alive()
        self.paused = ()
        self._note("resume")

    async def mark(self) -> int:
        return len(self.token_ids)

    async def rollback(self, mark: int) -> None:
        self._alive()
        del self.token_ids[mark:]
        self.num_cached = min(self.num_cached, mark)
        self._note("rollback", mark)

    async def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._backend.open_sessions -= 1
            self._note("close")

    async def decisions(self) -> Sequence[Any]:
        return ()


def _calls(reply: ScriptedReply, request: GenRequest) -> tuple[ToolCallRequest, ...]:
    if not reply.tool_calls:
        return ()
    if request.tool_use is None or request.tool_use.choice == "none":
        raise ScriptError(f"the reply for {request.name!r} calls tools, but the request allows none")
    return tuple(
        ToolCallRequest(name, arguments if isinstance(arguments, str) else json.dumps(arguments))
        for name, arguments in reply.tool_calls
    )


def _finished(
    backend: ScriptedBackend, reply: ScriptedReply, calls: tuple[ToolCallRequest, ...], request: GenRequest
) -> tuple[str, Finish]:
    """The text that stays, and why it ends: tool calls, a stop string or pattern, the token limit, or its own end."""
    if calls:
        shown = "".join(
            f'<tool_call>{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}</tool_call>'
            for call in calls
        )
        return reply.text + shown, Finish("tool_calls", content=reply.text)
    text, matched = reply.text, None
    cuts = [(text.find(stop), stop) for stop in request.stop if stop in text]
    for pattern in request.stop_regex:
        cuts += [(found.start(), found.group()) for found in (re.search(pattern, text),) if found]
    if cuts:
        at, matched = min(cuts)
        text = text[:at]
    ids = backend.encode(text)
    if len(ids) > request.max_tokens:
        return backend.decode(ids[: request.max_tokens]), Finish("length")
    if request.constraint is not None and (problem := _violation(request.constraint, text)):
        raise ScriptError(f"the reply for {request.name!r} breaks its {request.constraint.kind}: {problem}")
    return text, Finish("stop", matched)


def _violation(constraint: Constraint, text: str) -> str:
    if constraint.kind == "regex" and not re.fullmatch(constraint.source, text):
        return f"{text!r} does not match {constraint.source!r}"
    if constraint.kind == "choices" and text not in json.loads(constraint.source):
        return f"{text!r} is none of {constraint.source}"
    if constraint.kind == "json_schema":
        try:
            value = json.loads(text)
        except ValueError as error:
            return f"{text!r} is no JSON: {error}"
        return schema_problem(value, json.loads(constraint.source))
    return ""  # an EBNF grammar is not checked


def _logprob(backend: ScriptedBackend, token_id: int, request: GenRequest) -> TokenLogprob:
    text = backend.decode([token_id])
    return TokenLogprob(-0.5, token_id, text, ((-0.5, token_id, text),) if request.logprobs else ())
