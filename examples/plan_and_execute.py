"""Plan and execute: a planner orders the parts of a request, sub-agents do them at once, all answers come back.

The sub-agents are forks of one desk: its instructions and tools, the longest part of what they read, are computed
once and shared by all. Each works on one question and pauses at its tools; the trace shows them side by side.

    python examples/plan_and_execute.py
"""

import re

import typer
from caesura.lang import (
    Engine,
    Tool,
    assistant,
    assistant_begin,
    assistant_end,
    connect,
    function,
    gen,
    select,
    system,
    user,
)
from caesura.runtime.embedded.tools import calculate
from rich import print

TOOLS = [Tool(calculate, name="calculator", description="Evaluate an arithmetic expression.")]
RULES = "You work for a small shop and help its staff. Be exact and short. Never guess a number. Reply in one sentence."
REQUEST = "What is 4827 * 396, what is 51 + 1818, what is 9036 / 36, and what is 7001 - 4823?"


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
    s += user(f"In which order? {request}")
    left = [f"{part[0].upper()}{part[1:]}?" for part in re.split(r", (?:and )?", request.rstrip("?"))]
    plan: list[str] = []
    s += assistant_begin()
    while left:  # the model says what comes next; the choices see to it that nothing is lost or invented
        s += select(f"step{len(plan)}", left) + "\n"
        plan.append(s[f"step{len(plan)}"])
        left.remove(plan[-1])
    s += assistant_end()
    agents = desk.run(plan)
    s.role("tool", "\n".join(f"{i}. {answer}" for i, answer in enumerate(agents.ret_value, 1)))
    return plan, agents


def main(request: str = REQUEST, url: str = "", model: str = ""):
    """Do all that is asked; --url names a server, --model a checkpoint, otherwise the embedded model works."""
    with connect(url) if url else Engine(model or None) as backend:
        state = work.run(request, backend=backend)
        questions, agents = state.ret_value
        print(f"[bold]{request}")
        for question, answer in zip(questions, agents["answer"], strict=True):
            print(f"  {question} [green]{answer}[/]")
        print()
        print(state.trace().tree(), agents.trace().tree())
        usage = agents.usage()
        print(
            f"[dim]the sub-agents read {usage.prompt_tokens} tokens; {usage.cached_tokens} of them were shared or kept"
        )
    return state


if __name__ == "__main__":
    typer.run(main)
