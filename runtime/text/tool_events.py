"""What a tool-call parser reports, and the place where a format's machine writes it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import NoReturn

MAX_ARGUMENT_CHARS = 1 << 18
MAX_CALLS = 128
MAX_HELD_BLANKS = 64


class ToolFormat(StrEnum):
    """How a model writes calls."""

    HERMES = "hermes"  # <tool_call>{"name": ..., "arguments": {...}}</tool_call>
    LLAMA3_JSON = "llama3_json"  # {"name": ..., "parameters": {...}}
    PYTHONIC = "pythonic"  # [f(a=1), g()]


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """One call. ``arguments`` is JSON text; ``complete`` says that it is a whole JSON object."""

    name: str
    arguments: str
    complete: bool = True


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """Text of the answer that belongs to no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """A call's name is known. ``index`` counts the calls of this answer from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, as JSON text."""

    index: int
    delta: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """A call is over. ``arguments`` is the whole JSON text; not ``complete``: cut off or malformed."""

    index: int
    arguments: str
    complete: bool = True


Event = ContentDelta | CallStarted | CallArguments | CallEnded


class Sink:
    """Collects events. Content and argument deltas of one push are joined, so events do not depend on characters.

    Blanks before a call are dropped, as are blanks after one at the answer's end: they are layout, not content.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._text: list[str] = []
        self._delta: list[str] = []
        self._blanks = ""
        self._arguments: list[str] = []
        self._argument_chars = 0
        self.count = 0
        self.is_open = False
        self.any_content = False

    def text(self, text: str) -> None:
        """Content; trailing blanks wait until it is known what follows."""
        body = text.rstrip()
        if body:
            self._text += (self._blanks, body)
            self._blanks = ""
            self.any_content = True
        self._blanks += text[len(body) :]
        while len(self._blanks) > MAX_HELD_BLANKS:
            self._text.append(self._blanks[: MAX_HELD_BLANKS + 1])
            self._blanks = self._blanks[MAX_HELD_BLANKS + 1 :]

    def start(self, name: str) -> None:
        """A call begins."""
        self._blanks = ""
        self._flush()
        self._events.append(CallStarted(self.count, name))
        self._arguments.clear()
        self._argument_chars = 0
        self.is_open = True

    def arguments(self, delta: str) -> str:
        """More argument text. Returns the part beyond the limit, empty while there is room."""
        room = MAX_ARGUMENT_CHARS - self._argument_chars
        taken = delta[:room]
        self._argument_chars += len(taken)
        self._arguments.append(taken)
        self._delta.append(taken)
        return delta[room:]

    def end(self) -> None:
        """The open call is over, whole or not."""
        self._flush()
        arguments = "".join(self._arguments)
        self._events.append(CallEnded(self.count, arguments, is_json_object(arguments)))
        self.count += 1
        self.is_open = False

    def take(self) -> list[Event]:
        """Events since the last take."""
        self._flush()
        events, self._events = self._events, []
        return events

    def finish(self) -> None:
        """The answer is over: close what is open, show what was held."""
        if self.is_open:
            self.end()
        elif self._blanks and not self.count:
            self._text.append(self._blanks)
        self._blanks = ""

    def _flush(self) -> None:
        text = "".join(self._text)
        if text:
            self._events.append(ContentDelta(text))
        self._text.clear()
        delta = "".join(self._delta)
        if delta:
            self._events.append(CallArguments(self.count, delta))
        self._delta.clear()


def is_json_object(text: str) -> bool:
    """Whether ``text`` is one JSON object by the letter of the standard."""
    try:
        return isinstance(json.loads(text, parse_constant=_refuse), dict)
    except (ValueError, RecursionError):
        return False


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
