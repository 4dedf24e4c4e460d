"""Between the language's pieces and OpenAI's messages: turns as marks in the text, calls with their ids."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from caesura.lang.backend import Piece, TokenLogprob, ToolCallRequest, ToolSpec
from caesura.lang.backends.http_text import calls_in_text
from caesura.lang.errors import StateError, UnsupportedByBackend

END = "<|end|>\n"
_MARK = re.compile(r"<\|tools\|>(?P<tools>.*)\n|<\|(?P<end>end)\|>\n|<\|(?P<role>\w+)\|>")


class MessageChat:
    """Turns as marks that become messages. Marks lie in special pieces alone, so content cannot forge them."""

    stop: tuple[str, ...] = ()

    async def turn(
        self, role: str, *, first: bool, tools: Sequence[ToolSpec] | None = None
    ) -> tuple[Sequence[Piece], Sequence[Piece]]:
        declared = ""
        if tools:  # for the request's `tools`, not for the model's eyes
            declared = f"<|tools|>{json.dumps(list(tools)).replace('<', chr(92) + 'u003c')}\n"
        return [Piece(f"{declared}<|{role}|>", special=True)], [Piece(END, special=True)]

    async def tool_results(
        self, results: Sequence[tuple[str, str]], *, tools: Sequence[ToolSpec] | None = None
    ) -> Sequence[Piece]:
        pieces = [Piece(END, special=True)]
        for _, content in results:  # a name may be the model's own words, and calls are told apart by their ids
            pieces += [Piece("<|tool|>", special=True), Piece(content), Piece(END, special=True)]
        return [*pieces, Piece("<|assistant|>", special=True)]


@dataclass(slots=True)
class Turn:
    """One turn as it was written."""

    role: str
    content: str = ""


@dataclass(slots=True)
class Conversation:
    """What a list of pieces says: turns, the tools declared in the first, and whether the last turn is open."""

    turns: list[Turn] = field(default_factory=list)
    tools: list[ToolSpec] = field(default_factory=list)
    is_open: bool = False
    outside: str = ""  # text that stands in no turn


def read_pieces(pieces: Sequence[Piece]) -> Conversation:
    """The conversation in ``pieces``."""
    found = Conversation()
    for piece in pieces:
        if not piece.special:
            if found.is_open:
                found.turns[-1].content += piece.text
            else:
                found.outside += piece.text
            continue
        for mark in _MARK.finditer(piece.text):
            if mark["tools"] is not None:
                found.tools = json.loads(mark["tools"])
            elif mark["end"]:
                found.is_open = False
            else:
                found.turns.append(Turn(mark["role"]))
                found.is_open = True
    return found


def open_answer(found: Conversation) -> str:
    """What the open assistant turn already holds. Raises where a chat endpoint cannot go on."""
    if found.outside.strip():
        raise UnsupportedByBackend(
            f"a chat endpoint takes text in turns only; {found.outside.strip()[:60]!r} stands outside of any"
        )
    if not found.is_open or found.turns[-1].role != "assistant":
        raise StateError("a chat endpoint generates in the assistant's turn only; write s += assistant(gen(...))")
    return found.turns[-1].content


def messages_of(turns: Sequence[Turn], ids: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Turns as messages. A text with calls that results follow becomes a message with calls; ``ids`` are the call ids
    by such a text. Results that answer no call become text of the user."""
    messages: list[dict[str, Any]] = []
    at = 0
    while at < len(turns):
        turn, at = turns[at], at + 1
        results: list[Turn] = []
        while turn.role == "assistant" and at < len(turns) and turns[at].role == "tool":
            results.append(turns[at])
            at += 1
        called = calls_in_text(turn.content) if results else None
        if called is None or len(called[1]) != len(results):
            messages += [_plain(one) for one in (turn, *results)]
            continue
        content, calls = called
        names = list(ids.get(turn.content, ()))
        if len(names) != len(calls):
            names = [f"call_{len(messages)}_{number}" for number in range(len(calls))]
        messages.append({"role": "assistant", "content": content or None, "tool_calls": _shown(calls, names)})
        messages += [
            {"role": "tool", "tool_call_id": name, "content": result.content}
            for name, result in zip(names, results, strict=True)
        ]
    return messages


def _plain(turn: Turn) -> dict[str, Any]:
    if turn.role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{turn.content}\n</tool_response>"}
    return {"role": turn.role, "content": turn.content}


def _shown(calls: Sequence[ToolCallRequest], names: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"id": name, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call, name in zip(calls, names, strict=True)
    ]


@dataclass(slots=True)
class CallParts:
    """Tool calls of an answer, gathered from its deltas; whole messages are one delta."""

    _parts: dict[int, dict[str, str]] = field(default_factory=dict)

    def add(self, deltas: Sequence[Mapping[str, Any]] | None) -> None:
        for number, delta in enumerate(deltas or ()):
            part = self._parts.setdefault(delta.get("index", number), {"id": "", "name": "", "arguments": ""})
            function = delta.get("function") or {}
            part["id"] = delta.get("id") or part["id"]
            part["name"] = function.get("name") or part["name"]
            part["arguments"] += function.get("arguments") or ""

    @property
    def calls(self) -> tuple[ToolCallRequest, ...]:
        return tuple(
            ToolCallRequest(part["name"], part["arguments"] or "{}") for _, part in sorted(self._parts.items())
        )

    @property
    def ids(self) -> list[str]:
        return [part["id"] or f"call_{index}" for index, part in sorted(self._parts.items())]


def chat_logprobs(told: Mapping[str, Any] | None) -> tuple[TokenLogprob, ...]:
    """Logprobs of a chat answer. The endpoint gives no token ids: they are -1."""
    return tuple(
        TokenLogprob(
            item["logprob"],
            -1,
            item["token"],
            tuple((other["logprob"], -1, other["token"]) for other in item.get("top_logprobs") or ()),
        )
        for item in (told or {}).get("content") or ()
    )


def text_logprobs(told: Mapping[str, Any] | None) -> tuple[TokenLogprob, ...]:
    """Logprobs of a text completion, in OpenAI's older shape; tokens without a number are left out."""
    if not told or not told.get("tokens"):
        return ()
    tops = told.get("top_logprobs") or [None] * len(told["tokens"])
    return tuple(
        TokenLogprob(value, -1, token, tuple((lp, -1, other) for other, lp in (top or {}).items()))
        for token, value, top in zip(told["tokens"], told["token_logprobs"], tops, strict=True)
        if value is not None
    )


def is_strict(schema: Any) -> bool:
    """Whether a schema meets what OpenAI asks of strict ones: objects closed, and all their properties required."""
    if isinstance(schema, list):
        return all(is_strict(item) for item in schema)
    if not isinstance(schema, dict):
        return True
    if schema.get("type") == "object" or "properties" in schema:
        closed = schema.get("additionalProperties") is False
        if not closed or set(schema.get("required", ())) != set(schema.get("properties", {})):
            return False
    return all(is_strict(value) for value in schema.values())
