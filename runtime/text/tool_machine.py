"""The machinery under the tool formats: generators that ask for one character, or for a run of dull ones.

A format is written as straight-line code over ``yield``; where the text was cut between two pushes cannot matter,
because the code only ever sees characters in order. Nothing looks back further than the text held since a call
may have begun, and that text is never read twice, so the time is linear whatever the text says.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator
from functools import partial
from typing import NoReturn

from caesura.runtime.text.tool_events import MAX_ARGUMENT_CHARS, MAX_CALLS, Event, Sink

MAX_NAME_CHARS = 64
MAX_BLANKS = 64
MAX_DEPTH = 64
BLANKS = " \t\r\n"

Want = re.Pattern[str] | None  # None: one character; a one-character class: the run before the next such character
Steps = Generator[Want, str, None]
Reading = Generator[Want, str, str]
_Put = Callable[[str], object]

_NEVER = re.compile(r"(?!)")
_STRING = re.compile(r'["\\\x00-\x1f]')
_STRUCTURE = re.compile(r'[{}\[\]"]')


class NotACall(Exception):
    """The text since the possible beginning of a call is no call after all."""


class Machine(ABC):
    """One format's parser: text outside calls, possible beginnings, and ``call`` for what follows one."""

    openers: str

    def __init__(self, names: Collection[str]) -> None:
        self.names = frozenset(names)
        self.sink = Sink()
        self._held: list[str] = []
        self._back: str | None = None
        self._kept_chars = 0
        self._given_up = False
        self.was_cut = False
        self._steps = self._main()
        self._want: Want = next(self._steps)

    def push(self, text: str) -> list[Event]:
        """Read more text."""
        at, send = 0, self._steps.send
        while at < len(text):
            if self._want is None:
                self._want = send(text[at])
                at += 1
                continue
            found = self._want.search(text, at)
            end = len(text) if found is None else found.start()
            self._want = send(text[at:end])
            at = end
        return self.sink.take()

    def finish(self, *, cut_off: bool) -> list[Event]:
        """The text is over. Where it was ``cut_off`` after a call, what may have begun a further one is dropped."""
        self.was_cut = cut_off and self.sink.count > 0 and bool(self._held)
        if not self.sink.is_open and not self.was_cut:
            self._give_back()
        self.sink.finish()
        self._steps.close()
        return self.sink.take()

    @abstractmethod
    def call(self, opener: str) -> Steps:
        """Everything from an opening character to the end of its calls. Raises NotACall."""

    def _main(self) -> Steps:
        openers = re.compile(f"[{re.escape(self.openers)}]")
        while True:
            if self._back is None:
                run = yield (_NEVER if self._given_up else openers)
                if run:
                    self.sink.text(run)
                    continue
            char = yield from self.take()
            if char not in self.openers:
                self._give_back()
                continue
            self._kept_chars = 0
            try:
                yield from self.call(char)
                self._held.clear()
            except NotACall:
                if self.sink.is_open:
                    self.sink.end()
                self._give_back()

    def _give_back(self) -> None:
        self.sink.text("".join(self._held))
        self._held.clear()

    def take(self) -> Reading:
        """The next character; held while no call is open."""
        if self._back is not None:
            char, self._back = self._back, None
        else:
            char = yield None
        if not self.sink.is_open:
            self._held.append(char)
        return char

    def untake(self, char: str) -> None:
        """Put the last character back."""
        if not self.sink.is_open:
            self._held.pop()
        self._back = char

    def not_a_call(self, char: str) -> NotACall:
        """The character that does not fit is read again as ordinary text."""
        self.untake(char)
        return NotACall()

    def start(self, name: str) -> None:
        if self.sink.count >= MAX_CALLS:
            self._given_up = True
            raise NotACall
        self._held.clear()
        self.sink.start(name)

    def forget(self) -> None:
        """A call has been read; held text begins anew."""
        self._held.clear()

    def literal(self, text: str) -> Steps:
        for expected in text:
            char = yield from self.take()
            if char != expected:
                raise self.not_a_call(char)

    def past_blanks(self, limit: int = MAX_BLANKS) -> Reading:
        """The next character that is no blank."""
        for _ in range(limit):
            char = yield from self.take()
            if char not in BLANKS:
                return char
        raise NotACall

    def emit(self, text: str) -> None:
        """Argument text of the open call."""
        rest = self.sink.arguments(text)
        if rest:
            self._too_long(rest)

    def keep(self, out: list[str], text: str) -> None:
        """Text of a value that is not streamed; held as well, so it has the same limit."""
        out.append(text)
        self._kept_chars += len(text)
        if self._kept_chars > MAX_ARGUMENT_CHARS:
            self._too_long("")

    def _too_long(self, rest: str) -> NoReturn:
        """No call is this long: what follows is content to the end, wherever the text was cut."""
        self._given_up = True
        if self.sink.is_open:
            self._held.append(rest)
        raise NotACall

    def name_string(self) -> Reading:
        """A JSON string after its quote: a key or a name, short and without escapes."""
        out: list[str] = []
        while len(out) <= MAX_NAME_CHARS:
            char = yield from self.take()
            if char == '"':
                return "".join(out)
            if not (char.isalnum() or char in "_-.:/"):
                raise self.not_a_call(char)
            out.append(char)
        raise NotACall

    def json_value(self, first: str, out: list[str] | None) -> Steps:
        """A JSON value that begins with ``first``, into ``out``, or streamed as arguments if that is None.

        Brackets must match and nest at most 64 deep; control characters in strings are escaped on the way. The
        rest of JSON's grammar is checked once the text is whole.
        """
        put: _Put = self.emit if out is None else partial(self.keep, out)
        if first not in '{["':
            yield from self._json_scalar(first, put)
            return
        stack: list[str] = []
        char = first
        while True:
            put(char)
            if char == '"':
                yield from self._json_string(put)
            elif char in "{[":
                stack.append("}" if char == "{" else "]")
                if len(stack) > MAX_DEPTH:
                    raise NotACall
            elif not stack or stack.pop() != char:
                raise NotACall
            if not stack:
                return
            while run := (yield from self._run(_STRUCTURE)):
                put(run)
            char = yield from self.take()

    def _json_scalar(self, first: str, put: _Put) -> Steps:
        put(first)
        for _ in range(MAX_NAME_CHARS):
            char = yield from self.take()
            if char in ",}]" or char in BLANKS:
                self.untake(char)
                return
            put(char)
        raise NotACall

    def _json_string(self, put: _Put) -> Steps:
        while True:
            while run := (yield from self._run(_STRING)):
                put(run)
            char = yield from self.take()
            if char == "\\":
                put(char + (yield from self.take()))
            elif char == '"':
                put(char)
                return
            else:
                put(json.dumps(char)[1:-1])

    def _run(self, until: re.Pattern[str]) -> Reading:
        """Characters before the next one of a class; empty when that one is next."""
        run = yield until
        if run and not self.sink.is_open:
            self._held.append(run)
        return run
