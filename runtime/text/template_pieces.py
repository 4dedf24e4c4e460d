"""Strings that remember which of their characters a template wrote and which came from a message.

A chat template mixes its own markers with text from users and tools. To tokenize the two apart, message text enters
the template as ``Marked`` strings: they behave as ``str`` in every comparison and method, and carry one byte
per character, 1 for message text. Whatever a template does with them - concatenating, trimming, splitting,
slicing - the marks follow; where an operation is not known to keep them, the whole result counts as
message text, which is the safe direction: it can never become a control token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

from caesura.runtime.errors import InvalidRequest, TemplateError
from jinja2 import Undefined

MAX_DEPTH = 64
MAX_INDENT = 16


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of rendered text. ``special``: written by the template, so control tokens in it are meant."""

    text: str
    special: bool


class Marked(str):
    """A string with one mark per character. Without a mask all of it is message text."""

    __slots__ = ("mask",)
    mask: bytes

    def __new__(cls, text: str = "", mask: bytes | None = None) -> Marked:
        self = super().__new__(cls, text)
        self.mask = b"\x01" * len(self) if mask is None else mask
        return self

    def __str__(self) -> str:
        return self  # str() and soft_str() in compiled templates keep the marks

    def __add__(self, other: str) -> Marked:
        if not isinstance(other, str):
            return NotImplemented
        return Marked(str.__add__(self, other), self.mask + mask_of(other))

    def __radd__(self, other: str) -> Marked:
        if not isinstance(other, str):
            return NotImplemented
        return Marked(str.__add__(other, self), mask_of(other) + self.mask)

    def __mul__(self, count: SupportsIndex) -> Marked:
        return Marked(str.__mul__(self, count), self.mask * count.__index__())

    __rmul__ = __mul__

    def __mod__(self, value: Any) -> Marked:
        return Marked(str.__mod__(self, value))

    def __rmod__(self, value: Any) -> Marked:
        return Marked(str.__mod__(value, self))

    def __getitem__(self, key: SupportsIndex | slice) -> Marked:
        if isinstance(key, slice):
            return Marked(str.__getitem__(self, key), self.mask[key])
        index = key.__index__()
        return Marked(str.__getitem__(self, index), bytes([self.mask[index]]))

    def __iter__(self) -> Iterator[str]:
        for i, char in enumerate(str.__iter__(self)):
            yield Marked(char, self.mask[i : i + 1])

    def __format__(self, spec: str) -> str:
        return Marked(str.__format__(self, spec))

    def strip(self, chars: str | None = None) -> Marked:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> Marked:
        text = str.lstrip(self, chars)
        return Marked(text, self.mask[len(self) - len(text) :])

    def rstrip(self, chars: str | None = None) -> Marked:
        text = str.rstrip(self, chars)
        return Marked(text, self.mask[: len(text)])

    def removeprefix(self, prefix: str, /) -> Marked:
        return self[len(prefix) :] if prefix and self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> Marked:
        return self[: len(self) - len(suffix)] if suffix and self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(str.split(self, sep, maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(str.rsplit(self, sep, maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> list[str]:
        return self._located(str.splitlines(self, keepends))

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        a, b, c = self._located(list(str.partition(self, sep)))
        return a, b, c

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        a, b, c = self._located(list(str.rpartition(self, sep)))
        return a, b, c

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> Marked:
        if not old:
            return Marked(str.replace(self, old, new, count))
        parts = str.split(self, old, count)
        out, masks, at = [], [], 0
        for i, part in enumerate(parts):
            if i:  # what stands in for message text is message text
                out.append(str.__str__(new))
                masks.append(b"\x01" * len(new) if 1 in self.mask[at - len(old) : at] else mask_of(new))
            out.append(part)
            masks.append(self.mask[at : at + len(part)])
            at += len(part) + len(old)
        return Marked("".join(out), b"".join(masks))

    def join(self, parts: Iterable[str], /) -> Marked:
        return concat([item for i, part in enumerate(parts) for item in ((self, part) if i else (part,))])

    def _located(self, parts: Sequence[str], gap_chars: int = 0) -> list[str]:
        """Parts that lie in the string in this order, ``gap_chars`` apart (0: with blanks or nothing between)."""
        out: list[str] = []
        at = 0
        for part in parts:
            if not gap_chars:
                at = str.find(self, part, at)
            out.append(Marked(part, self.mask[at : at + len(part)]))
            at += len(part) + gap_chars
        return out


def _all_marked(name: str) -> Any:
    plain = getattr(str, name)

    def method(self: Marked, *args: Any, **kwargs: Any) -> Any:
        return spread(plain(self, *args, **kwargs))

    method.__name__ = name
    return method


_CASE_AND_WIDTH = "capitalize casefold center expandtabs ljust lower rjust swapcase title translate upper zfill"
for _name in _CASE_AND_WIDTH.split(" "):
    setattr(Marked, _name, _all_marked(_name))


def mask_of(text: str) -> bytes:
    """The marks of any string; a plain one is the template's."""
    return text.mask if isinstance(text, Marked) else bytes(len(text))


def concat(parts: Iterable[str]) -> Marked:
    """Join strings and their marks."""
    items = list(parts)
    return Marked("".join(items), b"".join(map(mask_of, items)))


def spread(value: Any) -> Any:
    """Mark every plain string in a result whose input was marked."""
    if isinstance(value, str):
        return value if isinstance(value, Marked) else Marked(value)
    if isinstance(value, list | tuple):
        return type(value)(map(spread, value))
    return value


def is_clean(value: Any, depth: int = 0) -> bool:
    """Whether no message text can lie in ``value``. What cannot be looked into is not clean."""
    if isinstance(value, str):
        return not isinstance(value, Marked)
    if value is None or isinstance(value, bool | int | float | Undefined):
        return True
    if depth > MAX_DEPTH:
        return False
    if isinstance(value, Mapping):
        return all(is_clean(k, depth + 1) and is_clean(v, depth + 1) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(is_clean(item, depth + 1) for item in value)
    return False


def mark(value: Any, field: str, depth: int = 0) -> Any:
    """A message, tool or argument as plain JSON types with every string marked.

    Raises InvalidRequest, naming the field, for other types and for nesting beyond 64.
    """
    if depth > MAX_DEPTH:
        raise InvalidRequest(f"{field} is nested deeper than {MAX_DEPTH}")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value if isinstance(value, Marked) else Marked(str.__str__(value))
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {mark(k, field, depth + 1): mark(v, field, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [mark(item, field, depth + 1) for item in value]
    raise InvalidRequest(f"{field} holds a {type(value).__name__}; only JSON values can go into a template")


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The ``tojson`` filter of chat templates: plain JSON, no HTML escapes. Message text in it marks it whole."""
    sizes = [len(part) for part in (separators or ())]
    sizes.append(len(indent) if isinstance(indent, str) else abs(indent or 0))
    if max(sizes) > MAX_INDENT:
        raise TemplateError(f"tojson indents by at most {MAX_INDENT}")
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return text if is_clean(value) else Marked(text)


def to_pieces(text: str) -> list[Piece]:
    """Runs of equal marks. Blanks between a marker and message text go to the message, where words begin."""
    mask = mask_of(text)
    plain = str.__str__(text)
    pieces: list[Piece] = []
    at = 0
    while at < len(plain):
        mine = mask[at]
        end = mask.find(1 - mine, at)
        end = len(plain) if end < 0 else end
        if not mine and end < len(plain):
            while end > at and plain[end - 1] == " ":
                end -= 1
            if end == at:  # blanks alone: they become part of the message text that follows
                follows = mask.find(1, at)
                stop = mask.find(0, follows)
                end = len(plain) if stop < 0 else stop
                pieces.append(Piece(plain[at:end], special=False))
                at = end
                continue
            pieces.append(Piece(plain[at:end], special=True))
            follows = mask.find(1, end)
            stop = mask.find(0, follows)
            stop = len(plain) if stop < 0 else stop
            pieces.append(Piece(plain[end:stop], special=False))
            at = stop
            continue
        pieces.append(Piece(plain[at:end], special=not mine))
        at = end
    return _merged(pieces)


def _merged(pieces: Iterable[Piece]) -> list[Piece]:
    out: list[Piece] = []
    for piece in pieces:
        if out and out[-1].special == piece.special:
            out[-1] = Piece(out[-1].text + piece.text, piece.special)
        else:
            out.append(piece)
    return out
