"""A connection to one MCP server, on the language's event loop. Speaking the protocol is the SDK's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

from caesura.lang.errors import DefinitionError, ToolError
from caesura.lang.mcp.servers import McpServer
from caesura.lang.progress import progress_reporter
from caesura.lang.runner import runner

if TYPE_CHECKING:
    from mcp import Client
    from mcp.client.stdio import StdioServerParameters
    from mcp.types import CallToolResult
    from mcp.types import Tool as RemoteTool

MAX_PAGES = 100  # of a listing; a server that never ends it must not hang us
HTTP_TIMEOUT_S = 30.0  # to connect and to send; how long an answer may take is the call's deadline
CLOSE_TIMEOUT_S = 10.0
LAST_WORDS_CHARS = 300
CLOSED = "Connection closed"  # the SDK's own words; its code is also that of any error of a server's


class McpUnavailable(ToolError):
    """The server cannot be started or reached, or it has ended in the middle of a call."""


class _Link:
    """One life of a server: the task that holds the connection, and how it is told to end."""

    def __init__(self, server: McpServer) -> None:
        self._server = server
        self._end = asyncio.Event()
        self._said: IO[str] | None = None
        self._calls = 0
        self._retired = False
        self.ready: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
        self.task = runner().spawn(self._hold())

    def end(self) -> None:
        self._end.set()

    def give_up(self) -> None:
        """Take no new calls, and leave off connecting; a connection that stands is closed."""
        self.end()
        if not self.ready.done() and not self.task.cancelling():
            self.task.cancel()  # once: a second time would cut off the SDK's own, which ends the process

    def retire(self) -> None:
        """Take no new calls, and end when those that run have ended."""
        self._retired = True
        if not self._calls:
            self.end()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """While a call runs."""
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            if self._retired and not self._calls:
                self.end()

    @property
    def usable(self) -> bool:
        return not self._retired and not self._end.is_set() and not self.task.done()

    async def _hold(self) -> None:
        """Open the connection, keep it until it is told to end, and close it in this same task, as the SDK's
        cancel scopes demand."""
        # A notebook's stderr is no file that a process could inherit, and a terminal's is not the place either.
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as self._said:
            try:
                async with contextlib.AsyncExitStack() as stack:
                    client = await self._client(stack, self._said)
                    self.ready.set_result(client)
                    await self._end.wait()
            except BaseException as error:
                if not self.ready.done():
                    self.ready.set_exception(McpUnavailable(self.about(error)))
                    self.ready.exception()  # read it, so that nobody warns when the waiter has gone
                if isinstance(error, asyncio.CancelledError):
                    raise
            finally:
                self._end.set()

    async def _client(self, stack: contextlib.AsyncExitStack, said: IO[str]) -> Client:
        from mcp import Client
        from mcp.client.streamable_http import streamable_http_client
        from mcp.types import Implementation

        transport: Any
        if self._server.url:
            import httpx2

            limits = httpx2.Timeout(HTTP_TIMEOUT_S, read=None)
            http = httpx2.AsyncClient(headers=dict(self._server.headers), timeout=limits)
            await stack.enter_async_context(http)
            transport = streamable_http_client(self._server.url, http_client=http)
        else:
            from mcp.client.stdio import stdio_client

            transport = stdio_client(self._parameters(), errlog=cast("TextIO", said))
        info = Implementation(name="caesura", version="1")
        return await stack.enter_async_context(Client(transport, client_info=info))

    def _parameters(self) -> StdioServerParameters:
        from mcp.client.stdio import StdioServerParameters

        program, *words = self._server.command
        return StdioServerParameters(command=program, args=words, env=dict(self._server.env), cwd=self._server.cwd)

    def about(self, error: BaseException) -> str:
        """What went wrong, with the last thing a process said."""
        text = f"MCP server {self._server.name!r}: {_reason(error)}"
        if self._said is not None and not self._said.closed:
            self._said.seek(0)
            if lines := self._said.read().strip().splitlines():
                text += f" (its last words: {lines[-1][-LAST_WORDS_CHARS:]})"
        return text


class Connection:
    """Opened at first use, and again at the next call after the server has ended."""

    def __init__(self, server: McpServer, connect_timeout_s: float) -> None:
        self.server = server
        self._connect_timeout_s = connect_timeout_s
        self._link: _Link | None = None
        self._links: set[_Link] = set()  # all that have not ended
        self._lock = asyncio.Lock()
        self._closed = False

    async def list_tools(self) -> list[RemoteTool]:
        """Every tool the server has. Raises McpUnavailable."""
        link, client = await self._open()
        tools: list[RemoteTool] = []
        cursor = None
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                for _ in range(MAX_PAGES):
                    page = await client.list_tools(cursor=cursor)
                    tools += page.tools
                    cursor = page.next_cursor
                    if not cursor:
                        break
        except Exception as error:
            link.end()
            raise McpUnavailable(link.about(error)) from error
        return tools

    async def call(self, tool: str, arguments: dict[str, Any]) -> CallToolResult:
        """One call. Cancelling it cancels it at the server. Raises McpUnavailable when the server is gone, ToolError
        for what it refuses. A call is never repeated: it may have been carried out."""
        from mcp import MCPError
        from mcp.types import CONNECTION_CLOSED, INVALID_PARAMS, METHOD_NOT_FOUND

        try:
            json.dumps(arguments, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # on the wire it would end the connection for everybody
            raise ToolError(f"the arguments of {tool!r} hold half of a character (a lone surrogate)") from None
        link, client = await self._open()
        report = progress_reporter()

        async def heard(progress: float, total: float | None, message: str | None) -> None:
            if total and total > 0:  # else it says nothing about what is left
                report(min(1.0, max(0.0, progress / total)))

        try:
            with link.in_use():
                return await client.call_tool(tool, arguments, progress_callback=heard)
        except MCPError as error:
            if error.code in (INVALID_PARAMS, METHOD_NOT_FOUND):
                raise ToolError(error.message) from error
            told = link.about(error)
            if error.code == CONNECTION_CLOSED and error.message == CLOSED:
                link.end()
            elif self.server.url:  # the tool's, the transport's or the session's: the next call begins afresh
                link.retire()
            raise McpUnavailable(told) from error
        except Exception as error:
            raise ToolError(f"MCP server {self.server.name!r} gave no valid result: {_reason(error)}") from error

    async def _open(self) -> tuple[_Link, Client]:
        async with self._lock:
            if self._closed:
                raise McpUnavailable(f"MCP server {self.server.name!r}: its tools are closed")
            if self._link is None or not self._link.usable:
                _require_sdk()
                self._link = begun = _Link(self.server)
                self._links.add(begun)
                begun.task.add_done_callback(lambda _: self._links.discard(begun))
            link = self._link
            try:
                async with asyncio.timeout(self._connect_timeout_s):
                    return link, await asyncio.shield(link.ready)
            except TimeoutError:
                link.give_up()
                raise McpUnavailable(
                    f"MCP server {self.server.name!r} did not answer within {self._connect_timeout_s:g} s"
                ) from None
            except asyncio.CancelledError:
                if not link.ready.done():
                    link.give_up()
                raise

    async def close(self) -> None:
        """End the connection, and the process when there is one."""
        self._closed = True
        tasks = [link.task for link in self._links]
        for link in self._links:
            link.give_up()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_S)


def _require_sdk() -> None:
    try:
        import mcp.client.client  # noqa: F401 - the SDK of version 2
    except ImportError as error:
        raise DefinitionError(f"MCP servers need the SDK ({error}): pip install 'caesura[mcp]'") from None


def _reason(error: BaseException) -> str:
    """The innermost cause in words."""
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    if isinstance(error, TimeoutError) and not str(error):
        return "it did not answer in time"
    return str(error) or type(error).__name__
