"""Contexts that are kept here as text, for servers that know no contexts: each request sends the whole text again.

Forks are copies, a rollback cuts the text, and nothing is paused: what becomes of the KV is the server's affair.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Literal, Protocol, Self

from caesura.lang.backend import GenChunk, GenRequest, PendingCall, Piece, TokenLogprob, Tokens, ToolCallRequest
from caesura.lang.errors import StateError, UnsupportedByBackend

log = logging.getLogger("caesura.lang")

ZERO_WIDTH = "\N{ZERO WIDTH SPACE}"
LOWEST_LOGPROB = -9999.0  # stands for "impossible" where JSON has no infinity
_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


class Notices:
    """Things a user should hear once from a backend, not once a program."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._told: set[str] = set()

    def tell(self, kind: str, text: str) -> None:
        """Log a warning, the first time."""
        if kind not in self._told:
            self._told.add(kind)
            log.warning("%s: %s", self._backend, text)


class TextBackend(Protocol):
    """What a text session needs of its backend."""

    @property
    def name(self) -> str: ...

    @property
    def notices(self) -> Notices: ...


class TextSession:
    """A context as a list of pieces. Marks are positions in characters."""

    def __init__(self, owner: TextBackend, pieces: Sequence[Piece] = ()) -> None:
        self._owner = owner
        self.pieces: list[Piece] = list(pieces)
        self.closed = False

    @property
    def text(self) -> str:
        """The whole context."""
        return "".join(piece.text for piece in self.pieces)

    def _alive(self) -> None:
        if self.closed:
            raise StateError(f"a session of {self._owner.name} is closed")

    async def append(self, pieces: Sequence[Piece | Tokens]) -> None:
        self._alive()
        for piece in pieces:  # token ids mean nothing to the server; their text does
            self.pieces.append(Piece(piece.text) if isinstance(piece, Tokens) else piece)

    def generate(self, request: GenRequest) -> AsyncGenerator[GenChunk, None]:
        raise NotImplementedError

    async def prompt_logprobs(self, start: int) -> list[TokenLogprob]:
        raise UnsupportedByBackend(f"backend {self._owner.name!r} gives no logprobs of the prompt")

    async def prefill(self) -> None:
        """Nothing to compute ahead."""

    def copy(self) -> Self:
        """Another session with the same context."""
        return type(self)(self._owner, self.pieces)

    async def fork(self, n: int) -> list[Self]:
        self._alive()
        return [self.copy() for _ in range(n)]

    async def pause(self, calls: Sequence[PendingCall], *, wait: Literal["all", "any"] = "all") -> None:
        self._owner.notices.tell(
            "pause",
            "this server knows no pauses, so the program runs as it is, but no memory is managed while its tools run "
            "(HTTPBackend and `caesura serve` do that)",
        )

    async def report(self, fraction: float, call: int = 0) -> None:
        """Nobody wants to know."""

    async def resume(self) -> None:
        """Nothing was paused."""

    async def mark(self) -> int:
        return sum(len(piece.text) for piece in self.pieces)

    async def rollback(self, mark: int) -> None:
        self._alive()
        kept: list[Piece] = []
        left = mark
        for piece in self.pieces:
            if left <= 0:
                break
            kept.append(piece if len(piece.text) <= left else Piece(piece.text[:left], piece.special))
            left -= len(piece.text)
        if left > 0:
            raise StateError(f"the context has {mark - left} characters; it cannot be rolled back to {mark}")
        self.pieces = kept

    async def close(self) -> None:
        self.closed = True

    async def decisions(self) -> Sequence[Any]:
        return ()


def without_control(text: str, control: Sequence[str]) -> str:
    """Plain text in which no control token can be read, by a zero-width space after the first character of each."""
    for mark in control:
        if mark in text:
            text = text.replace(mark, mark[0] + ZERO_WIDTH + mark[1:])
    return text


def calls_as_text(calls: Sequence[ToolCallRequest]) -> str:
    """Calls as a program reads them in its text, whatever protocol they came by."""
    return "\n".join(
        f'<tool_call>\n{{"name": {json.dumps(call.name)}, "arguments": {call.arguments.strip() or "{}"}}}\n</tool_call>'
        for call in calls
    )


def calls_in_text(text: str) -> tuple[str, list[ToolCallRequest]] | None:
    """``(content, calls)`` of a text that ends with calls in these marks; None when it holds none, or broken ones."""
    found: list[ToolCallRequest] = []
    for match in _CALL.finditer(text):
        try:
            told = json.loads(match.group(1))
            found.append(ToolCallRequest(str(told["name"]), json.dumps(told["arguments"])))
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
    return (_CALL.sub("", text).strip("\n"), found) if found else None


def choice_regex(options: Sequence[str]) -> str:
    """A regex that matches exactly these texts."""
    return "(" + "|".join(re.sub(r"([\\^$.|?*+()\[\]{}])", r"\\\1", option) for option in options) + ")"


def aligned(
    given: Sequence[TokenLogprob], alone: Sequence[TokenLogprob]
) -> tuple[tuple[TokenLogprob, ...], tuple[TokenLogprob, ...]]:
    """Both lists with one entry for each token after the context. Alone, a text may fall into other tokens; their mean
    then stands in each place, so that means stay what they are."""
    if len(given) == len(alone) or not alone:
        return tuple(given), tuple(alone) or tuple(TokenLogprob(0.0, item.token_id, item.text) for item in given)
    mean = sum(item.logprob for item in alone) / len(alone)
    return tuple(given), tuple(TokenLogprob(mean, item.token_id, item.text) for item in given)


def last_tokens(tokens: Sequence[TokenLogprob], text: str) -> tuple[TokenLogprob, ...]:
    """The tokens at the end of a list that together hold ``text``."""
    length, at = 0, len(tokens)
    while at > 0 and length < len(text):
        at -= 1
        length += len(tokens[at].text or "")
    return tuple(tokens[at:])
