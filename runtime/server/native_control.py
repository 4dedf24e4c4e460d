"""SGLang's routes that steer: sessions, generation on hold; and its parsers as routes."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from caesura.runtime.server import limits
from caesura.runtime.server.chat_protocol import Tool
from caesura.runtime.server.errors import ApiError
from caesura.runtime.server.http import principal_of, read, reply
from caesura.runtime.server.sessions import CloseSession, OpenSession
from caesura.runtime.server.state import ServerState
from caesura.runtime.text.reasoning import MARKS, detect_marks, split
from caesura.runtime.text.tool_parser import ToolFormat, parse
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

_FORMATS = {
    "hermes": ToolFormat.HERMES,
    "qwen": ToolFormat.HERMES,
    "qwen25": ToolFormat.HERMES,
    "llama3": ToolFormat.LLAMA3_JSON,
    "llama3_json": ToolFormat.LLAMA3_JSON,
    "pythonic": ToolFormat.PYTHONIC,
}


class PauseGeneration(msgspec.Struct):
    """The body of ``/pause_generation``."""

    mode: Literal["abort", "retract", "in_place"] = "abort"


class ParseCalls(msgspec.Struct):
    """The body of ``/parse_function_call``. Without ``tool_call_parser`` the served model's format is read."""

    text: limits.Text
    tools: Annotated[list[Tool], Meta(max_length=limits.MAX_TOOLS)] = []
    tool_call_parser: limits.Id | None = None


class SplitReasoning(msgspec.Struct):
    """The body of ``/separate_reasoning``. Without ``reasoning_parser`` the served model's marks are read."""

    text: limits.Text
    reasoning_parser: limits.Id | None = None


class NativeControl:
    """The routes."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def open_session(self, request: Request) -> Response:
        """A new session; the answer is its id."""
        body = await read(request, OpenSession)
        return reply(self._state.sessions.open(principal_of(request).key_id, body))

    async def close_session(self, request: Request) -> Response:
        """Forget a session. Nothing happens when there is none."""
        body = await read(request, CloseSession)
        closed = self._state.sessions.close(principal_of(request).key_id, body.session_id)
        return reply({"success": True, "closed": closed})

    async def pause_generation(self, request: Request) -> Response:
        """Put generation on hold, for every key: ``abort`` ends what runs, ``retract`` gives up its KV, ``in_place``
        leaves it as it is. New requests are taken and wait."""
        body = await read(request, PauseGeneration)
        await self._state.hold(body.mode)
        aborted = await self._state.board.abort_everything() if body.mode == "abort" else 0
        return reply({"status": "ok", "message": f"generation is on hold ({body.mode})", "aborted": aborted})

    async def continue_generation(self, request: Request) -> Response:
        """Let generation go on. Idempotent."""
        await request.body()
        await self._state.go_on()
        return reply({"status": "ok", "message": "generation goes on"})

    async def profile(self, request: Request) -> Response:
        """There is no profiler to start or stop; SGLang's helpers want a 200."""
        await request.body()
        return reply({"success": False, "message": "this server has no profiler; see /metrics"})

    async def parse_function_call(self, request: Request) -> Response:
        """The tool calls in a text."""
        body = await read(request, ParseCalls)
        form = self._state.service.tool_format
        if body.tool_call_parser is not None:
            if body.tool_call_parser not in _FORMATS:
                message = f"tool_call_parser may be {', '.join(sorted(_FORMATS))}"
                raise ApiError(400, message, param="tool_call_parser")
            form = _FORMATS[body.tool_call_parser]
        names = [tool.function.name for tool in body.tools]
        text, calls = await self._state.on_text_thread(lambda: parse(body.text, form, names))
        out = [
            {
                "tool_index": names.index(call.name) if call.name in names else -1,
                "name": call.name,
                "parameters": call.arguments,
            }
            for call in calls
        ]
        return reply({"normal_text": text, "calls": out})

    async def separate_reasoning(self, request: Request) -> Response:
        """Thinking and answer of a text."""
        body = await read(request, SplitReasoning)
        if body.reasoning_parser is None:
            marks = detect_marks(self._state.service.template.source)
        elif body.reasoning_parser in MARKS:
            marks = MARKS[body.reasoning_parser]
        else:
            message = f"reasoning_parser may be {', '.join(sorted(MARKS))}"
            raise ApiError(400, message, param="reasoning_parser")
        thinking, text = ("", body.text) if marks is None else split(body.text, marks)
        return reply({"reasoning_text": thinking, "text": text})
