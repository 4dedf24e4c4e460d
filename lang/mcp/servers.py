"""Which MCP servers there are: from code, or from the configuration file that other MCP clients read.

Nothing else makes an `McpServer`: a command that is started comes from the user's own code or disk, never from a model
or a request.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from caesura.lang.errors import DefinitionError

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_ADDRESS = re.compile(r"localhost|[0-9.]*|.*:.*")  # hosts that say nothing
_NAME = re.compile(r"[A-Za-z@./\\][\w@./\\-]*")  # a script or package among the words of a command
_HTTP_TYPES = ("http", "streamable-http", "streamableHttp")


@dataclass(frozen=True, slots=True)
class McpServer:
    """A server: either a ``command`` to start (spoken to over its standard streams) or a ``url`` (streamable HTTP).

    ``name`` becomes the prefix of its tools. ``env`` is added to a small inherited environment, which holds no secrets.
    """

    name: str
    command: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict, repr=False)  # both may hold keys
    cwd: str | None = None
    url: str = ""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not re.search("[A-Za-z0-9]", self.name):
            raise DefinitionError(f"name of an MCP server is {self.name!r}; it needs a letter or digit")
        if bool(self.command) == bool(self.url):
            raise DefinitionError(f"MCP server {self.name!r} needs either a command or a url")
        if self.url:
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise DefinitionError(
                    f"url of MCP server {self.name!r} is {self.url!r}; it must be http:// or https://"
                )

    @staticmethod
    def of(value: McpServer | str | Sequence[str]) -> McpServer:
        """A server as it is; a URL or the words of a command become one, named after its host or what it runs."""
        if isinstance(value, McpServer):
            return value
        if isinstance(value, str):
            if "://" not in value:
                raise DefinitionError(
                    f"{value!r} is no URL of an MCP server; give a command as a list of words, and servers of a "
                    "configuration file by mcp_servers(path)"
                )
            host = urlsplit(value).hostname or ""
            return McpServer("mcp" if _ADDRESS.fullmatch(host) else host, url=value)
        words = tuple(str(word) for word in value)
        if not words:
            raise DefinitionError("the command of an MCP server has no words")
        named = [word for word in words[1:] if _NAME.fullmatch(word)]
        return McpServer(Path((named or words)[0]).stem, command=words)


def mcp_servers(path: str | Path) -> dict[str, McpServer]:
    """The servers of a configuration file ``{"mcpServers": {"name": {"command", "args", "env", "cwd"} or {"url",
    "headers"}}}``. ``${NAME}`` and ``${NAME:-default}`` in values stand for environment variables.

    Raises DefinitionError that names the file, the server and the field.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DefinitionError(f"MCP configuration {path} cannot be read: {error}") from None
    entries = found.get("mcpServers") if isinstance(found, dict) else None
    if not isinstance(entries, dict):
        raise DefinitionError(f'MCP configuration {path} has no object "mcpServers"')
    return {name: _server(name, entry, f"{path}, server {name!r}") for name, entry in entries.items()}


def _server(name: str, entry: Any, where: str) -> McpServer:
    if not isinstance(entry, dict):
        raise DefinitionError(f"{where}: it must be an object with a command or a url")
    kind = entry.get("type") or entry.get("transport") or ("stdio" if "command" in entry else "http")
    if kind != "stdio" and kind not in _HTTP_TYPES:
        raise DefinitionError(f"{where}: type is {kind!r}; there are stdio and http (streamable HTTP)")
    try:
        if kind == "stdio":
            words = (_text(entry, "command", where), *_texts(entry, "args", where))
            cwd = _text(entry, "cwd", where) if "cwd" in entry else None
            return McpServer(name, command=words, env=_table(entry, "env", where), cwd=cwd)
        return McpServer(name, url=_text(entry, "url", where), headers=_table(entry, "headers", where))
    except DefinitionError as error:
        raise DefinitionError(str(error) if where in str(error) else f"{where}: {error}") from None


def _text(entry: Mapping[str, Any], key: str, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise DefinitionError(f"{where}: {key} is {value!r}; it must be a non-empty text")
    return _expanded(value, f"{where}, {key}")


def _texts(entry: Mapping[str, Any], key: str, where: str) -> list[str]:
    values = entry.get(key, [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise DefinitionError(f"{where}: {key} must be a list of texts")
    return [_expanded(value, f"{where}, {key}") for value in values]


def _table(entry: Mapping[str, Any], key: str, where: str) -> dict[str, str]:
    values = entry.get(key) or {}
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise DefinitionError(f"{where}: {key} must be an object of texts")
    return {name: _expanded(value, f"{where}, {key}.{name}") for name, value in values.items()}


def _expanded(text: str, where: str) -> str:
    def value(found: re.Match[str]) -> str:
        known = os.environ.get(found[1], found[2])
        if known is None:
            raise DefinitionError(f"{where}: the environment variable {found[1]} is not set")
        return known

    return _VARIABLE.sub(value, text)
