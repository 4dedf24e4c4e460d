"""Parallel tools: several calls in one turn run at once, and the pause lasts as long as the slowest.

First the model calls twice in one breath (`gen(tools=)`). Then the program asks two mirrors of a service and
takes whichever answers first (`call_tools(wait="any")`); the other call is cancelled. The trace shows who ran when.

    python examples/parallel_tools.py
"""

import asyncio
import functools
from collections.abc import Callable

import typer
from caesura.lang import Engine, Tool, assistant, call_tools, connect, function, gen, user
from caesura.runtime.embedded.tools import calculate, convert, weekday
from rich import print
from rich.markup import escape

QUESTION = "What is 4827 * 396 and what is 51 + 1818?"


def far_away(function: Callable, seconds: float, **options) -> Tool:
    """A tool that answers as ``function`` does, after the time that such a service takes."""

    @functools.wraps(function)  # with its signature, which becomes the schema
    async def wrapped(*args, **kwargs):
        await asyncio.sleep(seconds)
        return function(*args, **kwargs)

    return Tool(wrapped, **options)


TOOLS = [
    far_away(calculate, 0.25, name="calculator", description="Evaluate an arithmetic expression."),
    far_away(convert, 0.4),
    far_away(weekday, 0.3),
]
MIRRORS = [far_away(calculate, 0.3, name="north"), far_away(calculate, 0.12, name="south")]


@function(tools=TOOLS)
def parallel(s, question: str = QUESTION):
    s += user(question)
    s += assistant(gen("answer", tools=TOOLS, max_tokens=160, temperature=0))
    s += user(call_tools("race", [(mirror, "6 * 7") for mirror in MIRRORS], wait="any"))


def main(question: str = QUESTION, url: str = "", model: str = ""):
    """Run it; --url names a server, --model a checkpoint, otherwise the embedded model calls."""
    with connect(url) if url else Engine(model or None) as backend:
        state = parallel.run(question, backend=backend)
        print(f"[bold]{escape(question)}[/]\n[green]{escape(state['answer'])}[/]")
        print(f"Two mirrors raced: {escape(str(state['race']))}\n")
        print(state.trace().tree())
    took = sum(result.elapsed_s for _, result in state.tool_calls("answer"))
    print(f"[dim]one after the other the calls of the model would have taken {took:.2f} s[/]")
    return state


if __name__ == "__main__":
    typer.run(main)
