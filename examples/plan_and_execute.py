"""Plan and execute: one context splits the work, sub-agents do the parts at once, and it puts the answers together.

The sub-agents are forks: the instructions and tools at the head of the conversation, the longest part of it, are
computed once and shared by all. Each works on one question, with tools, and returns one line.

    python examples/plan_and_execute.py
"""

import re
import time

import typer
from caesura.lang import Engine, Tool, assistant, connect, function, gen, get_server_info, system, user
from caesura.runtime.embedded.tools import Encyclopedia, calculate, convert
from rich import print

BOOK = Encyclopedia(3)
TOOLS = [
    Tool(calculate, name="calculator", description="Evaluate an arithmetic expression."),
    *(Tool(function) for function in (BOOK.lookup, convert)),
]
RULES = "You work for a small shop and help its staff. Be exact and short. Never guess a number. Reply in one sentence."
REQUEST = (
    f"What is 4827 * 396, who is the mayor of {BOOK.towns[0]}, what is 12.5 km in miles, "
    f"and in which town was {BOOK.people[0]} born?"
)


@function(tools=TOOLS)
def work(s, request: str = REQUEST):
    s += system(RULES)
    planner, *_ = s.fork(1)
    planner += user(f"Split this into separate questions: {request}")
    planner += assistant(
        gen("plan", regex=r"1\. [^\n]{3,200}(\n[2-6]\. [^\n]{3,200}){0,5}", max_tokens=200, temperature=0)
    )
    questions = re.findall(r"^\d\. (.*)", planner["plan"], re.MULTILINE)
    agents = s.fork(len(questions))
    agents += [user(question) for question in questions]
    agents += assistant(gen("answer", tools=TOOLS, max_tokens=96, temperature=0))
    agents.join()
    planner.role("tool", "\n".join(f"{i}. {answer}" for i, answer in enumerate(s["answer"], 1)))
    planner += assistant(gen("summary", max_tokens=200, temperature=0))
    return questions, planner["summary"]


def main(request: str = REQUEST, url: str = "", model: str = ""):
    """Do all that is asked; --url names a server, --model a checkpoint, otherwise the embedded model works."""
    with connect(url) if url else Engine(model or None) as backend:
        before, started = get_server_info(backend)["tokens_computed"], time.perf_counter()
        state = work.run(request, backend=backend)
        questions, summary = state.ret_value
        seconds = time.perf_counter() - started
        computed = get_server_info(backend)["tokens_computed"] - before
    print(f"[bold]{request}")
    for question, answer in zip(questions, state["answer"], strict=True):
        print(f"  {question} [green]{answer}[/]")
    print(f"[bold green]{summary}[/]\n")
    print(state.trace().tree())
    print(f"[dim]prompts of {state.usage().prompt_tokens} tokens, {computed} tokens computed in {seconds:.1f} s[/]")
    return state


if __name__ == "__main__":
    typer.run(main)
