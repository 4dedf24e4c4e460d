"""A person in the loop: a tool that takes days, and a program that survives the end of its process.

The model works out a refund and asks a person for leave. Stop the process while it waits, or kill it; answer when you
like; run it again. What was done is taken from the recording: the model does not think it again, no tool runs twice.

    python examples/human_in_the_loop.py                     # asks, names a file for the answer, and waits
    echo yes > out/d0cd0665.answer                           # the file it names; or: no: the goods came back broken
    python examples/human_in_the_loop.py                     # goes on, if it was stopped meanwhile
"""

import asyncio
import hashlib
from pathlib import Path

import typer
from caesura.lang import Engine, assistant, connect, durable, function, gen, tool, user
from caesura.runtime.embedded.tools import calculate
from rich import print
from rich.markup import escape

REQUEST = "Refund 48 lanterns at 17 each to Wanda."


class Desk:
    """Where a person is asked by a line on the screen, and answers in a file: one for each question, used once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @tool(timeout_s=None)
    async def ask_person(self, question: str) -> str:
        """Ask a person."""
        answer = self.folder / f"{hashlib.sha256(question.encode()).hexdigest()[:8]}.answer"
        print(f"[bold yellow]{escape(question)}[/] Write yes, or no: REASON, into {escape(str(answer))}", flush=True)
        while not (answer.exists() and (text := answer.read_text().strip())):
            await asyncio.sleep(0.05)
        answer.unlink()  # leave to do it once is not leave to do it again
        return text


@tool
def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression."""
    print(f"[dim]the calculator runs: {escape(expression)}[/]", flush=True)
    return calculate(expression)


@function
def refund(s, request: str, desk: Desk):
    s += user(request)
    s += assistant(gen("outcome", tools=[calculator, desk.ask_person], max_tokens=96, temperature=0))


def main(request: str = REQUEST, folder: Path = Path("out"), url: str = "", model: str = ""):
    """Handle a request; --url names a server, --model a checkpoint, otherwise the embedded model works."""
    folder.mkdir(parents=True, exist_ok=True)
    desk = Desk(folder)
    with connect(url) if url else Engine(model or None) as engine, durable(engine, folder / "refund.jsonl") as backend:
        state = refund.run(request, desk, backend=backend)
        try:
            print(f"[bold green]{escape(state['outcome'])}")
        except KeyboardInterrupt:
            state.cancel()
            print("Stopped. Run it again, and it goes on from here.")
    return state


if __name__ == "__main__":
    typer.run(main)
