"""The three tool-call formats, each as one machine."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field

from caesura.runtime.text.tool_machine import BLANKS, MAX_DEPTH, MAX_NAME_CHARS, Machine, NotACall, Reading, Steps

_NAME_KEYS = frozenset({"name", "function"})
_ARGUMENT_KEYS = frozenset({"arguments", "parameters"})
_OTHER_KEYS = frozenset({"id", "type"})
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_ESCAPES = {
    "n": "\\n", "t": "\\t", "r": "\\r", "b": "\\b", "f": "\\f", "0": "\\u0000", "a": "\\u0007", "v": "\\u000b",
    "\\": "\\\\", "'": "'", '"': '\\"', "/": "/", "\n": "",
}  # fmt: skip


@dataclass(slots=True)
class _Fields:
    name: str | None = None
    started: bool = False
    early: list[str] = field(default_factory=list)  # arguments that came before the name, or are no object


class _JsonMachine(Machine):
    """Calls as JSON objects with a name and arguments, in any order of keys."""

    def accepts(self, name: str) -> bool:
        """Whether a call of ``name`` is one."""
        return bool(name)

    def json_call(self) -> Steps:
        """One call, after its ``{``."""
        fields = _Fields()
        yield from self._object(fields, nested=False)
        if fields.name is None:
            raise NotACall
        if not fields.started:
            self.start(fields.name)
            self.emit(_as_object("".join(fields.early)))
        self.sink.end()

    def _object(self, fields: _Fields, *, nested: bool) -> Steps:
        char = yield from self.past_blanks()
        while char != "}":
            if char != '"':
                raise self.not_a_call(char)
            key = yield from self.name_string()
            if key not in _NAME_KEYS | _ARGUMENT_KEYS | _OTHER_KEYS:
                raise NotACall
            char = yield from self.past_blanks()
            if char != ":":
                raise self.not_a_call(char)
            yield from self._field(key, (yield from self.past_blanks()), fields, nested)
            char = yield from self.past_blanks()
            if char == ",":
                char = yield from self.past_blanks()
            elif char != "}":
                if fields.started:  # the closing brace is missing: what there is counts
                    self.untake(char)
                    return
                raise self.not_a_call(char)

    def _field(self, key: str, first: str, fields: _Fields, nested: bool) -> Steps:
        if key in _NAME_KEYS and first == '"' and fields.name is None:
            name = yield from self.name_string()
            if not self.accepts(name):
                raise NotACall
            fields.name = name
        elif key == "function" and first == "{" and not nested:
            yield from self._object(fields, nested=True)
        elif key in _ARGUMENT_KEYS and not fields.started and not fields.early:
            if first == "{" and fields.name is not None:
                self.start(fields.name)
                fields.started = True
                yield from self.json_value(first, None)
            else:
                yield from self.json_value(first, fields.early)
        elif key in _OTHER_KEYS:
            yield from self.json_value(first, [])
        else:
            raise self.not_a_call(first)


def _as_object(raw: str) -> str:
    """Arguments written as nothing, null or a string that holds JSON."""
    if raw in ("", "null"):
        return "{}"
    if raw.startswith('"'):
        try:
            inner = json.loads(raw)
        except ValueError:
            return raw
        return inner if isinstance(inner, str) and inner.strip() else "{}"
    return raw


class HermesMachine(_JsonMachine):
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, one or several objects in a tag."""

    openers = "<"

    def call(self, opener: str) -> Steps:
        del opener
        yield from self.literal("tool_call>")
        while True:
            char = yield from self.past_blanks()
            in_list = char == "["
            if in_list:
                char = yield from self.past_blanks()
            char = yield from self._calls(char, in_list)
            if char != "<":
                raise self.not_a_call(char)
            char = yield from self.take()
            if char == "/":
                yield from self.literal("tool_call>")
                return
            if char != "t":  # a new tag may follow without the old one's end
                raise self.not_a_call(char)
            yield from self.literal("ool_call>")

    def _calls(self, char: str, in_list: bool) -> Reading:
        """Objects up to the first character that begins none, which is returned."""
        if char != "{":
            raise self.not_a_call(char)
        while char == "{":
            yield from self.json_call()
            self.forget()
            char = yield from self.past_blanks()
            if char in ",;":
                char = yield from self.past_blanks()
        if in_list and char == "]":
            char = yield from self.past_blanks()
        return char


class Llama3Machine(_JsonMachine):
    """A bare ``{"name": ..., "parameters": {...}}``, several with ``;`` between, ``<|python_tag|>`` in front or not."""

    openers = "{[<"

    def accepts(self, name: str) -> bool:
        """JSON is also an ordinary answer, so it must name a tool; without a list of tools it must begin the answer."""
        if self.names:
            return name in self.names
        return bool(name) and (self.sink.count > 0 or not self.sink.any_content)

    def call(self, opener: str) -> Steps:
        char = opener
        if char == "<":
            yield from self.literal("|python_tag|>")
            char = yield from self.past_blanks()
        in_list = char == "["
        if in_list:
            char = yield from self.past_blanks()
        if char != "{":
            raise self.not_a_call(char)
        while char == "{":
            yield from self.json_call()
            self.forget()
            char = yield from self.past_blanks()
            if char in ",;":
                char = yield from self.past_blanks()
        if in_list and char == "]":
            return
        raise self.not_a_call(char)


class PythonicMachine(Machine):
    """``[f(a=1, b="x"), g()]``: calls in a list, arguments by keyword, literals alone."""

    openers = "["

    def __init__(self, names: Collection[str]) -> None:
        self._prefixes = {name[:i] for name in names for i in range(len(name) + 1)}
        super().__init__(names)

    def call(self, opener: str) -> Steps:
        del opener
        char = yield from self.past_blanks()
        while True:
            name = yield from self._identifier(char, "(", self._prefixes)
            if self.names and name not in self.names:
                raise NotACall
            yield from self._arguments(name)
            self.sink.end()
            self.forget()
            char = yield from self.past_blanks()
            if char == ",":
                char = yield from self.past_blanks()
            if char == "]":
                return

    def _identifier(self, first: str, end: str, prefixes: Collection[str] = ()) -> Reading:
        """A name up to ``end``, which may have blanks before it."""
        name, char = "", first
        while len(name) <= MAX_NAME_CHARS:
            if char == end and name:
                return name
            if char in BLANKS and name:
                char = yield from self.past_blanks()
                if char == end:
                    return name
                raise self.not_a_call(char)
            if not (char.isalnum() or char in "_.-") or (not name and char.isdigit()):
                raise self.not_a_call(char)
            name += char
            if prefixes and name not in prefixes:
                raise NotACall
            char = yield from self.take()
        raise NotACall

    def _arguments(self, name: str) -> Steps:
        char = yield from self.past_blanks()
        if char == ")":
            self.start(name)
            self.emit("{}")
            return
        between = "{"
        while True:
            key = yield from self._identifier(char, "=")
            if not self.sink.is_open:
                self.start(name)
            self.emit(f"{between}{json.dumps(key)}: ")
            yield from self._value((yield from self.past_blanks()), 0)
            between = ", "
            char = yield from self.past_blanks()
            if char == ",":
                char = yield from self.past_blanks()
            elif char != ")":
                raise self.not_a_call(char)
            if char == ")":
                self.emit("}")
                return

    def _value(self, first: str, depth: int) -> Steps:
        if depth > MAX_DEPTH:
            raise NotACall
        if first in "\"'":
            yield from self._string(first)
        elif first in "[(":
            yield from self._items("]" if first == "[" else ")", depth)
        elif first == "{":
            yield from self._dict(depth)
        else:
            self.emit((yield from self._word(first)))

    def _items(self, end: str, depth: int) -> Steps:
        between = "["
        char = yield from self.past_blanks()
        while char != end:
            self.emit(between)
            between = ", "
            yield from self._value(char, depth + 1)
            char = yield from self.past_blanks()
            if char == ",":
                char = yield from self.past_blanks()
            elif char != end:
                raise self.not_a_call(char)
        self.emit("[]" if between == "[" else "]")

    def _dict(self, depth: int) -> Steps:
        between = "{"
        char = yield from self.past_blanks()
        while char != "}":
            self.emit(between)
            between = ", "
            if char in "\"'":
                yield from self._string(char)
            else:
                self.emit(json.dumps((yield from self._word(char))))
            char = yield from self.past_blanks()
            if char != ":":
                raise self.not_a_call(char)
            self.emit(": ")
            yield from self._value((yield from self.past_blanks()), depth + 1)
            char = yield from self.past_blanks()
            if char == ",":
                char = yield from self.past_blanks()
            elif char != "}":
                raise self.not_a_call(char)
        self.emit("{}" if between == "{" else "}")

    def _word(self, first: str) -> Reading:
        """A number or a constant, as JSON."""
        word, char = "", first
        while char.isalnum() or char in "+-._":
            word += char
            if len(word) > MAX_NAME_CHARS:
                raise NotACall
            char = yield from self.take()
        if word in _WORDS:
            self.untake(char)
            return _WORDS[word]
        number = _number(word)
        if number is None:
            raise self.not_a_call(char)
        self.untake(char)
        return number

    def _string(self, quote: str) -> Steps:
        self.emit('"')
        char = yield from self.take()
        closing = 1
        if char == quote:
            char = yield from self.take()
            if char != quote:
                self.untake(char)
                self.emit('"')
                return
            closing = 3
            char = yield from self.take()
        run = 0  # quotes in a row
        while True:
            if char == quote:
                run += 1
                if run == closing:
                    self.emit('"')
                    return
            else:
                self.emit(json.dumps(quote, ensure_ascii=False)[1:-1] * run)
                run = 0
                if char == "\\":
                    yield from self._escape()
                else:
                    self.emit(json.dumps(char, ensure_ascii=False)[1:-1])
            char = yield from self.take()

    def _escape(self) -> Steps:
        char = yield from self.take()
        if char in _ESCAPES:
            self.emit(_ESCAPES[char])
            return
        digits = {"x": 2, "u": 4, "U": 8}.get(char)
        if digits is None:
            raise self.not_a_call(char)
        code = ""
        for _ in range(digits):
            char = yield from self.take()
            if char not in "0123456789abcdefABCDEF":
                raise self.not_a_call(char)
            code += char
        value = int(code, 16)
        if value > 0x10FFFF:
            raise NotACall
        self.emit(f"\\u{value:04x}" if value < 0x10000 else json.dumps(chr(value))[1:-1])


def _number(word: str) -> str | None:
    """A Python number of at most 64 characters as JSON."""
    try:
        if word.lstrip("+-").isdigit():
            return str(int(word))
        value = float(word)
    except ValueError:
        return None
    return json.dumps(value) if abs(value) < float("inf") else None
