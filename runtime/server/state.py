"""What the routes share: the service, the configuration, and the registries of this server."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from caesura.runtime.api import Service
from caesura.runtime.errors import DeadlineExceeded, EngineStopped
from caesura.runtime.server.config import ServerConfig
from caesura.runtime.server.http import principal_of
from caesura.runtime.server.kept import KeptContexts, namespace_of
from caesura.runtime.server.keys import KeyRing
from caesura.runtime.server.registry import ContextRegistry
from caesura.runtime.server.responses_store import ResponseStore
from caesura.runtime.server.sessions import SessionStore
from caesura.runtime.server.tally import TALLY, RequestTally, ServerCounts
from caesura.runtime.server.work import Work, WorkBoard
from starlette.requests import Request

T = TypeVar("T")
TEXT_DEADLINE_S = 20.0
TEXT_THREADS = 2
SWEEP_S = 15.0


@contextlib.asynccontextmanager
async def engine_answers(deadline_s: float) -> AsyncGenerator[None, None]:
    """What is asked of the engine here is answered in time. Raises EngineStopped when it is not: one that takes so long
    between two steps is as good as none."""
    try:
        async with asyncio.timeout(deadline_s):
            yield
    except (TimeoutError, DeadlineExceeded):
        raise EngineStopped(f"the engine does not answer within {deadline_s:g} s") from None


class ServerState:
    """One server's state. Lives on one event loop."""

    def __init__(self, service: Service, config: ServerConfig) -> None:
        self.service = service
        self.config = config
        self.keys = KeyRing(config.api_keys, config.admin_keys, config.key_file)
        self.board = WorkBoard(config.max_requests)
        self.kept = KeptContexts(config.max_kept_contexts, config.max_contexts_per_key, config.tool_wait_s)
        self.contexts = ContextRegistry(config.max_kept_contexts, config.max_contexts_per_key)
        self.responses = ResponseStore(config.max_kept_contexts, config.max_contexts_per_key, config.context_ttl_s)
        self.sessions = SessionStore(config.max_kept_contexts, config.max_contexts_per_key, config.context_ttl_s)
        self._held: tuple[str, int] | None = None  # how generation was put on hold, and in which life of the engine
        self.model_name = config.model_name or service.model_name
        self.counts = ServerCounts()
        self.started_at = time.time()
        self.draining = False
        self._text = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="caesura-text")
        self._max_context_tokens: tuple[int, int] | None = None  # and in which life of the engine

    async def on_text_thread(self, work: Callable[[], T]) -> T:
        """Rendering and tokenizing, away from the event loop, with a deadline."""
        async with asyncio.timeout(TEXT_DEADLINE_S):
            return await asyncio.get_running_loop().run_in_executor(self._text, work)

    @property
    def paused(self) -> str | None:
        """How generation was put on hold; an engine that was started since is not."""
        return self._held[0] if self._held is not None and self._held[1] == self.service.life else None

    async def hold(self, mode: str) -> None:
        """Put generation on hold, for every key."""
        life = self.service.life
        await self.service.hold(retract=mode == "retract")
        self._held = mode, life

    async def go_on(self) -> None:
        """Let generation go on. Idempotent."""
        await self.service.go_on()
        self._held = None

    async def max_context_tokens(self) -> int:
        """The longest context the engine takes; each engine is asked once. Raises EngineStopped."""
        life = self.service.life
        if self._max_context_tokens is None or self._max_context_tokens[1] != life:
            self._max_context_tokens = int((await self.service.read_stats())["max_context_tokens"]), life
        return self._max_context_tokens[0]

    def work(self, request: Request, *, rid: str | None, cache_salt: str | None) -> Work:
        """A request at work; to be entered."""
        key_id = principal_of(request).key_id
        tally = request.scope[TALLY] = RequestTally(self.counts)
        name = rid or secrets.token_hex(16)
        return Work(self.service, self.board, key_id, name, namespace_of(key_id, cache_salt), tally)

    async def sweep(self) -> None:
        """Let go of what has expired, though no request comes. Runs until it is cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            await self.expire()

    async def expire(self) -> None:
        """Drop contexts, responses and sessions that nobody came back for."""
        await self.kept.expire()
        await self.contexts.expire()
        self.responses.expire()
        self.sessions.expire()

    async def close(self) -> None:
        """Give up every context this server kept. The service is its owner's."""
        await self.kept.clear()
        await self.contexts.clear()
        self._text.shutdown(wait=False, cancel_futures=True)
