"""Connections that send slowly, or are too many, against the real HTTP server with an engine that is not asked."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
from caesura.runtime.api import Service
from caesura.runtime.server import ServerConfig, connections
from caesura.runtime.server.run import Server, make_server
from starlette.responses import Response

from tests.unit.test_server_guard import BrokenService

HEALTH = b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n"


@contextmanager
def running(**options: Any) -> Iterator[tuple[Server, int]]:
    """A server on a port of its own, on a thread."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = make_server(cast(Service, BrokenService()), ServerConfig(**options))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        for _ in range(500):
            if server.started:
                break
            time.sleep(0.01)
        yield server, listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def connect(port: int) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port))
    client.settimeout(20)
    return client


def rest(client: socket.socket) -> bytes:
    """All that comes until the server closes."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while part := client.recv(4096):
            found += part
    return found


def answer(client: socket.socket) -> bytes:
    """One whole answer on a connection that stays."""
    found = b""
    while b"\r\n\r\n" not in found or not found.endswith(b"}"):
        part = client.recv(4096)
        assert part, found
        found += part
    return found


def test_sec_20_slow_headers_are_cut_off_and_others_are_served() -> None:
    with running(header_deadline_s=0.3) as (server, port):
        silent = [connect(port) for _ in range(100)]
        slow = [connect(port) for _ in range(100)]
        for client in slow:
            client.sendall(HEALTH)
        with connect(port) as good:
            good.sendall(HEALTH + b"\r\n")
            assert answer(good).startswith(b"HTTP/1.1 200")
        for client in [*silent, *slow]:
            with client:
                assert rest(client).startswith(b"HTTP/1.1 408")
        with connect(port) as dripping:
            began = time.monotonic()
            with contextlib.suppress(ConnectionError):
                for number in range(200):
                    dripping.sendall(b"x-%d: y\r\n" % number if number else HEALTH)
                    time.sleep(0.05)
            assert time.monotonic() - began < 9, "every byte must not buy more time"
        counts = cast(Any, server.config.app).state.server.counts
        assert counts.refused["slow_headers"] >= 201
        assert counts.connections == 0


def test_a_connection_may_idle_between_requests_but_not_stop_in_the_next() -> None:
    with running(header_deadline_s=0.3) as (_, port), connect(port) as client:
        client.sendall(HEALTH + b"\r\n")
        assert answer(client).startswith(b"HTTP/1.1 200")
        time.sleep(0.6)
        client.sendall(HEALTH + b"\r\n")
        assert answer(client).startswith(b"HTTP/1.1 200"), "idle connections are kept longer than slow ones"
        client.sendall(HEALTH)
        assert rest(client).startswith(b"HTTP/1.1 408")


def test_a_body_that_nobody_reads_does_not_hold_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "BODY_GRACE_S", 0.1)
    with running(body_deadline_s=0.3) as (_, port), connect(port) as client:
        client.sendall(b"POST /nowhere HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 1000\r\n\r\nx")
        assert answer(client).startswith(b"HTTP/1.1 4")
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                client.sendall(b"x")
                time.sleep(0.05)
        assert rest(client) == b""


def test_sec_20_an_answer_that_nobody_reads_does_not_hold_the_connection_and_a_slow_reader_gets_all() -> None:
    size = 16 << 20  # more than the system holds for both sides
    with running(send_deadline_s=0.4) as (server, port):
        app = cast(Any, server.config.app)
        app.add_api_route("/big", lambda: Response(bytes(size)))
        clients = [connect(port) for _ in range(6)]
        for client in clients:
            client.sendall(b"GET /big HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        slow = clients[-1]  # the others are deaf
        received, began = 0, time.monotonic()
        while received < size:
            received += len(slow.recv(1 << 20))
            time.sleep(0.05)
        assert time.monotonic() - began > 0.8, "twice the deadline, and still served"
        counts = app.state.server.counts
        for _ in range(500):
            if counts.connections == 1:
                break
            time.sleep(0.02)
        assert (counts.connections, counts.refused["slow_reader"]) == (1, 5)
        slow.sendall(HEALTH + b"\r\n")
        assert b"HTTP/1.1 200" in answer(slow)
        for client in clients:
            client.close()


def test_connections_beyond_the_limit_are_refused_until_one_closes() -> None:
    with running(max_connections=3) as (server, port):
        held = [connect(port) for _ in range(3)]
        for client in held:
            client.sendall(HEALTH + b"\r\n")
            assert answer(client).startswith(b"HTTP/1.1 200")
        with connect(port) as fourth:
            found = rest(fourth)
            assert found.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in found
        held.pop().close()
        counts = cast(Any, server.config.app).state.server.counts
        for _ in range(500):
            if counts.connections < 3:
                break
            time.sleep(0.01)
        with connect(port) as again:
            again.sendall(HEALTH + b"\r\n")
            assert json.loads(answer(again).split(b"\r\n\r\n")[1]) == {"status": "ok"}
        for client in held:
            client.close()
        assert counts.refused["too_many_connections"] == 1
