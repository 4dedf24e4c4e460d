"""Running the server: uvicorn here, the engine in a process of its own, a graceful end."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from caesura.runtime.api import Service
from caesura.runtime.errors import EngineStopped
from caesura.runtime.logs import LogStyle, configure, note
from caesura.runtime.server.app import create_app
from caesura.runtime.server.config import ServerConfig
from caesura.runtime.server.connections import BoundedConnection
from caesura.runtime.server.errors import ApiError

if TYPE_CHECKING:
    from caesura.runtime.server.state import ServerState

log = logging.getLogger("caesura.server")
MAX_HEADER_BYTES = 64 << 10
KEEP_ALIVE_S = 75
LAST_WORDS_S = 2.0  # for what is told at the end of the drain


class Server(uvicorn.Server):
    """The first SIGTERM or SIGINT drains, the second stops at once. An engine that is lost for good ends it, too."""

    def __init__(self, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config)
        self._state = state
        self._loop: asyncio.AbstractEventLoop | None = None
        self.lost: EngineStopped | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See uvicorn. Called in the main thread, by a signal."""
        self._state.draining = True
        if self.should_exit:
            self.force_exit = True
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._cut_off)
        self.should_exit = True
        event, at_work = "stopping_now" if self.force_exit else "draining", len(self._state.board)
        note(log, logging.WARNING, event, signal=signal.Signals(sig).name, requests=at_work)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)
        if self.started:
            places = [server.sockets for server in self.servers]
            ports = sorted({one.getsockname()[1] for group in places for one in group})
            note(log, logging.INFO, "listening", host=self.config.host, ports=ports, model=self._state.model_name)

    async def on_tick(self, counter: int) -> bool:
        """See uvicorn. Called ten times a second."""
        self.lost = self._state.service.lost
        if self.lost is not None:
            self._state.draining = self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn. Who still waits at the end of the drain is told so, before connections are cut off."""
        ending = asyncio.ensure_future(self._end_requests())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_requests(self) -> None:
        await asyncio.sleep(self._state.config.drain_s)
        await self._state.board.abort_everything(ApiError(503, "the server is shutting down", code="draining"))

    def _cut_off(self) -> None:
        """From Python 3.12 on a listener is closed once its connections are."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def make_server(service: Service, config: ServerConfig) -> Server:
    """A server that has not started yet. Raises InvalidRequest when it would be open to other machines."""
    config.check_exposure()
    app = create_app(service, config)
    settings = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        http=BoundedConnection,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(config.drain_s + LAST_WORDS_S),
        access_log=False,
        server_header=False,
        date_header=True,
        log_config=None,
        proxy_headers=False,
    )
    return Server(settings, app.state.server)


def serve(
    config: ServerConfig | None = None,
    *,
    start_service: Callable[[ServerConfig], Service] | None = None,
    sockets: list[socket.socket] | None = None,
) -> None:
    """Run a server until it is told to stop. The engine runs in a process of its own, unless ``config.in_process`` or
    ``start_service`` says otherwise. Raises EngineStopped when the engine is lost for good."""
    config = config or ServerConfig()
    config.check_exposure()
    configure(LogStyle(config.log_format, config.log_level))
    service = (start_service or _start)(config)
    try:
        server = make_server(service, config)
        server.run(sockets)
    finally:
        service.close()
        note(log, logging.INFO, "stopped")
    if server.lost is not None:
        raise server.lost


def _start(config: ServerConfig) -> Service:
    if not config.in_process:
        from caesura.runtime.ipc.client import EngineClient

        return EngineClient.start(config.engine)
    from caesura.runtime.service import EngineService

    return EngineService.start(config.engine)
