"""ReAct: thought, action, observation, in plain text; the program reads each action and calls the tool itself.

The loop is yours: you see every thought, may refuse an action, count them, or change what is observed. A regex keeps
the model to actions that exist. Each `call_tool` pauses the context; only the observation is computed when it goes on.

    python examples/react.py --question "Subtract 977 from 4821, then multiply the result by 36."
"""

import re

import typer
from caesura.lang import Engine, assistant_begin, assistant_end, call_tool, connect, function, gen, system, user
from caesura.runtime.embedded.tools import Encyclopedia, calculate
from rich import print
from rich.markup import escape

BOOK = Encyclopedia(3)
ELDER, YOUNGER = sorted(BOOK.people[:2], key=lambda name: BOOK.entries[name]["birth_year"])
QUESTION = f"How old was {ELDER} when {YOUNGER} was born?"
RULES = (
    "Answer with lines of Thought, Action and Observation. "
    "Actions: calculator[expression], lookup[name, what], answer[text]."
)
FIELDS = sorted({field for entry in BOOK.entries.values() for field in entry})
ACTION = (  # the grammar knows what there is, so that no name is misspelt
    r" (calculator\[[-+*/(). \d]{3,60}\]"
    rf"|lookup\[({'|'.join(map(re.escape, BOOK.entries))}), ({'|'.join(FIELDS)})\]"
    r"|answer\[[^\]\n]{1,60}\])"
)


def lookup(entry: str) -> str:
    """Look a field of an entry up: "name, field"."""
    name, _, field = entry.partition(", ")
    return BOOK.lookup(name, field)


@function
def react(s, question: str = QUESTION, max_steps: int = 6):
    s += system(RULES)
    s += user(question)
    s += assistant_begin()
    for step in range(max_steps):
        s += "Thought:" + gen(f"thought{step}", stop="\n", max_tokens=48, temperature=0)
        s += "\nAction:" + gen(f"action{step}", regex=ACTION, max_tokens=48, temperature=0)
        name, _, inside = s[f"action{step}"].strip(" ]").partition("[")
        if name == "answer":
            s += assistant_end()
            return inside
        tool = calculate if name == "calculator" else lookup
        s += "\nObservation: " + call_tool(f"observation{step}", tool, inside, timeout_s=5) + "\n"
    return "no answer within the steps allowed"


def main(question: str = QUESTION, url: str = "", model: str = ""):
    """Ask a question; --url names a server, --model a checkpoint, otherwise the embedded model answers."""
    with connect(url) if url else Engine(model or None) as backend:
        state = react.run(question, backend=backend)
        print(f"[bold]{escape(question)}")
        for line in state.messages()[-1]["content"].splitlines():
            kind, _, rest = line.partition(":")
            colour = {"Thought": "cyan", "Action": "magenta"}.get(kind, "yellow")
            print(f"  [{colour}]{escape(kind):>11}[/] {escape(rest)}")
        print(f"[bold green]{escape(state.ret_value)}[/]")
        usage = state.usage()
        print(f"[dim]{usage.tool_calls} pauses; {usage.prompt_tokens} tokens of prompts, {usage.cached_tokens} kept[/]")
    return state


if __name__ == "__main__":
    typer.run(main)
