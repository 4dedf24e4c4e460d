"""ReAct with `call_tool`: the program, not the runtime, reads what the model wants and calls the tool.

The model writes either a call or its answer. Each call pauses the context; its result is the next observation.
"""

import json
import sys

from caesura.lang import Engine, assistant, call_tool, function, gen, tool, user
from caesura.runtime.embedded.tools import calculate

QUESTION = "Add 4821 and 977, then multiply the result by 36."


@tool(timeout_s=5, retries=1)
def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression."""
    return calculate(expression)


def wanted(text: str) -> str | None:
    """The expression of a call in ``text``, None when there is no call."""
    _, tag, rest = text.partition("<tool_call>")
    if not tag:
        return None
    return json.loads(rest.partition("</tool_call>")[0])["arguments"]["expression"]


@function(tools=[calculator])
def react(s, question: str = QUESTION, max_steps: int = 4):
    s += user(question)
    for step in range(max_steps):
        s += assistant(gen(f"thought{step}", max_tokens=96, temperature=0))
        expression = wanted(s[f"thought{step}"])
        if expression is None:
            return s[f"thought{step}"]
        s.role("tool", call_tool(f"observation{step}", calculator, expression))
    return "no answer within the steps allowed"


if __name__ == "__main__":
    with Engine() as engine:
        state = react.run(*sys.argv[1:2], backend=engine)
        print(state.text())
        print("Returned:", state.ret_value)
