"""What a state has become so far: its text as a log of segments, variables, turns, and the session that holds it.

Text is only sent to the backend when something needs it (`flush`), so that neighbouring pieces are tokenized as one.
The log keeps generated parts as token ids; a session can be rebuilt from it exactly.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from caesura.lang.backend import ChatFormat, Finish, Piece, Session, Tokens, ToolSpec
from caesura.lang.decisions import Decisions, note_decisions
from caesura.lang.errors import StateError, UnsupportedByBackend
from caesura.lang.spans import Span, SpanStack

if TYPE_CHECKING:
    from caesura.lang.execution import Execution
    from caesura.lang.tools import Tool, ToolCall, ToolResult


DECISIONS_S = 5.0  # for a backend to tell at the end what it decided


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the context; ``marker`` says that it opens or closes a turn of ``role``.

    ``source`` says where it comes from: the program, the model (with ``finish``; ``constrained`` by a grammar), a
    choice by score, or tools (with their ``calls``). ``name`` is the variable it belongs to.
    """

    pieces: tuple[Piece | Tokens, ...]
    marker: Literal["open", "close"] | None = None
    role: str = ""
    source: Literal["program", "model", "choice", "tool"] = "program"
    name: str = ""
    constrained: bool = False
    finish: Finish | None = None
    calls: tuple[tuple[ToolCall, ToolResult], ...] = ()

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """A piece of text as it came, the variable it belongs to, and what is known about that generation so far. A
    rollback is one, too: it makes text of the variables in ``void`` void."""

    name: str | None
    text: str
    meta: dict[str, Any]
    void: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Usage:
    """Totals of a program. ``tool_s`` is time spent in tools."""

    generations: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    tool_calls: int = 0
    tool_errors: int = 0
    tool_s: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.generations + other.generations,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
            self.tool_calls + other.tool_calls,
            self.tool_errors + other.tool_errors,
            self.tool_s + other.tool_s,
        )


@dataclass(frozen=True, slots=True)
class Turn:
    """The open turn: its role, where its content starts in the log, and what closes it."""

    role: str
    start: int
    closing: tuple[Piece, ...]


@dataclass
class Values:
    """Everything that a snapshot keeps and a fork copies."""

    variables: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    meta: dict[str, dict[str, Any]] = field(default_factory=dict)
    tool_results: dict[str, list[ToolResult]] = field(default_factory=dict)
    tool_calls: dict[str, list[tuple[ToolCall, ToolResult]]] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)
    scopes: dict[str, int] = field(default_factory=dict)
    inherited: set[str] = field(default_factory=set)  # variables from before the fork that it has not set itself
    turn: Turn | None = None
    num_turns: int = 0
    tools: tuple[Tool, ...] = ()

    def copy(self) -> Values:
        return replace(
            self,
            variables=dict(self.variables),
            texts=dict(self.texts),
            meta=dict(self.meta),
            tool_results=dict(self.tool_results),
            tool_calls=dict(self.tool_calls),
            messages=list(self.messages),
            scopes=dict(self.scopes),
            inherited=set(self.inherited),
        )


@dataclass(frozen=True, slots=True)
class Saved:
    """A snapshot's content."""

    core: Core
    values: Values
    num_segments: int
    mark: int
    num_rebuilds: int
    num_events: int
    number: int


class Core:
    """One context. Touched on the loop's thread only (reads of finished values excepted)."""

    def __init__(self, execution: Execution, span: Span) -> None:
        self.execution = execution
        self.spans = SpanStack(span)
        self.session: Session | None = None
        self.values = Values()
        self.log: list[Segment] = []
        self.num_sent = 0
        self.num_rebuilds = 0
        self.events: list[StreamEvent] = []
        self.usage = Usage()
        self.forked_at = 0
        self.forked_messages = 0
        self.decisions: Decisions | None = None  # kept when the session goes
        self._points: list[int] = []  # numbers of the snapshots that no rollback has cut off
        self._num_saved = 0
        self._voided: dict[int, int] = {}  # by snapshot: the number of events as of the last rollback to it
        self._waiters: list[asyncio.Future[None]] = []
        self._num_auto = 0

    # -- waiting ------------------------------------------------------------------------------------------------

    def notify(self) -> None:
        """Wake everyone who waits for this context to change."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def change(self) -> None:
        """Wait for the next change."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    # -- text and variables --------------------------------------------------------------------------------------

    def text(self, start: int = 0) -> str:
        """The context's text from segment ``start`` on."""
        return "".join(segment.text for segment in self.log[start:])

    def add(self, text: str) -> None:
        """Append plain text; it is sent with the next flush."""
        if text:
            self.add_segment(Segment((Piece(text),)))

    def add_segment(self, segment: Segment) -> None:
        """Append to the log."""
        self.log.append(segment)
        self.emit(None, segment.text, {})

    def add_generated(self, text: str, name: str, finish: Finish, *, constrained: bool) -> None:
        """Record what the session has appended by itself."""
        kept = finish.kept_token_ids
        piece = Piece(text) if kept is None else Tokens(kept, text)
        self.log.append(Segment((piece,), source="model", name=name, constrained=constrained, finish=finish))
        self.num_sent = len(self.log)

    def emit(self, name: str | None, text: str, meta: dict[str, Any], void: frozenset[str] = frozenset()) -> None:
        """Tell streams about new text."""
        self.events.append(StreamEvent(name, text, meta, void))
        self.notify()

    def set(self, name: str, value: Any, *, text: str | None = None, meta: dict[str, Any] | None = None) -> None:
        """Set a variable."""
        self.values.texts[name] = text if text is not None else str(value)
        if meta is not None:
            self.values.meta[name] = meta
        self.values.variables[name] = value
        self.values.inherited.discard(name)
        self.notify()

    def auto_name(self, kind: str) -> str:
        """A name for an expression without one."""
        self._num_auto += 1
        return f"{kind}_{self._num_auto}"

    # -- turns ---------------------------------------------------------------------------------------------------

    @property
    def chat(self) -> ChatFormat:
        chat = self.execution.backend.chat
        if chat is None:
            raise UnsupportedByBackend(
                f"backend {self.execution.backend.name!r} has no chat template, so there are no roles; write plain text"
            )
        return chat

    async def open_turn(self, role: str) -> None:
        """Open a turn of ``role``. Raises StateError inside another turn."""
        if self.values.turn is not None:
            raise StateError(f"{role} opens inside the turn of {self.values.turn.role}; roles do not nest")
        first = self.values.num_turns == 0
        opening, closing = await self.chat.turn(role, first=first, tools=self.tool_specs if first else None)
        self.add_segment(Segment(tuple(opening), "open", role))
        self.values.turn = Turn(role, len(self.log), tuple(closing))
        self.values.num_turns += 1

    def close_turn(self, role: str) -> None:
        """Close the open turn. Raises StateError when it is another one, or there is none."""
        turn = self.values.turn
        if turn is None or turn.role != role:
            raise StateError(f"{role} ends, but {'no turn' if turn is None else 'the turn of ' + turn.role} is open")
        self.values.messages.append({"role": role, "content": self.text(turn.start)})
        self.values.turn = None
        self.add_segment(Segment(turn.closing, "close", role))

    async def answer_calls(self, message: dict[str, Any], results: Sequence[tuple[ToolCall, ToolResult]]) -> None:
        """End the assistant's turn with its calls (``message``: what the last segment says), append the results and
        open its next turn."""
        turn = self.values.turn
        assert turn is not None
        before = "".join(segment.text for segment in self.log[turn.start : -1])
        message = {**message, "content": before + message["content"]}
        pairs = [(call.tool, result.text) for call, result in results]
        pieces = await self.chat.tool_results(pairs, tools=self.tool_specs)
        self.values.messages.append(message)
        self.values.messages += [
            {"role": "tool", "name": call.tool, "tool_call_id": call.id, "content": result.text}
            for call, result in results
        ]
        self.add_segment(Segment(tuple(pieces), "open", "assistant", source="tool", calls=tuple(results)))
        self.values.turn = Turn("assistant", len(self.log), turn.closing)
        self.values.num_turns += 1

    @property
    def tool_specs(self) -> list[ToolSpec] | None:
        """Declarations of the tools the model knows of."""
        return [tool.spec for tool in self.values.tools] or None

    def messages(self) -> list[dict[str, Any]]:
        """All turns, the open one included; contents exactly as they were added."""
        turn = self.values.turn
        messages = [dict(message) for message in self.values.messages]
        if turn is not None and (text := self.text(turn.start)):
            messages.append({"role": turn.role, "content": text})
        return messages

    async def declare_tools(self, tools: Sequence[Tool]) -> None:
        """Make tools known to the model. They stand in the first turn: if that is written already, rewrite it."""
        known = {tool.name for tool in self.values.tools}
        new = tuple(tool for tool in tools if tool.name not in known)
        if not new:
            return
        self.values.tools += new
        places = [i for i, segment in enumerate(self.log) if segment.marker is not None][:2]
        if not places:
            return
        role = self.log[places[0]].role
        opening, closing = await self.chat.turn(role, first=True, tools=self.tool_specs)
        self.log[places[0]] = Segment(tuple(opening), "open", role)
        if len(places) == 2 and self.log[places[1]].marker == "close":
            self.log[places[1]] = Segment(tuple(closing), "close", role)
        elif self.values.turn is not None and self.values.num_turns == 1:
            self.values.turn = replace(self.values.turn, closing=tuple(closing))
        await self._rebuild()

    # -- session -------------------------------------------------------------------------------------------------

    async def open(self) -> Session:
        """The session, opened at first use."""
        if self.session is None:
            self.session = await self.execution.open_session()
        return self.session

    async def flush(self) -> Session:
        """Send what was added since the last flush; neighbouring plain texts go as one piece."""
        session = await self.open()
        if self.num_sent < len(self.log):
            await session.append(_merged(self.log[self.num_sent :]))
            self.num_sent = len(self.log)
        return session

    def fork(self, name: str) -> Core:
        """A copy of everything but the session."""
        child = Core(self.execution, self.spans.top.add("branch", name))
        child.values = self.values.copy()
        child.values.inherited = set(self.values.variables)
        child.log = list(self.log)
        child.num_sent = self.num_sent
        child.num_rebuilds = self.num_rebuilds
        child.forked_at = len(self.log)
        child.forked_messages = len(self.values.messages)
        child._num_auto = self._num_auto
        return child

    async def save(self) -> Saved:
        """Take a snapshot."""
        session = await self.flush()
        mark = await session.mark()
        self._num_saved += 1
        self._points.append(self._num_saved)
        return Saved(
            self, self.values.copy(), len(self.log), mark, self.num_rebuilds, len(self.events), self._num_saved
        )

    async def restore(self, saved: Saved) -> None:
        """Return to a snapshot of this context."""
        if saved.core is not self:
            raise StateError("the snapshot belongs to another state; take it from the state that is rolled back")
        if saved.number not in self._points:
            raise StateError("the snapshot is gone: a rollback to an earlier one has cut it off")
        del self._points[self._points.index(saved.number) + 1 :]
        session = await self.open()
        tools = self.values.tools
        self.values = saved.values.copy()
        del self.log[saved.num_segments :]
        if saved.num_rebuilds == self.num_rebuilds:
            await session.rollback(saved.mark)
            self.num_sent = len(self.log)
        else:  # the tool declarations were written in between; they stay
            self.values.tools = tools
            await self._rebuild()
        start = max(saved.num_events, self._voided.get(saved.number, 0))  # what lies before was told as void already
        void = frozenset(event.name for event in self.events[start:] if event.name is not None)
        self._voided[saved.number] = len(self.events)
        self.emit(None, "", {"rollback": True}, void)

    async def read_decisions(self) -> Decisions:
        """The backend's decisions for this context."""
        if self.decisions is None and self.session is not None:
            return Decisions(await self.session.decisions())
        return self.decisions or Decisions()

    async def keep_decisions(self) -> None:
        """Remember the decisions before the session goes, if the backend tells them in time: no outcome needs them."""
        if self.session is None:
            return
        with contextlib.suppress(Exception):
            async with asyncio.timeout(DECISIONS_S):
                self.decisions = await self.read_decisions()
            note_decisions(self.spans.root, self.decisions)

    async def _rebuild(self) -> None:
        """Start the session's context again from the log."""
        self.num_rebuilds += 1
        if self.session is not None and self.num_sent:
            await self.session.rollback(0)
        self.num_sent = 0


def _merged(segments: Sequence[Segment]) -> list[Piece | Tokens]:
    merged: list[Piece | Tokens] = []
    for piece in (piece for segment in segments for piece in segment.pieces):
        last = merged[-1] if merged else None
        if isinstance(piece, Piece) and isinstance(last, Piece) and piece.special == last.special:
            merged[-1] = Piece(last.text + piece.text, piece.special)
        elif piece.text or isinstance(piece, Tokens):
            merged.append(piece)
    return merged
