"""HTTP connections that cannot be held open for nothing: bounded in number, in the time a request takes to arrive, and
in the time for which nothing of an answer is taken.

uvicorn bounds idle connections and h11 the size of headers; a client that sends its headers, or a body nobody reads any
more, one byte at a time would still keep its connection for ever, and so would one that never reads its answer.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from typing import Any, cast

import h11
from caesura.runtime.logs import note
from caesura.runtime.server.state import ServerState
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger("caesura.server")
BODY_GRACE_S = 5.0  # the application's own answer to a slow body comes first


class BoundedConnection(H11Protocol):
    """One connection. The application's state has the limits, and counts connections and refusals."""

    _timer: asyncio.TimerHandle | None = None
    _taking: asyncio.TimerHandle | None = None
    _counted = False

    @property
    def _server(self) -> ServerState:
        return cast("ServerState", cast("Any", self.config.app).state.server)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio. A connection too many is told so and closed before anything of it is read."""
        super().connection_made(cast("asyncio.Transport", transport))
        self.transport.set_write_buffer_limits(high=0)  # so that we hear when all of an answer has been taken
        counts, limit = self._server.counts, self._server.config.max_connections
        counts.connections, self._counted = counts.connections + 1, True
        if counts.connections > limit:
            self._refuse(503, "too_many_connections", [(b"retry-after", b"1")])
        else:
            self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._disarm()
        self._stop_watching()
        if self._counted:
            self._server.counts.connections -= 1
            self._counted = False
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        before = self.conn.their_state
        super().data_received(data)
        if self.conn.their_state is not before or self._timer is None:
            self._arm()

    def on_response_complete(self) -> None:
        """See uvicorn. What has arrived of the next request may not take for ever either."""
        super().on_response_complete()
        if not self.transport.is_closing():
            self._arm()

    def pause_writing(self) -> None:
        """See asyncio: something of an answer has to wait until the client takes it."""
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        """See asyncio: all was taken."""
        self._stop_watching()
        super().resume_writing()

    # -- parts ------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        waiting = self.transport.get_write_buffer_size()
        self._taking = self.loop.call_later(self._server.config.send_deadline_s, self._look, waiting)

    def _look(self, before: int) -> None:
        """Cut off a client that has taken nothing since; closing alone would wait for it."""
        if self.transport.get_write_buffer_size() < before:
            self._watch()
            return
        self._taking = None
        self._server.counts.refused["slow_reader"] += 1
        note(log, logging.DEBUG, "connection_closed", reason="slow_reader")
        linger = struct.pack("ii", 1, 0)  # what the system still holds of the answer goes at once as well
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.transport.abort()

    def _stop_watching(self) -> None:
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None

    def _arm(self) -> None:
        """Give what is under way its time: headers that have begun (or a new connection), or a body."""
        self._disarm()
        config, state = self._server.config, self.conn.their_state
        if self.transport.is_closing():
            return
        if state is h11.IDLE and (self.cycle is None or self.conn.trailing_data[0]):
            self._timer = self.loop.call_later(config.header_deadline_s, self._late, "slow_headers")
        elif state is h11.SEND_BODY:
            self._timer = self.loop.call_later(config.body_deadline_s + BODY_GRACE_S, self._late, "slow_body")

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self, reason: str) -> None:
        self._timer = None
        if not self.transport.is_closing():
            note(log, logging.DEBUG, "connection_closed", reason=reason)
            self._refuse(408, reason, [])

    def _refuse(self, status: int, reason: str, headers: list[tuple[bytes, bytes]]) -> None:
        """Answer if no answer has begun, and close."""
        self._server.counts.refused[reason] += 1
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and (self.cycle is None or self._between_requests):
            head = [(b"content-length", b"0"), (b"connection", b"close"), *headers]
            answer = self.conn.send(h11.Response(status_code=status, headers=head, reason=b"")) or b""
            self.transport.write(answer + (self.conn.send(h11.EndOfMessage()) or b""))
        self.transport.close()

    @property
    def _between_requests(self) -> bool:
        return bool(self.cycle.response_complete) and self.conn.their_state is h11.IDLE
