"""Pure ASGI middleware: request ids and errors, Host and Origin, keys, body size.

``BaseHTTPMiddleware`` would hide disconnects from the handlers, so nothing here uses it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from typing import Any

from caesura.runtime.logs import note
from caesura.runtime.server.access import Access, strictest
from caesura.runtime.server.config import is_loopback
from caesura.runtime.server.errors import ApiError, as_api_error
from caesura.runtime.server.keys import KeyRing
from caesura.runtime.server.limits import MAX_BODY_BYTES
from caesura.runtime.server.tally import ServerCounts, tally_of
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("caesura.server")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")
_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::([0-9]{1,5}))?")
PRINCIPAL, REQUEST_ID, REFUSE = "caesura.principal", "caesura.request_id", "caesura.refuse"
SHED_INTERVAL_S = 5.0
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_REFUSALS = {401: "no_key", 403: "forbidden", 408: "too_slow", 413: "too_large", 429: "overload", 503: "unavailable"}


class Outermost:
    """Gives every request an id, logs one line without any of its text, and turns exceptions into error objects."""

    def __init__(self, app: ASGIApp, *, counts: ServerCounts | None = None) -> None:
        self._app = app
        self._counts = counts or ServerCounts()
        self._shed_noted_at = float("-inf")
        self._num_shed = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope[REQUEST_ID] = request_id
        scope[REFUSE] = functools.partial(self._refusal, request_id)
        started, status = time.perf_counter(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception as error:
            refusal = self._refusal(request_id, error)
            if status:  # the answer has begun: all that is left is to cut it off
                raise
            await refusal.response()(scope, receive, sending)
        finally:
            _note_request(scope, request_id, status, time.perf_counter() - started)

    def _refusal(self, request_id: str, error: BaseException) -> ApiError:
        """What the client is told of an error; counted and noted. Requests shed for want of room are told of once in a
        while, with their number."""
        refusal = as_api_error(error)
        if refusal.status >= 500 and refusal.status != 503:
            note(log, logging.ERROR, "request_failed", exc_info=error, request_id=request_id)
        if refusal.status in _REFUSALS:
            self._counts.refused[refusal.code or _REFUSALS[refusal.status]] += 1
        if refusal.status == 429:
            self._num_shed += 1
            now = time.monotonic()
            if now - self._shed_noted_at >= SHED_INTERVAL_S:
                note(log, logging.WARNING, "shed", reason=refusal.code, requests=self._num_shed)
                self._shed_noted_at, self._num_shed = now, 0
        return refusal


class HostGuard:
    """Refuses foreign Origin headers, and on loopback foreign Host headers, for every method."""

    def __init__(self, app: ASGIApp, *, loopback: bool, hosts: Iterable[str], origins: Iterable[str]) -> None:
        self._app = app
        self._loopback = loopback
        self._hosts = frozenset(host.lower() for host in hosts)
        self._origins = frozenset(origin.lower() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._check(scope)
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        hosts = list(_header(scope, b"host"))
        if len(hosts) != 1:
            raise ApiError(400, "the request must have exactly one Host header")
        found = _HOST.fullmatch(hosts[0])
        if found is None:
            raise ApiError(400, "the Host header is malformed")
        host = hosts[0].decode().lower()
        name = found.group(1).decode().lower()
        if self._loopback and not (is_loopback(name) or name in self._hosts or host in self._hosts):
            raise ApiError(403, "the Host header does not name this server; add it to allowed_hosts")
        for raw in _header(scope, b"origin"):
            origin = raw.decode("latin-1").lower()
            if not {origin, "*"} & self._origins and origin not in (f"http://{host}", f"https://{host}"):
                raise ApiError(403, "requests from web pages of another origin are refused; see allowed_origins")


class Auth:
    """Finds the key's owner. What is not public needs a key, as written on the wire and as routes read it."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._check(scope)
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        access = strictest(_raw_path(scope), str(scope["path"]).encode("utf-8", "surrogateescape"))
        if access is Access.PUBLIC:
            return
        principal = self._keys.find(_bearer(scope))
        if principal is None:
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer <key>", code="invalid_api_key")
        if access is Access.ADMIN and not principal.admin:
            raise ApiError(403, "this route needs an admin key")
        scope[PRINCIPAL] = principal


class BodyLimit:
    """Counts body bytes as they arrive, and the time they take."""

    def __init__(self, app: ASGIApp, *, max_bytes: int = MAX_BODY_BYTES, deadline_s: float = 30.0) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._deadline_s = deadline_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        for encoding in _header(scope, b"content-encoding"):
            if encoding.strip().lower() not in (b"", b"identity"):
                raise ApiError(415, "compressed bodies are not accepted")
        for length in _header(scope, b"content-length"):
            if not length.isdigit() or int(length[:20]) > self._max_bytes:
                raise self._refusal()
        deadline_at = asyncio.get_running_loop().time() + self._deadline_s
        num_bytes, complete = 0, False

        async def receiving() -> Message:
            nonlocal num_bytes, complete
            if complete:  # what follows is a disconnect, which may take its time
                return await receive()
            try:
                async with asyncio.timeout_at(deadline_at):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, f"the body did not arrive within {self._deadline_s:g} s") from None
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if num_bytes > self._max_bytes:
                    raise self._refusal()
            return message

        await self._app(scope, receiving, send)

    def _refusal(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._max_bytes} bytes", code="body_too_large")


def refuse(scope: Scope, error: BaseException) -> ApiError:
    """What the client is told of an error after its answer has begun; counted and noted like any other."""
    found: ApiError = scope[REFUSE](error)
    return found


def _header(scope: Scope, name: bytes) -> Iterator[bytes]:
    return (value for key, value in scope["headers"] if key.lower() == name)


def _raw_path(scope: Scope) -> bytes:
    raw = scope.get("raw_path")
    path = raw if isinstance(raw, bytes) else str(scope["path"]).encode("utf-8", "surrogateescape")
    return path.split(b"?", 1)[0]


def _bearer(scope: Scope) -> str | None:
    """The key of an Authorization header; one of two such headers would be ambiguous."""
    values = list(_header(scope, b"authorization"))
    if len(values) != 1:
        return None
    scheme, _, token = values[0].decode("latin-1").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def _request_id(scope: Scope) -> str:
    for value in _header(scope, b"x-request-id"):
        if _REQUEST_ID.fullmatch(value):
            return value.decode()
    return f"req_{secrets.token_hex(12)}"


def _note_request(scope: Scope, request_id: str, status: int, seconds: float) -> None:
    """One line for a request: numbers, ids and the route's template. Paths are the client's text, and stay out."""
    tally, principal = tally_of(scope), scope.get(PRINCIPAL)
    used: dict[str, Any] = {}
    if tally is not None:
        used = {
            "tokens_in": tally.tokens_in,
            "tokens_out": tally.tokens_out,
            "cached_tokens": tally.cached_tokens,
            "pauses": tally.pauses,
            "finish": list(tally.finishes) or None,
        }
    note(
        log,
        logging.INFO,
        "request",
        request_id=request_id,
        method=scope["method"] if scope["method"] in _METHODS else "other",
        route=route_of(scope),
        status=status,
        key=getattr(principal, "key_id", None) or None,
        **used,
        seconds=round(seconds, 6),
    )


def route_of(scope: Scope) -> str:
    """The route's template; "none" for a path that has none."""
    return str(getattr(scope.get("route"), "path", "none"))
