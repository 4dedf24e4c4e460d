"""A program that pauses: the model writes an expression, a tool computes it, the model goes on from the result."""

from caesura.lang import Engine, assistant, call_tool, function, gen, tool, user
from caesura.runtime.embedded.tools import calculate

CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "'


@tool
def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression."""
    return calculate(expression)


@function(tools=[calculator])
def solve(s, question="Mara has 318 boxes with 47 pens each. How many pens are there in total?"):
    s += user(question)
    s += assistant(CALL + gen("expression", stop='"', temperature=0) + '"}}\n</tool_call>')
    s.role("tool", call_tool("value", calculator, s["expression"]))  # the context pauses here
    s += assistant(gen("answer", temperature=0))


if __name__ == "__main__":
    with Engine() as engine:
        state = solve.run(backend=engine)
        print(state["expression"], "=", state["value"])
        print(state["answer"])
