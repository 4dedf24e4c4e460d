"""Routes that say what this server is and how it does."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from caesura.runtime.errors import EngineStopped
from caesura.runtime.server.errors import ApiError
from caesura.runtime.server.http import reply
from caesura.runtime.server.state import ServerState, engine_answers
from starlette.requests import Request
from starlette.responses import Response

STATS_DEADLINE_S = 5.0


def package_version() -> str:
    """The installed package's version."""
    try:
        return version("caesura")
    except PackageNotFoundError:
        return "unknown"


class Info:
    """``/health``, ``/ready``, ``/version``, ``/v1/models``."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def health(self, _: Request) -> Response:
        """The process is alive."""
        return reply({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """The engine answers and requests are taken."""
        if self._state.draining:
            raise ApiError(503, "the server is shutting down", code="draining")
        if not self._state.service.ready:
            raise EngineStopped("not ready")
        await self.stats()
        return reply({"status": "ready"})

    async def stats(self) -> dict[str, Any]:
        """The engine's account. Raises EngineStopped when it does not answer."""
        async with engine_answers(STATS_DEADLINE_S):
            return await self._state.service.read_stats()

    async def version(self, _: Request) -> Response:
        """The package's version."""
        return reply({"version": package_version()})

    async def models(self, _: Request) -> Response:
        """OpenAI's model list: the one model there is."""
        return reply({"object": "list", "data": [await self._card()]})

    async def model(self, request: Request) -> Response:
        """One model of the list."""
        if request.path_params["model"] not in (self._state.model_name, self._state.service.model_name):
            raise ApiError(404, "there is no model of this name", param="model", code="model_not_found")
        return reply(await self._card())

    async def _card(self) -> dict[str, Any]:
        try:
            async with engine_answers(STATS_DEADLINE_S):
                limit: int | None = await self._state.max_context_tokens()
        except Exception:  # whatever ails the engine: what is served is told without it
            limit = None
        return {
            "id": self._state.model_name,
            "object": "model",
            "created": int(self._state.started_at),
            "owned_by": "caesura",
            "root": self._state.model_name,
            "parent": None,
            "max_model_len": limit,
        }
