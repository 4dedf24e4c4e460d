"""Tree of thought: rank every next step, go on with the best few, and see where each way leads.

A thought is one call of the calculator. The model ranks all of them under one shared prefix (`select` scores them), the
kept ones become forks, the calculator computes theirs, and each fork either answers or ranks again.

    python examples/tree_of_thought.py --beam 4
"""

import math
import re
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import typer
from caesura.lang import Engine, assistant, call_tool, connect, function, select, system, tool, user
from caesura.runtime.embedded.tools import calculate
from rich import print
from rich.markup import escape
from rich.tree import Tree

QUESTION = "Salma has 318 red and 47 blue ribbons. Viktor has 26 times as many. How many ribbons does Viktor have?"
CALL, END = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "', '"}}\n</tool_call>'


@tool
def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression."""
    return calculate(expression)


@dataclass
class Thought:
    """A fork of the program, what it knows by now, and how likely the model finds the way to here."""

    state: Any
    numbers: list[str]
    likelihood: float
    said: str = ""
    is_answer: bool = False
    next: list["Thought"] = field(default_factory=list)

    def steps(self) -> list[str]:
        """Every call that can be made of the numbers known."""
        steps = (f"{a} {sign} {b}" for a, b in permutations(self.numbers, 2) for sign in "+-*/")
        return list(dict.fromkeys(steps))  # a number may be known twice

    def answers(self) -> list["Thought"]:
        """The ends of all ways that came to one."""
        return [self] if self.is_answer else [end for child in self.next for end in child.answers()]


def likelihoods(judge: Any, name: str) -> list[float]:
    """How likely the model finds each option: the product over its tokens."""
    return [math.exp(sum(token[0] for token in tokens)) for tokens in judge.get_meta_info(name)["input_token_logprobs"]]


@function(tools=[calculator])
def search(s, question: str = QUESTION, beam: int = 4, depth: int = 3):
    s += system("You are a careful assistant that answers arithmetic questions.")
    s += user(question)
    root = Thought(s, re.findall(r"\d+", question), 1.0)
    level = [root]
    for _ in range(depth):
        judges = [thought.state.fork(2) for thought in level]
        for thought, (ending, calling) in zip(level, judges, strict=True):  # only enqueued: all are scored at once
            ending += assistant(select("end", [f"The answer is {thought.numbers[-1]}."]))
            calling += assistant(CALL + select("call", thought.steps()))
        ranked = []
        for thought, (ending, calling) in zip(level, judges, strict=True):
            (done,) = likelihoods(ending, "end")
            if done > 0.5:
                thought.next.append(Thought(ending, thought.numbers, thought.likelihood * done, ending["end"], True))
                continue
            scored = zip(likelihoods(calling, "call"), thought.steps(), strict=True)
            ranked += [(thought.likelihood * (1 - done) * likely, thought, step) for likely, step in scored]
        level = []
        for likelihood, thought, step in sorted(ranked, key=lambda one: -one[0])[:beam]:
            fork = thought.state.fork(1)[0]
            fork += assistant(CALL + step + END)
            fork.role("tool", call_tool("value", calculator, step))
            level.append(Thought(fork, thought.numbers, likelihood, step))
            thought.next.append(level[-1])
        for thought in level:
            thought.numbers = [*thought.numbers, thought.state["value"]]
            thought.said += f" = {thought.state['value']}"
    return root


def draw(thought: Thought, tree: Tree) -> Tree:
    for child in thought.next:
        colour = "green" if child.is_answer else "default"
        draw(child, tree.add(f"[{colour}]{escape(child.said)}[/] [dim]{child.likelihood:.2%}"))
    return tree


def main(question: str = QUESTION, beam: int = 4, url: str = "", model: str = ""):
    """Search; --url names a server, --model a checkpoint, otherwise the embedded model answers."""
    if len(re.findall(r"\d+", question)) < 2:
        raise typer.BadParameter(f"{question!r} must have two numbers or more", param_hint="--question")
    with connect(url) if url else Engine(model or None) as backend:
        state = search.run(question, beam, backend=backend)
        root = state.ret_value
    print(draw(root, Tree(f"[bold]{escape(question)}")))
    best = max(root.answers(), key=lambda thought: thought.likelihood, default=root)
    print(f"[bold green]{escape(best.said) or 'No way came to an end.'}")
    return state


if __name__ == "__main__":
    typer.run(main)
