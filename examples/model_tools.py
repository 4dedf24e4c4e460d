"""The model calls: it is given a toolbox and decides itself what to call, with what, and how often.

`gen(tools=[...])` runs the whole loop: the model writes a call, the context pauses while the tool runs, the result is
appended, the model goes on, until it answers. Bound methods are tools as well as functions are.

    python examples/model_tools.py
    python examples/model_tools.py --question "What day of the week is 17 April 2031?"
"""

import typer
from caesura.lang import Engine, Tool, assistant, connect, function, gen, user
from caesura.runtime.embedded.tools import Encyclopedia, Notebook, calculate, convert, days_between, weekday
from rich import print
from rich.markup import escape

BOOK, NOTES = Encyclopedia(3), Notebook({"rent": "950"})
TOOLBOX = [
    Tool(calculate, name="calculator", description="Evaluate an arithmetic expression."),
    *(Tool(function) for function in (BOOK.lookup, convert, weekday, days_between, NOTES.put_note, NOTES.get_note)),
]
TOWN = BOOK.towns[0]
ELDER, YOUNGER = sorted(BOOK.people[:2], key=lambda name: BOOK.entries[name]["birth_year"])
QUESTIONS = [
    "Add 4821 and 977, then multiply the result by 36.",
    f"How many people live in the town where {YOUNGER} was born?",
    f"How old was {ELDER} when {YOUNGER} was born?",
    f"What is the length of the river of {TOWN} in miles?",
    "Multiply my note rent by 12.",
    "Tell me a joke.",
]


@function
def ask(s, question: str):
    s += user(question)
    s += assistant(gen("answer", tools=TOOLBOX, max_tokens=128, temperature=0))


def main(question: list[str] = QUESTIONS, url: str = "", model: str = ""):
    """Ask questions; --url names a server, --model a checkpoint, otherwise the embedded model answers."""
    with connect(url) if url else Engine(model or None) as backend:
        states = [ask.run(text, backend=backend) for text in question]  # all of them at once
        for text, state in zip(question, states, strict=True):
            print(f"[bold]{escape(text)}[/]")
            for call, result in state.tool_calls("answer"):
                print(f"  [magenta]{escape(call.tool)}[/] {escape(call.arguments)} [dim]->[/] {escape(result.text)}")
            print(f"  [green]{escape(state['answer'])}[/]")
            usage = state.usage()
            print(
                f"  [dim]{usage.prompt_tokens} tokens of prompts, {usage.cached_tokens} of them not computed again[/]"
            )
    return states


if __name__ == "__main__":
    typer.run(main)
