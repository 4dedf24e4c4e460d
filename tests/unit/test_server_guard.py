"""Who gets in: hostile Host headers and paths, origins, keys, bodies; errors that tell nothing about the inside."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from caesura.runtime.api import Service
from caesura.runtime.errors import InvalidRequest
from caesura.runtime.server import ServerConfig, create_app
from caesura.runtime.server.access import Access, access_of
from caesura.runtime.server.keys import KeyRing
from caesura.runtime.server.limits import MAX_BODY_BYTES
from fastapi import FastAPI
from fastapi.routing import APIRoute

KEY, ADMIN_KEY = "sk-test-0123456789", "sk-admin-0123456789"
PUBLIC = {"/health", "/ready", "/version", "/dashboard"}
ADMIN = {"/pause_generation", "/continue_generation", "/flush_cache", "/metrics", "/v1/dashboard/state"}
KEYED = {
    "/v1/models", "/v1/models/{model:path}", "/v1/chat/completions", "/v1/completions", "/generate",
    "/v1/template/turn", "/v1/template/tool_results",
    "/open_session", "/close_session", "/start_profile", "/stop_profile", "/parse_function_call", "/separate_reasoning",
    "/v1/responses", "/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel",
    "/v1/responses/{response_id}/input_items",
    "/get_model_info", "/model_info", "/get_server_info", "/server_info", "/health_generate",
    "/concate_and_append_request", "/abort_request", "/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize",
    "/v1/contexts", "/v1/contexts/{context_id}", "/openapi.json",
    *(f"/v1/contexts/{{context_id}}/{verb}" for verb in (
        "append", "generate", "prefill", "score", "fork", "pause", "progress", "resume", "truncate", "snapshot",
        "rollback", "tokens", "decisions",
    )),
}  # fmt: skip


class BrokenService:
    """An engine of which every part fails, with a message that nobody outside may see."""

    model_name = "broken"
    ready = True
    lost = None
    tool_format = "hermes"
    tokenizer = SimpleNamespace(bos_id=None, eos_ids=frozenset({2}), vocab_size=10, special_ids={})
    template = SimpleNamespace(pieces=lambda *_, **__: [])

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("secret: /var/lib/weights pid 4242 ipc:///run/socket")


def app_with(**options: Any) -> FastAPI:
    return create_app(cast(Service, BrokenService()), ServerConfig(**options))


async def exchange(
    app: FastAPI,
    method: str,
    path: bytes,
    headers: Iterable[tuple[bytes, bytes]],
    parts: Iterable[bytes] = (b"",),
    pause_s: float = 0.0,
) -> tuple[int, bytes]:
    """One request as raw as the wire has it, so that no client library tidies it up."""
    left = list(parts)
    status, answer = 0, b""

    async def receive() -> dict[str, Any]:
        if not left:
            await asyncio.sleep(3600)
        await asyncio.sleep(pause_s)
        body = left.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(left)}

    async def send(message: Any) -> None:
        nonlocal status, answer
        status = message.get("status", status)
        answer += message.get("body", b"")

    from urllib.parse import unquote

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method,
        "scheme": "http", "path": unquote(path.decode("latin-1")), "raw_path": path, "query_string": b"",
        "root_path": "", "headers": list(headers), "client": ("127.0.0.1", 5), "server": ("127.0.0.1", 30000),
        "state": {}, "extensions": {},
    }  # fmt: skip
    await asyncio.wait_for(app(scope, receive, send), 20)
    return status, answer


def ask(app: FastAPI, method: str, path: str | bytes, headers: dict[str, str] | None = None, **more: Any) -> int:
    raw = path if isinstance(path, bytes) else path.encode()
    pairs = [(b"host", b"127.0.0.1:30000")] if not any(k == "host" for k in headers or {}) else []
    pairs += [(key.encode(), value.encode("latin-1")) for key, value in (headers or {}).items()]
    return asyncio.run(exchange(app, method, raw, pairs, **more))[0]


def routes(app: FastAPI) -> list[APIRoute | Any]:
    return [route for route in app.routes if hasattr(route, "methods")]


HOSTILE_HOSTS = [
    "", " ", "evil.example", "evil.example/health", "127.0.0.1/health", "127.0.0.1?x", "127.0.0.1#x", "a@127.0.0.1",
    "127.0.0.1\t", "127.0.0.1:30000:1", "127.0.0.1:999999", "[::1", "[::1]x", "localhost.evil.example", "0.0.0.0",
    "127.0.0.1.evil.example", "\u00e9", "127.0.0.1,evil.example", "http://127.0.0.1", "..",
]  # fmt: skip


def test_sec_11_no_host_header_opens_a_route() -> None:
    app = app_with(api_keys=(KEY,))
    for route in routes(app):
        path = route.path.replace("{model:path}", "m").replace("{context_id}", "c")
        for host in HOSTILE_HOSTS:
            for method in route.methods:
                assert ask(app, method, path, {"host": host}) in (400, 401, 403), (method, path, host)
    two = [(b"host", b"127.0.0.1"), (b"host", b"evil.example")]
    assert asyncio.run(exchange(app, "GET", b"/health", two))[0] == 400
    assert asyncio.run(exchange(app, "GET", b"/health", []))[0] == 400


@pytest.mark.parametrize(
    "path",
    [b"//v1/models", b"/health/../v1/models", b"/v1%2fmodels", b"/health/..;/v1/models", b"/v1/models.", b"/V1/models",
     b"/health%00/v1/models", b"/%76%31/models", b"/health?/../v1/models"[:7] + b"/v1/models", b"/v1/models/"],
)  # fmt: skip
def test_sec_11_no_spelling_of_a_path_opens_a_route(path: bytes) -> None:
    assert ask(app_with(api_keys=(KEY,)), "GET", path) == 401


def test_sec_11_public_is_an_exact_spelling() -> None:
    app = app_with(api_keys=(KEY,))
    assert ask(app, "GET", "/health") == 200
    assert ask(app, "GET", b"/%68ealth") == 401
    assert ask(app, "GET", "/v1/models", {"x-http-method-override": "GET", "x-original-url": "/health"}) == 401


def test_sec_12_every_route_is_in_one_of_three_sets() -> None:
    found = {route.path for route in routes(app_with())}
    assert found == PUBLIC | ADMIN | KEYED, "a new route must be put into one of the sets, on purpose"
    for path in found:
        wanted = Access.PUBLIC if path in PUBLIC else Access.ADMIN if path in ADMIN else Access.KEY
        assert access_of(path.encode()) is wanted


def test_every_keyed_route_refuses_a_caller_without_a_key() -> None:
    app = app_with(api_keys=(KEY,), admin_keys=(ADMIN_KEY,))
    for path in KEYED | ADMIN:
        concrete = path.replace("{model:path}", "m").replace("{context_id}", "c")
        for headers in ({}, {"authorization": f"Bearer {KEY}x"}, {"authorization": KEY}, {"authorization": "Bearer "}):
            assert ask(app, "POST", concrete, dict(headers)) == 401
    assert ask(app, "GET", "/v1/models", {"authorization": f"Bearer {KEY}"}) == 200
    assert ask(app, "GET", "/v1/models", {"authorization": f"bearer {ADMIN_KEY}"}) == 200
    for spelled in (b"/flush_cache", b"/flush%5fcache", b"/flush%5Fcache", b"/%66%6c%75%73%68_cache"):
        assert ask(app, "POST", spelled, {"authorization": f"Bearer {KEY}"}) == 403
    assert ask(app, "GET", b"/%6detrics", {"authorization": f"Bearer {KEY}"}) == 403


def test_sec_13_keys_are_kept_as_hashes() -> None:
    ring = KeyRing([KEY], [ADMIN_KEY])
    assert KEY not in repr(vars(ring)["_entries"])
    mine, admin = ring.find(KEY), ring.find(ADMIN_KEY)
    assert mine is not None and admin is not None
    assert (mine.admin, admin.admin) == (False, True)
    assert mine.key_id != admin.key_id and KEY not in mine.key_id
    assert ring.find(KEY[:-1]) is ring.find("") is ring.find(None) is None
    assert KeyRing([KEY]).find(KEY).admin, "without admin keys every key may do everything"  # type: ignore[union-attr]


def test_keys_rotate_without_a_restart(tmp_path: Path) -> None:
    now = 0.0
    file = tmp_path / "keys"
    file.write_text(f"# mine\nann:{KEY}\n")
    ring = KeyRing(file=file, monotonic=lambda: now)
    assert not ring.is_open
    ann = ring.find(KEY)
    assert ann is not None and ann.name == "ann"
    file.write_text(f"bob:{ADMIN_KEY}:admin\n")
    os.utime(file, ns=(1, 1))
    now = 2.0
    assert ring.find(KEY) is None
    bob = ring.find(ADMIN_KEY)
    assert bob is not None and bob.admin
    file.write_text("nonsense")
    os.utime(file, ns=(2, 2))
    now = 4.0
    assert ring.find(ADMIN_KEY) is not None, "a slip in the file must not lock everyone out, nor let everyone in"
    file.unlink()
    now = 6.0
    assert ring.find(ADMIN_KEY) is not None and ring.find("other-key-000") is None
    with pytest.raises(InvalidRequest, match="key file"):
        KeyRing(file=file)
    for unusable in (f"ann: {KEY}\n", f"ann:{KEY}\u00e9\n"):  # neither is what arrives in a header
        file.write_text(unusable)
        with pytest.raises(InvalidRequest, match="line 1 has a key that is not ASCII or has blanks"):
            KeyRing(file=file)


ORIGINS = {
    None: True,
    "http://127.0.0.1:30000": True,
    "http://localhost:3000": False,
    "https://evil.example": False,
    "null": False,
    "": False,
    "http://127.0.0.1:30000.evil.example": False,
    "https://good.example": True,
}


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
@pytest.mark.parametrize("origin", ORIGINS)
def test_sec_14_foreign_origins_are_refused_for_every_method(method: str, origin: str | None) -> None:
    app = app_with(allowed_hosts=("box.lan",), allowed_origins=("https://good.example",))
    headers = {} if origin is None else {"origin": origin}
    assert (ask(app, method, "/health", headers) != 403) == ORIGINS[origin]
    assert ask(app, method, "/health", {**headers, "host": "rebound.example"}) == 403


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:30000", "localhost:1", "[::1]:30000", "BOX.lan", "box.lan:80"]
)
def test_hosts_of_this_machine_are_served(host: str) -> None:
    assert ask(app_with(allowed_hosts=("box.lan",)), "GET", "/health", {"host": host}) == 200


def test_sec_15_no_open_server_without_a_key() -> None:
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.com"):
        with pytest.raises(InvalidRequest, match="no API key"):
            ServerConfig(host=host).check_exposure()
        ServerConfig(host=host, api_keys=(KEY,)).check_exposure()
        ServerConfig(host=host, insecure=True).check_exposure()
    for host in ("127.0.0.1", "::1", "localhost"):
        ServerConfig(host=host).check_exposure()


def test_sec_18_errors_tell_nothing_about_the_inside(caplog: pytest.LogCaptureFixture) -> None:
    app = app_with()
    host = [(b"host", b"127.0.0.1")]
    hidden = ("secret", "/var/lib", "4242", "ipc:", "Traceback", "RuntimeError")
    with caplog.at_level(logging.INFO, "caesura.server"):
        for path, body in [
            (b"/v1/chat/completions", b'{"messages":[{"role":"user","content":"private words"}]}'),
            (b"/generate", b'{"input_ids":[1]}'),
            (b"/v1/contexts", b"{}"),
            (b"/flush_cache", b""),
        ]:
            status, answer = asyncio.run(exchange(app, "POST", path, host, [body]))
            assert status == 500
            assert not any(word in answer.decode() for word in hidden)
            assert set(json.loads(answer)["error"]) >= {"message", "type", "param", "code"}
        forged = b"/x\r\nINFO forged \xff"
        asyncio.run(exchange(app, "GET", forged, host))
    lines = [record.getMessage() for record in caplog.records]
    assert not any("private words" in line for line in lines)
    assert not any("\r" in line or "\n" in line for line in lines)


def test_errors_have_openai_shape_and_requests_an_id() -> None:
    async def run() -> None:
        import httpx

        transport = httpx.ASGITransport(app=app_with())
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for method, path, status in [("GET", "/nope", 404), ("PUT", "/generate", 405), ("POST", "/generate", 400)]:
                answer = await client.request(method, path)
                assert answer.status_code == status
                assert set(answer.json()["error"]) >= {"message", "type", "param", "code"}
                assert answer.headers["x-request-id"].startswith("req_")
            echoed = await client.get("/health", headers={"x-request-id": "mine-1"})
            assert echoed.headers["x-request-id"] == "mine-1"
            other = await client.get("/health", headers={"x-request-id": "bad id"})
            assert other.headers["x-request-id"].startswith("req_")

    asyncio.run(run())


def test_sec_20_bodies_are_bounded_in_size_and_time() -> None:
    app = app_with(body_deadline_s=0.2)
    for length in (str(MAX_BODY_BYTES + 1), "9" * 400, "-1", "x"):
        assert ask(app, "POST", "/generate", {"content-length": length}) == 413
    endless = [b"[" * 65536] * (MAX_BODY_BYTES // 65536 + 2)
    assert ask(app, "POST", "/generate", parts=endless) == 413
    assert ask(app, "POST", "/generate", {"content-encoding": "gzip"}, parts=[b"\x1f\x8b"]) == 415
    assert ask(app, "POST", "/generate", parts=[b"{"] * 50, pause_s=0.05) == 408


def test_ready_is_false_while_draining() -> None:
    app = app_with()
    app.state.server.draining = True
    assert ask(app, "GET", "/ready") == 503
    assert ask(app, "GET", "/health") == 200
