"""A real MCP server, made with the SDK: ``python mcp_server.py [stdio|PORT]``. Its calls leave marks in MCP_MARKS."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from mcp import MCPError
from mcp.server.mcpserver import Context, MCPServer
from mcp.types import CallToolResult, EmbeddedResource, ImageContent, TextContent, TextResourceContents
from pydantic import BaseModel

server = MCPServer("marks")
marks = Path(os.environ["MCP_MARKS"])


def mark(text: str) -> None:
    with marks.open("a") as file:
        file.write(text + "\n")


class Place(BaseModel):
    city: str
    floor: int = 0


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool(name="where.is")
def where(place: Place) -> dict[str, object]:
    """Say where something is."""
    return {"city": place.city.upper(), "floor": place.floor}


@server.tool()
def fails(why: str) -> str:
    """Fail."""
    raise ValueError(why)


@server.tool()
def mixed() -> CallToolResult:
    """Text, an image and a file."""
    return CallToolResult(
        content=[
            TextContent(text="one"),
            ImageContent(data="AAAA", mime_type="image/png"),
            EmbeddedResource(resource=TextResourceContents(uri="file:///a.txt", text="two")),
        ]
    )


@server.tool()
async def waits() -> str:
    """Never answer."""
    mark("waits begins")
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        mark("waits is cancelled")
        raise
    return ""


@server.tool()
async def steps(heard: str, context: Context) -> str:
    """Say that a quarter is done, and go on when that was heard: then the file ``heard`` exists."""
    await context.report_progress(7.0)  # of what, nobody knows
    await context.report_progress(1.0, 4.0)
    async with asyncio.timeout(20):
        while not Path(heard).exists():
            await asyncio.sleep(0.01)
    return "heard"


@server.tool()
def busy() -> str:
    """Answer with an error of the protocol, whose code is also that of a closed connection."""
    raise MCPError(code=-32000, message="come back later")


@server.tool()
def dies() -> str:
    """End the server in the middle of the call."""
    sys.stderr.write("the disk is full\n")
    sys.stderr.flush()
    os._exit(3)


@server.tool()
def environment() -> dict[str, object]:
    """What the process can see."""
    return {"secret": os.environ.get("MCP_SECRET"), "given": os.environ.get("MCP_GIVEN"), "pid": os.getpid()}


if __name__ == "__main__":
    if sys.argv[1] == "stdio":
        server.run()
        mark("the server ends")
    else:
        server.run("streamable-http", port=int(sys.argv[1]))
