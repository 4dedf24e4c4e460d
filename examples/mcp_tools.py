"""MCP: the tools of a server in another process, called by the model as if they were yours.

This file is both ends. Run plainly it starts itself once more as an MCP server (the official SDK, over stdio), takes
three of its four tools, and lets the model call them. Needs the extra: pip install "caesura[mcp]".

    python examples/mcp_tools.py
"""

import os
import sys

import typer
from caesura.lang import Engine, McpServer, assistant, connect, function, gen, mcp_tools, user
from caesura.runtime.embedded.tools import Encyclopedia, calculate, convert
from rich import print
from rich.markup import escape

BOOK = Encyclopedia(3)
QUESTIONS = (
    "What is 4827 * 396?",
    f"What is the population of {BOOK.towns[0]}?",
    "How many miles are 12.5 km?",
)


def serve() -> None:
    """An MCP server with four tools, until standard input ends."""
    from mcp.server.mcpserver import MCPServer

    server = MCPServer("desk")

    @server.tool()
    def calculator(expression: str) -> str:
        """Evaluate an arithmetic expression."""
        return calculate(expression)

    @server.tool()
    def shut_down() -> str:
        """Shut the desk down."""
        os._exit(1)

    server.tool()(BOOK.lookup)
    server.tool()(convert)
    server.run()


@function
def ask(s, question: str, tools):
    s += user(question)
    s += assistant(gen("answer", tools=tools, max_tokens=96, temperature=0))


def main(serve_stdio: bool = False, url: str = "", model: str = ""):
    """Ask with a server's tools; --url names a model server, --model a checkpoint."""
    if serve_stdio:
        return serve()
    server = McpServer("desk", command=(sys.executable, __file__, "--serve-stdio"))
    states = []
    taken = ["calculator", "lookup", "convert"]  # and not shut_down: who asks for nothing gets everything
    with (
        connect(url) if url else Engine(model or None) as backend,
        mcp_tools(server, allow=taken, timeout_s=20) as tools,
    ):
        print(f"[dim]tools: {escape(', '.join(tools.names))}[/]")
        for question in QUESTIONS:
            state = ask.run(question, tools, backend=backend)
            print(f"[bold]{escape(question)}[/]")
            for call, result in state.tool_calls("answer"):
                print(f"  [magenta]{escape(call.tool)}[/] {escape(call.arguments)} [dim]->[/] {escape(result.text)}")
            print(f"  [green]{escape(state['answer'])}[/]")
            states.append(state)
    return states


if __name__ == "__main__":
    typer.run(main)
