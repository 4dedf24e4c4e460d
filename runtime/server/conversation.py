"""A chat request as the template wants it, and its fingerprint: what must be equal for a kept context to go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from caesura.runtime.server.chat_protocol import ChatRequest, Message
from caesura.runtime.text.template import ChatTemplate, Piece
from caesura.runtime.text.tokenizer import Tokenizer, encode_pieces


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, tools and template arguments as plain JSON values."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]
    arguments: dict[str, Any]
    continue_final: bool = False

    def fingerprint(self, num_messages: int) -> bytes:
        """SHA-256 over everything that decides the tokens of the first messages."""
        said = [self.messages[:num_messages], self.tools, self.arguments]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).digest()


def conversation_of(body: ChatRequest) -> Conversation:
    """Normalize: parts become text, arguments become objects, nulls go. Raises ApiError for parts that are no text."""
    names: dict[str, str] = {}
    messages = []
    for index, message in enumerate(body.messages):
        out: dict[str, Any] = {"role": _role(message), "content": message.text(index)}
        if message.tool_calls:
            out["tool_calls"] = [
                _call(call.id, call.function.name, call.function.arguments, names) for call in message.tool_calls
            ]
        if out["role"] == "tool":
            out["tool_call_id"] = message.tool_call_id or ""
            out["name"] = message.name or names.get(message.tool_call_id or "", "tool")
        elif message.name:
            out["name"] = message.name
        if out["role"] == "assistant" and message.reasoning_content:
            out["reasoning_content"] = message.reasoning_content
        messages.append(out)
    _put_in_order(messages)
    tools = tuple({"type": "function", "function": tool.spec()} for tool in body.tools or ())
    last_is_own = messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")
    continue_final = bool(body.continue_final_message) and last_is_own
    return Conversation(tuple(messages), tools, body.template_arguments(), continue_final)


def _put_in_order(messages: list[dict[str, Any]]) -> None:
    """Results in the order of their calls: most templates write no ids, so that their place is all that tells them
    apart."""
    place: dict[str, int] = {}
    start = 0
    for at, message in enumerate([*messages, {"role": "end"}]):
        if message["role"] == "tool":
            continue
        results = sorted(messages[start:at], key=lambda result: place.get(result["tool_call_id"], len(place)))
        messages[start:at] = results
        place = {call["id"]: number for number, call in enumerate(message.get("tool_calls", ()))}
        start = at + 1


def _role(message: Message) -> str:
    return {"developer": "system", "function": "tool"}.get(message.role, message.role)


def _call(call_id: str, name: str, arguments: Any, names: dict[str, str]) -> dict[str, Any]:
    names[call_id] = name
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": plain_arguments(arguments)}}


def plain_arguments(arguments: Any) -> Any:
    """Arguments as an object where they are one: templates write them out themselves."""
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
        return value if isinstance(value, dict) else arguments
    return arguments or {}


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and how their text ends: a template may open the model's thinking there."""

    token_ids: list[int]
    end: str


def prompt_of(conversation: Conversation, template: ChatTemplate, tokenizer: Tokenizer) -> Prompt:
    """The whole conversation, up to the opening of the next assistant turn. May take long: call it on a thread."""
    messages: Sequence[dict[str, Any]] = conversation.messages
    rest = ""
    if conversation.continue_final:
        messages, rest = messages[:-1], messages[-1]["content"]
    pieces = template.pieces(
        messages, tools=list(conversation.tools) or None, add_generation_prompt=True, **conversation.arguments
    )
    if rest:
        pieces.append(Piece(rest, special=False))
    return Prompt(encode_pieces(tokenizer, pieces), _end(pieces))


def next_prompt(conversation: Conversation, at: int, template: ChatTemplate, tokenizer: Tokenizer) -> Prompt | None:
    """What follows the assistant turn with which the first ``at`` messages end: the results of its calls, or what the
    user says next. None for anything else, which only the whole conversation can show. Call it on a thread."""
    messages = conversation.messages[at:]
    roles = {message["role"] for message in messages}
    tools, arguments = list(conversation.tools) or None, conversation.arguments
    if roles == {"tool"}:
        results = [(message["name"], message["content"]) for message in messages]
        pieces = template.tool_results(results, tools=tools, **arguments)
    elif roles == {"user"} and not conversation.messages[at - 1].get("tool_calls"):
        pieces = template.following(messages, tools=tools, **arguments)
    else:
        return None
    return Prompt(encode_pieces(tokenizer, pieces, continuation=True), _end(pieces))


def _end(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces[-3:])[-200:]


def later_starts(conversation: Conversation) -> list[int]:
    """The messages of the user, but for the first one, from which a conversation too long may begin."""
    messages = conversation.messages
    first = _after_system(messages)
    return [at for at in range(first + 1, len(messages)) if messages[at]["role"] == "user"]


def from_start(conversation: Conversation, start: int) -> Conversation:
    """What the system says, and all from message ``start`` on."""
    messages = conversation.messages
    return replace(conversation, messages=(*messages[: _after_system(messages)], *messages[start:]))


def _after_system(messages: Sequence[dict[str, Any]]) -> int:
    return next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))


def open_calls(conversation: Conversation) -> tuple[int, frozenset[str]]:
    """(number of messages up to and with the last assistant turn that called tools, the ids its results answer).

    No ids when the conversation does not end with exactly that turn's results.
    """
    messages = conversation.messages
    at = len(messages)
    while at and messages[at - 1]["role"] == "tool":
        at -= 1
    if at in (0, len(messages)) or not messages[at - 1].get("tool_calls"):
        return 0, frozenset()
    called = [call["id"] for call in messages[at - 1]["tool_calls"]]
    answered = [message["tool_call_id"] for message in messages[at:]]
    if len(set(called)) != len(called) or sorted(called) != sorted(answered):
        return 0, frozenset()
    return at, frozenset(called)
