"""Plan and execute: a planner splits the work, sub-agents do the parts at once, the planner puts the answers together.

The sub-agents are forks of one desk: its instructions and tools, the longest part of what they read, are computed once
and shared by all. Each works on one question, with tools, pausing when it must; the trace shows them side by side.

    python examples/plan_and_execute.py
"""

import re

import typer
from caesura.lang import Engine, Tool, assistant, connect, function, gen, system, user
from caesura.runtime.embedded.tools import Encyclopedia, calculate, convert
from rich import print
from rich.markup import escape

BOOK = Encyclopedia(3)
TOOLS = [
    Tool(calculate, name="calculator", description="Evaluate an arithmetic expression."),
    *(Tool(function) for function in (BOOK.lookup, convert)),
]
RULES = "You work for a small shop and help its staff. Be exact and short. Never guess a number. Reply in one sentence."
PLAN = r"1\. [^\n]{3,120}(\n[2-6]\. [^\n]{3,120}){0,5}"
REQUEST = (
    f"Who is the mayor of {BOOK.towns[1]}, what is 12.5 km in miles, "
    f"in which town was {BOOK.people[1]} born, and what is 4827 * 396?"
)


@function(tools=TOOLS)
def desk(s, questions: list[str]):
    s += system(RULES)
    agents = s.fork(len(questions))
    agents += [user(question) for question in questions]
    agents += assistant(gen("answer", tools=TOOLS, max_tokens=96, temperature=0))
    agents.join()
    return s["answer"]


@function
def work(s, request: str = REQUEST):
    s += user(f"Split this into separate questions: {request}")
    s += assistant(gen("plan", regex=PLAN, max_tokens=200, temperature=0))
    questions = re.findall(r"^\d\. (.*)", s["plan"], re.MULTILINE)
    agents = desk.run(questions)
    s.role("tool", "\n".join(f"{i}. {answer}" for i, answer in enumerate(agents.ret_value, 1)))
    s += assistant(gen("summary", max_tokens=200, temperature=0))
    return questions, agents


def main(request: str = REQUEST, url: str = "", model: str = ""):
    """Do all that is asked; --url names a server, --model a checkpoint, otherwise the embedded model works."""
    with connect(url) if url else Engine(model or None) as backend:
        state = work.run(request, backend=backend)
        questions, agents = state.ret_value
        print(f"[bold]{escape(request)}")
        for question, answer in zip(questions, agents["answer"], strict=True):
            print(f"  {escape(question)} [green]{escape(answer)}[/]")
        print(f"[bold green]{escape(state['summary'])}[/]\n")
        print(state.trace().tree(), agents.trace().tree())
        usage = agents.usage()
        print(
            f"[dim]the sub-agents read {usage.prompt_tokens} tokens; {usage.cached_tokens} of them were shared or kept"
        )
    return state


if __name__ == "__main__":
    typer.run(main)
