"""A listening server in this process, on a running engine or any ASGI application: for clients that need a socket."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from caesura.runtime.api import Service
from caesura.runtime.server import ServerConfig, create_app

START_S = 20.0


class Live:
    """A server on a thread. ``stop`` and ``start`` again on the same port, as a restart would."""

    def __init__(self, app: Any, port: int = 0) -> None:
        self.app = app
        self.port = port
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        settings = uvicorn.Config(
            self.app, http="h11", ws="none", log_config=None, access_log=False, timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        until = time.monotonic() + START_S
        while not self._server.started:
            assert time.monotonic() < until and self._thread.is_alive(), "the server does not start"
            time.sleep(0.005)

    def stop(self) -> None:
        """End; connections that still work after a second are cut."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(START_S)
            assert not self._thread.is_alive(), "the server does not stop"
            self._server = self._thread = None


@contextlib.contextmanager
def live(app: Any) -> Iterator[Live]:
    """Run an application until the block ends."""
    server = Live(app)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def live_server(service: Service, **options: Any) -> Iterator[Live]:
    """Caesura's server on a running engine, which stays its owner's."""
    with live(create_app(service, ServerConfig(**options))) as server:
        yield server
