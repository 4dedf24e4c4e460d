"""A person in the loop: a tool that takes days, and a program that survives the end of its process.

The model works out a refund and asks a person for leave. Stop the process while it waits, or kill it; answer when you
like; run it again. What was done is taken from the recording: the model does not think it again, no tool runs twice.

    python examples/human_in_the_loop.py                     # asks, and waits
    echo yes > out/refund.answer                             # or: no: the goods came back broken
    python examples/human_in_the_loop.py                     # goes on, if it was stopped meanwhile
"""

import asyncio
from pathlib import Path

import typer
from caesura.lang import Engine, assistant, connect, durable, function, gen, tool, user
from caesura.runtime.embedded.tools import calculate
from rich import print

REQUEST = "Refund 48 lanterns at 17 each to Wanda."


class Desk:
    """Where a person is asked by a line on the screen, and answers in a file."""

    def __init__(self, answer: Path) -> None:
        self.answer = answer

    @tool(timeout_s=None)
    async def ask_person(self, question: str) -> str:
        """Ask a person."""
        print(f"[bold yellow]{question}[/] Write yes, or no: REASON, into {self.answer}", flush=True)
        while not (self.answer.exists() and (text := self.answer.read_text().strip())):
            await asyncio.sleep(0.05)
        return text


@tool
def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression."""
    print(f"[dim]the calculator runs: {expression}[/]", flush=True)
    return calculate(expression)


@function
def refund(s, request: str, desk: Desk):
    s += user(request)
    s += assistant(gen("outcome", tools=[calculator, desk.ask_person], max_tokens=96, temperature=0))


def main(request: str = REQUEST, folder: Path = Path("out"), url: str = "", model: str = ""):
    """Handle a request; --url names a server, --model a checkpoint, otherwise the embedded model works."""
    folder.mkdir(parents=True, exist_ok=True)
    desk = Desk(folder / "refund.answer")
    with connect(url) if url else Engine(model or None) as engine, durable(engine, folder / "refund.jsonl") as backend:
        state = refund.run(request, desk, backend=backend)
        try:
            print(f"[bold green]{state['outcome']}")
        except KeyboardInterrupt:
            state.cancel()
            print("Stopped. Run it again, and it goes on from here.")
    return state


if __name__ == "__main__":
    typer.run(main)
