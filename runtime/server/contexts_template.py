"""``/v1/template``: how the chat template of the served model writes turns, for clients that build contexts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from caesura.runtime.api import Service
from caesura.runtime.server.chat_protocol import Tool
from caesura.runtime.server.contexts_protocol import NamedResult, ResultsRequest, TurnRequest
from caesura.runtime.server.http import read, reply
from caesura.runtime.server.state import ServerState
from caesura.runtime.text.template import Piece
from starlette.requests import Request
from starlette.responses import Response


class Template:
    """The routes. Pieces that are not ``special`` are content: control tokens in them are plain text."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._service = state.service

    async def turn(self, request: Request) -> Response:
        """What opens and closes a turn of one role."""
        body = await read(request, TurnRequest)
        tools = tool_specs(body.tools)
        opening, closing = await self._state.on_text_thread(
            lambda: self._service.template.turn_pieces(body.role, first=body.first, tools=tools)
        )
        return reply({"opening": _shown(opening), "closing": _shown(closing)})

    async def tool_results(self, request: Request) -> Response:
        """What follows an assistant turn that called tools: its end, the results, the opening of the next turn."""
        body = await read(request, ResultsRequest)
        pieces = await self._state.on_text_thread(lambda: result_pieces(self._service, body.results, body.tools))
        return reply({"pieces": _shown(pieces)})


def result_pieces(service: Service, results: Sequence[NamedResult], tools: Sequence[Tool]) -> list[Piece]:
    """Tool results as the chat template writes them. May take a while: call it on a thread."""
    pairs = [(result.name, result.content) for result in results]
    return service.template.tool_results(pairs, tools=tool_specs(tools))


def tool_specs(tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
    """Tool declarations as templates want them, None without any."""
    return [{"type": "function", "function": tool.spec()} for tool in tools] or None


def _shown(pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    return [{"text": piece.text, "special": piece.special} for piece in pieces]
