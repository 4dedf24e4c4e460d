"""What every backend behind HTTP shares: one connection pool, retries, server-sent events, and errors by their kind.

Retried is only what has certainly not been carried out: refusals with 429 or 503, a context that is busy, and
connections that could not be made. The program's own deadline ends any wait by cancelling it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import random
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from caesura.lang.errors import DefinitionError, RemoteError, ServerUnavailable
from caesura.lang.runner import runner

if TYPE_CHECKING:
    import httpx

log = logging.getLogger("caesura.lang")

MAX_EVENT_BYTES = 64 << 20
MAX_SHOWN_CHARS = 500
KEEP_ALIVE_S = 20.0  # shorter than servers keep idle connections, so that none is used as it is being closed
CONNECT_S = 10.0
SHORT_S = 60.0  # for requests that compute nothing
FIRST_DELAY_S, MAX_DELAY_S = 0.1, 5.0
BUSY_S = 10.0  # how long a server may take to notice that a request was abandoned

Failure = Callable[["Refusal"], Exception]


class NotServed(RemoteError):
    """The server has no such path, or not for this model."""


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """How a backend talks to its server. ``timeout_s`` bounds one computing request, ``retry_s`` the time spent on
    retries; a program's ``deadline_s`` ends both earlier."""

    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 3600.0
    retry_s: float = 60.0
    max_connections: int = 512
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that is no success: OpenAI's error object, SGLang's, or whatever text came."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after_s: float | None = None

    @property
    def is_busy(self) -> bool:
        return self.status == 409 and self.code == "context_busy"

    @property
    def retryable(self) -> bool:
        return self.status in (429, 503) and self.code != "insufficient_quota"


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event. ``name`` is empty unless the server gave one."""

    name: str
    data: str


class EventParser:
    """Splits a byte stream into server-sent events. Lines end with LF, CRLF or CR and nothing else."""

    def __init__(self) -> None:
        self._rest = b""
        self._name = ""
        self._data: list[str] = []

    def push(self, data: bytes) -> list[Event]:
        """Events that ``data`` completes. Raises RemoteError when one grows beyond MAX_EVENT_BYTES."""
        buffer, held = self._rest + data, b""
        if buffer.endswith(b"\r"):  # its LF may be on the way
            buffer, held = buffer[:-1], b"\r"
        *lines, rest = buffer.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = rest + held
        if len(self._rest) > MAX_EVENT_BYTES:
            raise RemoteError(f"the server sent an event of more than {MAX_EVENT_BYTES} bytes")
        return [event for line in lines if (event := self._line(line.decode("utf-8", "replace"))) is not None]

    def _line(self, line: str) -> Event | None:
        if not line:
            event = Event(self._name, "\n".join(self._data)) if self._data else None
            self._name, self._data = "", []
            return event
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            self._name = value
        elif field == "data":
            self._data.append(value)
        return None


class HttpClient:
    """Requests to one server. ``failure`` makes the exception of a refusal.

    Used on the language's event loop only; a forked process gets a pool of its own.
    """

    def __init__(self, url: str, options: HttpOptions, failure: Failure) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise DefinitionError(f"url is {url!r}; it must read http://host:port or https://host")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise DefinitionError("url must hold neither credentials nor a query; give api_key= instead")
        self.url = url.rstrip("/")
        self._options = options
        self._failure = failure
        self._is_local = _is_local(parts.hostname)
        self._pool: httpx.AsyncClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        return f"HttpClient({self.url!r})"

    @property
    def timeout_s(self) -> float:
        """The bound of one computing request."""
        return self._options.timeout_s

    def _client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        if self._pool is None or self._loop is not loop:
            self._pool, self._loop = self._make(), loop
        return self._pool

    def _make(self) -> httpx.AsyncClient:
        import httpx

        headers = {"accept": "application/json, text/event-stream", **dict(self._options.headers)}
        if self._options.api_key:
            headers["authorization"] = f"Bearer {self._options.api_key}"
        limits = httpx.Limits(
            max_connections=self._options.max_connections,
            max_keepalive_connections=self._options.max_connections,
            keepalive_expiry=KEEP_ALIVE_S,
        )
        return httpx.AsyncClient(
            headers=headers,
            limits=limits,
            trust_env=not self._is_local,  # no proxy between this machine and itself
            timeout=httpx.Timeout(SHORT_S, connect=CONNECT_S, pool=self._options.timeout_s),
        )

    def close(self) -> None:
        """Close the connections. Requests that still run fail."""
        pool, self._pool = self._pool, None
        if pool is not None and self._loop is runner().loop:
            runner().call(lambda: runner().spawn(pool.aclose()))

    # -- requests ------------------------------------------------------------------------------------------------

    async def get(self, path: str) -> Any:
        """The JSON of a GET."""
        return await self.request("GET", path, None)

    async def post(self, path: str, body: Mapping[str, Any] | None = None, *, computes: bool = False) -> Any:
        """The JSON of a POST. ``computes``: it may take up to ``timeout_s``."""
        return await self.request("POST", path, body if body is not None else {}, computes=computes)

    async def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        *,
        computes: bool = False,
        retry_s: float | None = None,
    ) -> Any:
        """The JSON of an answer (its text when it is none). Raises what ``failure`` makes of a refusal. ``retry_s``:
        refusals are tried again for that long at most, and a server that cannot be reached is not."""
        async with self._answer(method, path, body, computes=computes, retry_s=retry_s) as response:
            content = await response.aread()
        if not response.headers.get("content-type", "").startswith("application/json"):
            return content.decode("utf-8", "replace")
        try:
            return json.loads(content)
        except ValueError as error:
            raise RemoteError(f"{self.url}{path} answered with broken JSON: {error}") from error

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Event, None]:
        """The events of a streaming POST. Closing the generator closes the connection, which aborts the request."""
        parser = EventParser()
        async with self._answer("POST", path, body, computes=True) as response:
            async for data in response.aiter_bytes():
                for event in parser.push(data):
                    yield event

    @asynccontextmanager
    async def _answer(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        *,
        computes: bool,
        retry_s: float | None = None,
    ) -> AsyncGenerator[httpx.Response, None]:
        """A successful response, after as many retries as it takes and the time allows."""
        import httpx

        content = None
        if body is not None:
            content = json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
        headers = {} if content is None else {"content-type": "application/json"}
        read_s = self._options.timeout_s if computes else SHORT_S
        timeout = httpx.Timeout(SHORT_S, read=read_s, connect=CONNECT_S, pool=self._options.timeout_s)
        loop = asyncio.get_running_loop()
        began, attempt = loop.time(), 0
        while True:
            client = self._client()
            request = client.build_request(method, self.url + path, content=content, headers=headers, timeout=timeout)
            wait_s: float | None
            try:
                response = await client.send(request, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure: Exception = self._unreachable(error)
                wait_s = None
                limit_s = min(self._options.retry_s, BUSY_S) if retry_s is None else 0.0
            except _transport_errors() as error:
                raise self._lost(path, error) from error
            else:
                if response.status_code < 300:
                    try:
                        yield response
                    except _transport_errors() as error:
                        raise self._lost(path, error) from error
                    finally:
                        await response.aclose()
                    return
                refusal = await self._refusal(response)
                failure, wait_s = self._failure(refusal), refusal.retry_after_s
                if retry_s == 0.0 or not (refusal.retryable or refusal.is_busy):
                    raise failure
                limit_s = BUSY_S if refusal.is_busy else self._options.retry_s
                limit_s = limit_s if retry_s is None else min(limit_s, retry_s)
            delay_s = wait_s if wait_s is not None else min(MAX_DELAY_S, FIRST_DELAY_S * 2.0**attempt)
            delay_s *= 1.0 + 0.25 * random.random()  # those refused together do not come back together
            attempt += 1
            if loop.time() + delay_s - began > limit_s:
                raise failure
            await asyncio.sleep(delay_s)

    async def _refusal(self, response: httpx.Response) -> Refusal:
        try:
            content = await response.aread()
        except _transport_errors() as error:
            raise self._lost(response.request.url.path, error) from error
        finally:
            await response.aclose()
        return refusal_of(response.status_code, content, response.headers.get("retry-after"))

    def _unreachable(self, error: Exception) -> ServerUnavailable:
        return ServerUnavailable(
            f"{self.url} cannot be reached ({_told(error)}); is the server running? `caesura serve` starts one"
        )

    def _lost(self, path: str, error: Exception) -> ServerUnavailable:
        return ServerUnavailable(
            f"the connection to {self.url} was lost during {path.rpartition('/')[2] or path} ({_told(error)}); "
            "if the server was restarted, its contexts are gone: run the program again"
        )


def refusal_of(status: int, content: bytes, retry_after: str | None = None) -> Refusal:
    """Read an error answer of whatever shape."""
    try:
        body: Any = json.loads(content)
    except ValueError:
        body = content.decode("utf-8", "replace").strip()
    found = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(found, dict):
        found = {"message": found if isinstance(found, str) else json.dumps(found)}
    message = found.get("message") or found.get("detail") or f"HTTP status {status}"
    code, param = found.get("code"), found.get("param")
    return Refusal(
        status,
        (message if isinstance(message, str) else json.dumps(message))[: 2 * MAX_SHOWN_CHARS],
        code if isinstance(code, str) else None,
        param if isinstance(param, str) else None,
        _seconds(retry_after),
    )


def status_of(error: Any) -> int:
    """The HTTP status that an error in the middle of a stream would have had, whatever its shape."""
    if not isinstance(error, dict):
        return 500
    numbers = (error.get("status"), error.get("code"))
    kinds = {"invalid_request_error": 400, "service_unavailable": 503}
    found = next((number for number in numbers if isinstance(number, int) and 400 <= number < 600), None)
    return found or kinds.get(str(error.get("type")), 500)


def failure_of(refusal: Refusal) -> Exception:
    """The exception for a refusal: the runtime's own kinds where there are such."""
    from caesura.runtime.errors import ContextTooLong, DeadlineExceeded, GrammarError, InvalidRequest

    message = refusal.message
    match refusal.status, refusal.code:
        case 400, "invalid_grammar":
            return GrammarError(message)
        case 400, "context_length_exceeded":
            return ContextTooLong(message)
        case ((400 | 413 | 415 | 422), _):
            return InvalidRequest(message)
        case ((401 | 403), _):
            return RemoteError(f"the server refuses: {message}; give the right api_key")
        case ((404 | 405 | 501), _):
            return NotServed(f"the server does not have what was asked for: {message}")
        case 408, _:
            return DeadlineExceeded(message)
        case ((409 | 429 | 503), _):
            return ServerUnavailable(f"the server refuses for lack of room: {message}")
    return RemoteError(f"the server failed ({refusal.status}): {message}")


def _seconds(retry_after: str | None) -> float | None:
    try:
        return None if retry_after is None else max(0.0, float(retry_after))
    except ValueError:  # a date: the backoff will do
        return None


def _transport_errors() -> tuple[type[Exception], ...]:
    import httpx

    return (httpx.TransportError, httpx.StreamError)


def _told(error: Exception) -> str:
    return str(error) or type(error).__name__


def _is_local(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
