"""The log: events with fields, as JSON or text, and nothing that users wrote."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
from caesura.runtime.api import Service
from caesura.runtime.errors import EngineStopped
from caesura.runtime.logs import JsonLines, LogStyle, TextLines, configure, note, style
from caesura.runtime.server import ServerConfig, create_app
from caesura.runtime.server.guard import Outermost
from caesura.runtime.server.http import stream as sse
from caesura.runtime.server.tally import ServerCounts
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from tests.unit.test_server_guard import ADMIN_KEY, KEY, BrokenService, exchange

CANARY = "canary-7f3a"


@contextmanager
def captured(formatter: logging.Formatter) -> Iterator[io.StringIO]:
    """All that is logged anywhere, formatted."""
    stream, root = io.StringIO(), logging.getLogger()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield stream
    finally:
        root.removeHandler(handler)
        root.setLevel(before)


class TalkativeService(BrokenService):
    """An engine whose errors quote what they were given."""

    def __getattr__(self, name: str) -> Any:
        raise ValueError(f"cannot take {CANARY}") from KeyError(CANARY)


REQUESTS = [
    (b"POST", b"/v1/chat/completions", {"messages": [{"role": "user", "content": CANARY}], "user": CANARY}),
    (b"POST", b"/generate", {"text": CANARY, "rid": CANARY, "sampling_params": {"stop": CANARY}}),
    (b"POST", b"/v1/completions", {"prompt": CANARY, "suffix": CANARY, "cache_salt": CANARY}),
    (b"POST", b"/v1/contexts", {"pieces": [{"text": CANARY}], CANARY: 1}),
    (b"POST", b"/v1/chat/completions", {"messages": CANARY}),
    (b"POST", f"/v1/contexts/{CANARY}/pause".encode(), {"calls": [{"tool": CANARY}]}),
    (b"GET", f"/files/{CANARY}.txt".encode(), None),
    (b"GET", f"/v1/models/{CANARY}".encode(), None),
    (CANARY.encode().upper(), b"/health", None),
]


@pytest.mark.parametrize("formatter", [JsonLines(), TextLines()], ids=["json", "text"])
def test_nothing_that_a_client_wrote_is_logged_even_when_the_engine_quotes_it(formatter: logging.Formatter) -> None:
    app = create_app(cast(Service, TalkativeService()), ServerConfig(api_keys=(KEY,), admin_keys=(ADMIN_KEY,)))
    headers = [(b"host", b"127.0.0.1"), (b"authorization", f"Bearer {KEY}".encode()), (b"referer", CANARY.encode())]
    with captured(formatter) as stream:
        for method, path, body in REQUESTS:
            raw = b"" if body is None else json.dumps(body).encode()
            status, _ = asyncio.run(exchange(app, method.decode(), path, headers, [raw]))
            assert status >= 400
        asyncio.run(exchange(app, "GET", b"/v1/models", [(b"host", b"127.0.0.1"), (b"x-key", CANARY.encode())]))
        logging.getLogger("somebody.else").error("cannot parse %s", CANARY)
        logging.getLogger("somebody.else").error(f"cannot parse {CANARY}")
        logging.getLogger("uvicorn.error").warning("cannot parse %s", CANARY)
    text = stream.getvalue()
    assert CANARY not in text.lower() and KEY not in text
    assert text.count("request_failed") >= 3 and "ValueError" in text, "it is still told what went wrong, and where"
    assert len([line for line in text.splitlines() if " request " in f" {line} " or '"event": "request"' in line]) == 10


def test_a_request_is_one_json_line_with_id_route_status_key_and_time() -> None:
    app = create_app(cast(Service, BrokenService()), ServerConfig(api_keys=(KEY,)))
    headers = [(b"host", b"127.0.0.1"), (b"authorization", f"Bearer {KEY}".encode()), (b"x-request-id", b"mine-1")]
    with captured(JsonLines()) as stream:
        asyncio.run(exchange(app, "GET", b"/v1/models", headers))
        asyncio.run(exchange(app, "GET", b"/v1/models", headers[:1]))
    served, refused = [json.loads(line) for line in stream.getvalue().splitlines() if '"request"' in line]
    assert set(served) == {
        "time", "level", "logger", "event", "request_id", "method", "route", "status", "key", "seconds",
    }  # fmt: skip
    assert (served["request_id"], served["method"], served["status"]) == ("mine-1", "GET", 200)
    assert served["route"] == "/v1/models" and len(served["key"]) == 16 and served["seconds"] > 0
    assert (refused["status"], refused["route"]) == (401, "none") and "key" not in refused


def test_shed_requests_are_told_of_once_with_their_number() -> None:
    app = create_app(cast(Service, BrokenService()), ServerConfig(max_requests=1))
    state = app.state.server
    state.board.enter({("", "held"): cast(Any, object())})
    body = json.dumps({"input_ids": [1]}).encode()
    with captured(JsonLines()) as stream:
        for _ in range(5):
            assert asyncio.run(exchange(app, "POST", b"/generate", [(b"host", b"127.0.0.1")], [body]))[0] == 429
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["reason"] for event in events if event["event"] == "shed"] == ["queue_full"]
    assert state.counts.refused["queue_full"] == 5


def test_what_fails_after_an_answer_has_begun_is_told_of_as_well() -> None:
    counts = ServerCounts()

    async def events(error: Exception) -> AsyncGenerator[bytes, None]:
        yield b"data: 1\n\n"
        raise error

    def app(error: Exception) -> Outermost:
        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            request = Request(scope, receive)
            await (await sse(request, events(error), send_deadline_s=5))(scope, receive, send)

        return Outermost(answer, counts=counts)

    with captured(JsonLines()) as stream:
        for error in (ValueError(CANARY), EngineStopped(CANARY)):
            status, told = asyncio.run(exchange(cast(Any, app(error)), "POST", b"/", [(b"host", b"127.0.0.1")]))
            assert status == 200 and told.startswith(b"data: 1\n\ndata: {") and CANARY not in told.decode()
    (failed,) = [json.loads(line) for line in stream.getvalue().splitlines() if '"request_failed"' in line]
    assert "ValueError" in str(failed) and CANARY not in str(failed)
    assert counts.refused == {"engine_unavailable": 1}


def test_a_client_that_leaves_before_its_request_is_whole_is_no_failure() -> None:
    app = create_app(cast(Service, BrokenService()), ServerConfig())
    parts = [{"type": "http.disconnect"}, {"type": "http.request", "body": b"{", "more_body": True}]

    async def receive() -> dict[str, Any]:
        return parts.pop() if len(parts) > 1 else parts[0]

    async def send(message: Any) -> None:
        pass

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/generate", "raw_path": b"/generate", "query_string": b"", "root_path": "", "state": {},
        "headers": [(b"host", b"127.0.0.1"), (b"content-length", b"1000")], "client": ("127.0.0.1", 5),
        "server": ("127.0.0.1", 30000), "extensions": {},
    }  # fmt: skip
    with captured(JsonLines()) as stream:
        asyncio.run(asyncio.wait_for(app(scope, receive, send), 20))
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    ours = [(line["event"], line["status"]) for line in lines if line["logger"] == "caesura.server"]
    assert ours == [("request", 499)]


def test_lines_stay_lines_whatever_is_in_a_field() -> None:
    log = logging.getLogger("caesura.test")
    for formatter in (JsonLines(), TextLines()):
        with captured(formatter) as stream:
            note(log, logging.INFO, "odd", words='two words\r\n"x"', names=["a", "b"], nothing=None, long="y" * 5000)
        assert len(stream.getvalue().splitlines()) == 1 and len(stream.getvalue()) < 1000
    with captured(JsonLines()) as stream:
        note(log, logging.INFO, "odd", words='two words\r\n"x"', seconds=0.25)
    found = json.loads(stream.getvalue())
    assert (found["words"], found["seconds"], found["event"]) == ('two words\r\n"x"', 0.25, "odd")
    assert found["time"].endswith("Z")


def test_logging_that_an_application_has_set_up_stays_as_it_is() -> None:
    before = style()
    with captured(TextLines()) as stream:
        handlers = list(logging.getLogger().handlers)
        configure(LogStyle("json", "debug"), io.StringIO())
        assert logging.getLogger().handlers == handlers and style() == before
        note(logging.getLogger("caesura.test"), logging.INFO, "seen")
    assert "seen" in stream.getvalue()
