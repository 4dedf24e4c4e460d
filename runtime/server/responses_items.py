"""Items of the Responses API as messages of a chat: calls and results in their turns, reasoning with its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from caesura.runtime.server.chat_protocol import CalledFunction, Message, MessageToolCall
from caesura.runtime.server.errors import ApiError
from caesura.runtime.server.responses_protocol import Content, InputItem


def items_of(value: str | list[InputItem]) -> list[InputItem]:
    """``input`` as a list."""
    return [InputItem("message", role="user", content=value)] if isinstance(value, str) else value


def messages_of(items: Sequence[InputItem]) -> list[Message]:
    """Messages, one assistant turn for everything between two inputs. Raises ApiError for what is not understood."""
    out: list[Message] = []
    thought = ""
    for index, item in enumerate(items):
        where = f"input[{index}]"
        match item.type or "message":
            case "message":
                text = _text(item.content, f"{where}.content")
                if item.role is None:
                    raise ApiError(400, f"{where}.role is missing", param=f"{where}.role")
                if item.role != "assistant":
                    out.append(Message(item.role, text))
                    thought = ""
                    continue
                turn = _turn(out)
                turn.content = "\n".join(part for part in (turn.content, text) if isinstance(part, str) and part)
            case "reasoning":
                thought = _text(item.content, f"{where}.content")
                continue
            case "function_call":
                if not (item.call_id and item.name):
                    raise ApiError(400, f"{where} needs call_id and name", param=where)
                turn = _turn(out)
                call = MessageToolCall(CalledFunction(item.name, item.arguments or "{}"), item.call_id)
                turn.tool_calls = [*(turn.tool_calls or ()), call]
            case "function_call_output":
                if not item.call_id or item.output is None:
                    raise ApiError(400, f"{where} needs call_id and output", param=where)
                out.append(Message("tool", _text(item.output, f"{where}.output"), tool_call_id=item.call_id))
                continue
            case other:
                message = f"{where} is of type {other!r}; messages, function calls and their outputs are supported"
                raise ApiError(400, message, param=f"{where}.type")
        if thought:
            turn.reasoning_content, thought = thought, ""
    return out


def _turn(messages: list[Message]) -> Message:
    """The assistant turn at the end, a new one if there is none."""
    if not messages or messages[-1].role != "assistant":
        messages.append(Message("assistant", ""))
    return messages[-1]


def _text(content: Content | None, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type not in ("text", "input_text", "output_text", "refusal", "reasoning_text", "summary_text"):
            raise ApiError(400, f"{where}: parts of type {part.type!r} are not supported, only text", param=where)
    return "\n".join(part.text or part.refusal or "" for part in content)


def check_calls(messages: Sequence[Message]) -> None:
    """Every result answers a call, and every call has its result before somebody speaks again. Raises ApiError."""
    called: set[str] = set()
    answered: set[str] = set()
    for message in messages:
        if message.role == "tool":
            call_id = message.tool_call_id or ""
            if call_id not in called:
                raise ApiError(
                    400, f"No tool call found for function call output with call_id {call_id}.", param="input"
                )
            answered.add(call_id)
        else:
            called |= {call.id for call in message.tool_calls or ()}
    if missing := sorted(called - answered):
        raise ApiError(400, f"No tool output found for function call {missing[0]}.", param="input")


def message_of(content: str, calls: Sequence[tuple[str, str, str]]) -> Message:
    """The assistant turn of an answer: its text, and (id, name, arguments) of its calls."""
    said = [MessageToolCall(CalledFunction(name, arguments), call_id) for call_id, name, arguments in calls]
    return Message("assistant", content, tool_calls=said or None)


def listed(items: Sequence[InputItem], prefix: str) -> list[dict[str, Any]]:
    """Items as ``.../input_items`` shows them, each with an id."""
    out = []
    for index, item in enumerate(items):
        plain: dict[str, Any] = msgspec.to_builtins(item)
        plain.setdefault("type", "message")
        plain.setdefault("id", f"{prefix}_{index}")
        if plain["type"] == "message":
            kind = "output_text" if item.role == "assistant" else "input_text"
            if isinstance(item.content, str):
                plain["content"] = [{"type": kind, "text": item.content}]
            plain.setdefault("status", "completed")
        elif plain["type"] == "reasoning":
            plain.setdefault("summary", [])
        else:
            plain.setdefault("status", "completed")
        out.append(plain)
    return out
