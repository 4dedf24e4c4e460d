"""MCP tools as tools of the language: names, signatures, results."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import keyword
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from caesura.lang.errors import DefinitionError, ToolError
from caesura.lang.mcp.connection import Connection
from caesura.lang.mcp.servers import McpServer
from caesura.lang.runner import runner
from caesura.lang.tools import DEFAULT_MAX_CHARS, DEFAULT_TIMEOUT_S, Tool, ToolOutput, render

if TYPE_CHECKING:
    from mcp.types import CallToolResult, ContentBlock
    from mcp.types import Tool as RemoteTool

MAX_NAME_CHARS = 64  # what model APIs accept


class McpTools(Sequence[Tool]):
    """The tools of some servers, in the order of the servers' listings; see `mcp_tools`."""

    def __init__(self, tools: Sequence[Tool], connections: Sequence[Connection]) -> None:
        self._tools = tuple(tools)
        self._connections = tuple(connections)

    @overload
    def __getitem__(self, key: int | str) -> Tool: ...
    @overload
    def __getitem__(self, key: slice) -> Sequence[Tool]: ...

    def __getitem__(self, key: int | str | slice) -> Tool | Sequence[Tool]:
        """By position, or by name: ``tools["files__read"]``."""
        if not isinstance(key, str):
            return self._tools[key]
        for tool in self._tools:
            if tool.name == key:
                return tool
        raise KeyError(f"there is no tool {key!r}; there are: {', '.join(self.names)}")

    def __len__(self) -> int:
        return len(self._tools)

    @property
    def names(self) -> list[str]:
        """The tools' names as models see them."""
        return [tool.name for tool in self._tools]

    def close(self) -> None:
        """End the connections, and the servers that were started. Calls that run fail. May be called twice."""
        runner().wait(_close(self._connections))

    def __enter__(self) -> McpTools:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<McpTools {', '.join(self.names)}>"


def mcp_tools(
    *servers: McpServer | str | Sequence[str],
    allow: Sequence[str] | None = None,
    timeout_s: float | None = DEFAULT_TIMEOUT_S,
    expected_s: float | None = None,
    max_chars: int = DEFAULT_MAX_CHARS,
    connect_timeout_s: float = 30.0,
) -> McpTools:
    """The tools of MCP servers, for ``gen(tools=...)`` and ``call_tool``; connects, and waits for the listings.

    A server is a URL (streamable HTTP), a command as a list of words (stdio), an `McpServer`, or one of
    ``mcp_servers(path)``. Names are ``server__tool``. ``allow`` lists the tools to take, as the server or as this
    prefixed form names them. ``timeout_s`` bounds each call; a call that is late, or whose program is cancelled, is
    cancelled at the server too. A server that dies fails the call, and is started or reached again at the next one.

    Use it with ``with``, or call ``close()``. Raises McpUnavailable and DefinitionError.
    """
    if not servers:
        raise DefinitionError("mcp_tools() has no server; give a URL, a command as a list of words, or an McpServer")
    if not connect_timeout_s > 0:
        raise DefinitionError(f"connect_timeout_s is {connect_timeout_s}; it must be above 0")
    known = [McpServer.of(server) for server in servers]
    connections = [Connection(server, connect_timeout_s) for server in known]
    listings = runner().wait(_list(connections))
    pairs = [(c, remote) for c, listing in zip(connections, listings, strict=True) for remote in listing]
    try:
        names = tool_names([(connection.server.name, remote.name) for connection, remote in pairs])
        chosen = allowed(names, [remote.name for _, remote in pairs], allow)
        tools = [
            _tool(connection, remote, name, timeout_s=timeout_s, expected_s=expected_s, max_chars=max_chars)
            for name, (connection, remote) in zip(names, pairs, strict=True)
            if name in chosen
        ]
        return McpTools(tools, connections)
    except BaseException:
        runner().wait(_close(connections))
        raise


async def _list(connections: Sequence[Connection]) -> list[list[RemoteTool]]:
    try:
        return await asyncio.gather(*(connection.list_tools() for connection in connections))
    except BaseException:
        await _close(connections)
        raise


async def _close(connections: Sequence[Connection]) -> None:
    await asyncio.gather(*(connection.close() for connection in connections))


def tool_names(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Names for ``(server, tool)`` pairs: identifiers of at most 64 characters, all different, the same whatever the
    order. A name that would be long or not the only one ends in a digest of the pair."""
    plain = [f"{_identifier(server)}__{_identifier(tool)}" for server, tool in pairs]
    count = Counter(plain)
    names = []
    for name, pair in zip(plain, pairs, strict=True):
        if count[name] > 1 or len(name) > MAX_NAME_CHARS:
            digest = hashlib.sha256("\0".join(pair).encode()).hexdigest()[:8]
            name = f"{name[: MAX_NAME_CHARS - 9]}_{digest}"
        names.append(name)
    if len(set(names)) < len(names):
        twice = next(pair for pair, n in Counter(pairs).items() if n > 1)
        raise DefinitionError(f"two MCP servers are called {twice[0]!r}; give one another name: McpServer(name, ...)")
    return names


def _identifier(text: str) -> str:
    clean = re.sub("_+", "_", re.sub("[^A-Za-z0-9]", "_", text)).strip("_") or "_"
    return f"_{clean}" if clean[0].isdigit() else clean


def allowed(names: Sequence[str], own_names: Sequence[str], allow: Sequence[str] | None) -> set[str]:
    """The names in ``allow``, which has them with or without the server's before; None allows all."""
    if allow is None:
        return set(names)
    if isinstance(allow, str):
        raise DefinitionError(f"allow is {allow!r}; it must be a list of names")
    unknown = [name for name in allow if name not in names and name not in own_names]
    if unknown:
        raise DefinitionError(f"allow names a tool {unknown[0]!r} that no server has; there are: {', '.join(names)}")
    plain = set(allow).difference(names)  # a prefixed name means that tool alone, whatever others call theirs
    return {name for name, own in zip(names, own_names, strict=True) if name in allow or own in plain}


def _tool(
    connection: Connection,
    remote: RemoteTool,
    name: str,
    *,
    timeout_s: float | None,
    expected_s: float | None,
    max_chars: int,
) -> Tool:
    signature = _signature(remote.input_schema)

    async def call(*args: Any, **kwargs: Any) -> ToolOutput:
        arguments = dict(signature.bind(*args, **kwargs).arguments)
        arguments.update(arguments.pop(_OTHERS, {}))
        return _output(await connection.call(remote.name, arguments))

    call.__signature__ = signature  # type: ignore[attr-defined]
    return Tool(
        call,
        name=name,
        description=remote.description or "",
        timeout_s=timeout_s,
        expected_s=expected_s,
        max_chars=max_chars,
        parameters=remote.input_schema,
    )


_OTHERS = "others_"  # arguments whose names are no Python names


def _signature(schema: Mapping[str, Any]) -> inspect.Signature:
    """The schema's properties as parameters, required ones first."""
    properties = [str(name) for name in schema.get("properties") or {}]
    required = set(schema.get("required") or ())
    names = [name for name in properties if name.isidentifier() and not keyword.iskeyword(name) and name != _OTHERS]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [
        *(inspect.Parameter(name, kind) for name in names if name in required),
        *(inspect.Parameter(name, kind, default=None) for name in names if name not in required),
    ]
    if len(names) < len(properties) or schema.get("additionalProperties") or not properties:
        parameters.append(inspect.Parameter(_OTHERS, inspect.Parameter.VAR_KEYWORD))
    return inspect.Signature(parameters)


def _output(result: CallToolResult) -> ToolOutput:
    """The structured result as value when there is one, the content as text. Raises ToolError for an error."""
    text = "\n".join(_block(block) for block in result.content)
    if result.is_error:
        raise ToolError(text or "the tool failed and does not say why")
    structured = result.structured_content
    if structured is None:
        return ToolOutput(text, text)
    return ToolOutput(structured, text or render(structured))


def _block(block: ContentBlock) -> str:
    """A content block as text; what is no text is named, so that the model knows of it."""
    if block.type == "text":
        return block.text
    if block.type == "resource_link":
        return f"[{block.title or block.name}]({block.uri})"
    if block.type == "resource":
        held = block.resource
        text: str | None = getattr(held, "text", None)
        return text if text is not None else f"[{held.mime_type or 'data'} at {held.uri}]"
    return f"[{block.type} {block.mime_type}, {len(block.data) * 3 // 4} bytes]"
