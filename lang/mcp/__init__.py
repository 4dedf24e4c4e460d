"""Tools of MCP servers as tools of programs. Needs the extra ``mcp`` (the official SDK), loaded when it is used."""

from __future__ import annotations

from caesura.lang.mcp.servers import McpServer, mcp_servers
from caesura.lang.mcp.toolset import McpTools, mcp_tools

__all__ = ["McpServer", "McpTools", "mcp_servers", "mcp_tools"]
