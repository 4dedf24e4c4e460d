"""Fork and vote: ask once, think several times, believe the majority.

The question is computed once and the branches share its memory; each draws its own way of calling the calculator, so
they differ. One branch alone is as good as the model; the vote is better.

    python examples/fork_and_vote.py --branches 9 --temperature 1.4
"""

from collections import Counter

import typer
from caesura.lang import Engine, assistant, call_tool, connect, function, gen, system, tool, user
from caesura.runtime.embedded.tools import calculate
from rich import print
from rich.markup import escape

QUESTION = "A shop ordered 4816 lanterns and has sold 2957. How many lanterns remain?"
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "'


@tool
def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression."""
    return calculate(expression)


def expression(**sampling):
    """A number, an operator, a number, and what ends the call, which for this model is one token."""
    return gen("expression", regex=r'\d{1,6} [-+*/] \d{1,6}"\}\}', stop='"', **sampling)


@function(tools=[calculator])
def vote(s, question: str = QUESTION, branches: int = 9, temperature: float = 1.4):
    s += system("You work for a small shop and help its staff with the books. Never guess a number.")
    s += user(question)
    forks = s.fork(branches)
    forks += lambda i: assistant(CALL + expression(seed=i, temperature=temperature) + '"}}\n</tool_call>')
    for fork in forks:
        fork.role("tool", call_tool("value", calculator, fork["expression"]))
    forks.join()  # each variable becomes a list, in the order of the branches
    ranking = Counter(s["value"]).most_common()
    return ranking[0][0]


def main(question: str = QUESTION, branches: int = 9, temperature: float = 1.4, url: str = "", model: str = ""):
    """Ask a question; --url names a server, --model a checkpoint, otherwise the embedded model answers."""
    with connect(url) if url else Engine(model or None) as backend:
        state = vote.run(question, branches, temperature, backend=backend)
        print(f"[bold]{escape(question)}[/]")
        votes = Counter(zip(state["value"], state["expression"], strict=True))
        for (value, expression), count in votes.most_common():
            colour = "green" if value == state.ret_value else "red"
            print(f"  [{colour}]{'■' * count:<{branches}}[/] {escape(expression)} = {escape(value)}")
        usage = state.usage()
        print(f"The vote says [bold]{escape(state.ret_value)}[/].")
        print(f"[dim]{usage.prompt_tokens} tokens of prompts, {usage.cached_tokens} of them shared or kept[/]")
    return state


if __name__ == "__main__":
    typer.run(main)
