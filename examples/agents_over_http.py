"""A fleet of agents that know nothing of Caesura: plain OpenAI chat requests, a tool, and time passing in the tool.

Start ``caesura serve --kv-tokens 8192`` in one terminal, this in another, and look at http://127.0.0.1:30000/dashboard
or ``caesura top``: every tool call is a pause, and its memory is preserved, swapped or discarded as memory is wanted.

    python examples/agents_over_http.py --agents 12 --seconds 60
"""

from __future__ import annotations

import json
import math
import random
import threading
import time
import urllib.error
import urllib.request
from typing import Any

import typer
from caesura.runtime.embedded.calculator import CalculatorError, calculate
from caesura.runtime.embedded.chat import CALCULATOR_TOOL
from caesura.runtime.embedded.tasks import Split, make_tasks

TOOLS = {"calculator": (0.05, 0.5), "remote_calculator": (0.5, 4.0), "colleague": (4.0, 15.0)}  # seconds they take
NOTES = (
    "Prefer whole numbers where you can.", "The office closes at six.", "Answer in one line.", "Check units twice.",
    "Rounding is for the final answer only.", "Customers in the north pay in crowns.", "Be brief and exact.",
)  # fmt: skip


def ask(url: str, key: str, body: dict[str, Any]) -> dict[str, Any]:
    """One chat completion; returns the assistant's message."""
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        message: dict[str, Any] = json.load(answer)["choices"][0]["message"]
    return message


def use_tool(call: dict[str, Any], draw: random.Random, stop: threading.Event) -> str:
    """Run a tool: the real calculator, after the time such a service would take."""
    low, high = TOOLS.get(call["function"]["name"], (0.1, 1.0))
    stop.wait(math.exp(draw.uniform(math.log(low), math.log(high))))
    try:
        return str(calculate(json.loads(call["function"]["arguments"])["expression"]))
    except (CalculatorError, KeyError, ValueError) as error:
        return f"error: {error}"


def work(number: int, url: str, key: str, stop: threading.Event) -> None:
    """One agent: conversation after conversation, a few questions each, until it is told to stop."""
    draw = random.Random(number)
    name = sorted(TOOLS)[number % len(TOOLS)]
    tool = {"type": "function", "function": {**CALCULATOR_TOOL["function"], "name": name}}
    for round_number in range(1_000_000):
        own = [f"You are agent {number}.", *(draw.choice(NOTES) for _ in range(2 + 5 * (number % 3)))]
        notes = " ".join([*NOTES, *own])  # what all have in common comes first, so that they share its memory
        messages: list[dict[str, Any]] = [{"role": "system", "content": notes}]
        for task in make_tasks(1000 * number + round_number, 3, Split.HELD_OUT):
            messages.append({"role": "user", "content": task.question})
            for _ in range(4):
                if stop.is_set():
                    return
                body = {"messages": messages, "tools": [tool], "temperature": 0, "max_tokens": 96}
                message = ask(url, key, body)
                messages.append(message)
                if not message.get("tool_calls"):
                    break
                for call in message["tool_calls"]:
                    result = {"role": "tool", "tool_call_id": call["id"], "content": use_tool(call, draw, stop)}
                    messages.append(result)
            stop.wait(draw.uniform(0.1, 1.0))


def main(url: str = "http://127.0.0.1:30000", key: str = "", agents: int = 12, seconds: float = 60.0) -> None:
    """Run the fleet against the server at --url; --key is an API key, where it wants one."""
    stop, failed = threading.Event(), list[int]()

    def agent(number: int) -> None:
        try:
            work(number, url.rstrip("/"), key, stop)
        except urllib.error.URLError as error:
            print(f"agent {number}: {error}; is `caesura serve` running at {url}?")
            failed.append(number)
            stop.set()

    threads = [threading.Thread(target=agent, args=(number,), daemon=True) for number in range(agents)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    stop.wait(seconds)
    stop.set()
    for thread in threads:
        thread.join(timeout=30)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
