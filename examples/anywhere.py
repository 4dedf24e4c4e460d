"""One program, wherever the model is.

    python examples/anywhere.py                                                       # the engine in this process
    python examples/anywhere.py http://127.0.0.1:30000                                # `caesura serve`
    python examples/anywhere.py "openai+http://127.0.0.1:30000/v1?dialect=sglang"     # any OpenAI-compatible endpoint

On the first two the context is paused while the tool runs, and the runtime decides what becomes of its memory; an
OpenAI endpoint gets the conversation again after every call.
"""

from typing import Annotated

import typer
from caesura.lang import Engine, assistant, connect, function, gen, tool, user
from caesura.runtime.embedded.tools import calculate


@tool(expected_s=0.01)
def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression."""
    return calculate(expression)


@function
def ask(s, question="What is 4827 * 396?"):
    s += user(question)
    s += assistant(gen("answer", tools=[calculator], max_tokens=96, temperature=0))


def main(address: Annotated[str, typer.Argument(help="Where the model is; without one, in this process.")] = ""):
    """Ask one question, wherever the model is."""
    with connect(address) if address else Engine() as backend:
        state = ask.run(backend=backend)
        for call, result in state.tool_calls("answer"):
            print(f"{call.tool}({call.arguments}) = {result.text}")
        print(state["answer"])


if __name__ == "__main__":
    typer.run(main)
