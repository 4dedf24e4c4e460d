"""The demo's workload: a fleet of agents that ask a calculator, drawn from a seed. The agent is a DSL program."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from caesura.lang import Tool, assistant, function, gen, system, user
from caesura.lang.backends.engine import EngineBackend, EngineSession
from caesura.lang.state import ProgramState
from caesura.runtime.embedded.calculator import CalculatorError, calculate
from caesura.runtime.embedded.tasks import Split, Task, check, make_tasks
from caesura.runtime.service import EngineService
from caesura.scheduler.types import ContextId

QUESTIONS = 3
MAX_ANSWER_TOKENS = 96
FAST_S = (0.05, 0.4)
SLOW_S = (0.4, 2.0)
SLOW_EVERY = 3  # every third agent works with the slow calculator, as if it were a remote service

HANDBOOK = (
    "You work for a small shop and help its staff with the books.",
    "You are a careful assistant that answers arithmetic questions.",
    "Use the calculator for every calculation.",
    "Never guess a number.",
    "Reply in one sentence.",
    "Treat every question on its own.",
    "The user may ask several questions in a row.",
    "Prices are in cents unless stated otherwise.",
    "Be exact and short.",
    "Always check numbers with the tool before answering.",
)
_NOTES = (
    "You are agent {n} of a fleet.",
    "Your working day ends at {n} o'clock.",
    "Rule {n}: write plain sentences.",
    "Today is a quiet day, so take your time.",
    "If the user greets you, greet back.",
    "You help with sums.",
    "Rule {n}: be exact and short.",
    "Rule {n}: never guess a number.",
)
NUM_NOTES = 32


@dataclass(frozen=True, slots=True)
class Agent:
    """One member of the fleet: what it is told, what it asks, and how long each call of its tool takes."""

    number: int
    system_text: str
    tasks: tuple[Task, ...]
    tool: str
    delays_s: tuple[float, ...]


def make_fleet(seed: int, count: int, questions: int = QUESTIONS) -> list[Agent]:
    """``count`` agents; the same arguments give the same fleet, tool durations included."""
    tasks = make_tasks(seed, count * questions, Split.HELD_OUT)
    fleet = []
    for number in range(1, count + 1):
        rng = random.Random(f"fleet/{seed}/{number}")
        notes = [f"You are agent {number} of a fleet."]
        notes += [rng.choice(_NOTES).format(n=rng.randrange(2, 10_000)) for _ in range(NUM_NOTES - 1)]
        slow = number % SLOW_EVERY == 0
        low, high = SLOW_S if slow else FAST_S
        # Log-uniform: most calls are short, some take long, as with real services.
        delays = tuple(math.exp(rng.uniform(math.log(low), math.log(high))) for _ in range(4 * questions))
        fleet.append(
            Agent(
                number,
                " ".join((*HANDBOOK, *notes)),
                tuple(tasks[(number - 1) * questions : number * questions]),
                "slow_calculator" if slow else "calculator",
                delays,
            )
        )
    return fleet


def calculator_of(agent: Agent) -> Tool:
    """The agent's calculator: the real one, after the delay drawn for this call."""
    calls = 0

    async def calculator(expression: str) -> str:
        nonlocal calls
        delay_s = agent.delays_s[calls % len(agent.delays_s)]
        calls += 1
        await asyncio.sleep(delay_s)
        try:
            return calculate(expression)
        except CalculatorError as error:
            return f"error: {error}"

    return Tool(calculator, name=agent.tool, description="Evaluate an arithmetic expression.", timeout_s=30.0)


@function
def work(s, system_text: str, questions: Sequence[str], tools: Sequence[Tool]):  # type: ignore[no-untyped-def]
    """The agent: several questions in a row in one context; it pauses whenever the model calls its tool."""
    s += system(system_text)
    for i, question in enumerate(questions):
        s += user(question)
        answer = gen(f"answer{i}", tools=tools or None, max_tokens=MAX_ANSWER_TOKENS, temperature=0.0)
        s += assistant(answer)


class AgentBackend(EngineBackend):
    """The engine, for one agent: notes which context is whose."""

    def __init__(self, service: EngineService, agent: int, roster: dict[ContextId, int]) -> None:
        super().__init__(service)
        self._agent = agent
        self._roster = roster

    async def open(self, *, namespace: str = "", deadline_s: float | None = None) -> EngineSession:
        handle = await self.service.open(namespace, deadline_s)
        self._roster[handle.id] = self._agent
        return EngineSession(self.service, handle)


class FleetRun:
    """The fleet at work on one engine."""

    def __init__(self, service: EngineService, fleet: Sequence[Agent], *, with_tool: bool) -> None:
        self.service = service
        self.fleet = fleet
        self.with_tool = with_tool
        self.roster: dict[ContextId, int] = {}
        self.states: list[ProgramState] = []

    def start(self, pause: Callable[[], None]) -> None:
        """Start every agent; ``pause`` is called between two of them."""
        for agent in self.fleet:
            self.states.append(
                work.run(
                    agent.system_text,
                    [task.question for task in agent.tasks],
                    [calculator_of(agent)] if self.with_tool else [],
                    backend=AgentBackend(self.service, agent.number, self.roster),
                )
            )
            pause()

    @property
    def done(self) -> bool:
        """Whether every agent has ended."""
        return len(self.states) == len(self.fleet) and all(state.done for state in self.states)

    def answered(self, agent: int) -> int:
        """How many of its questions an agent has answered."""
        if agent > len(self.states):
            return 0
        return sum(name.startswith("answer") for name in self.states[agent - 1].variables)

    def answers(self) -> list[list[str]]:
        """The answers of each agent, "" for what a failed one did not reach."""
        found = []
        for agent, state in zip(self.fleet, self.states, strict=True):
            variables = state.variables
            found.append([str(variables.get(f"answer{i}", "")) for i in range(len(agent.tasks))])
        return found

    def failures(self) -> list[str]:
        """What went wrong, one line for each agent that failed."""
        lines = []
        for agent, state in zip(self.fleet, self.states, strict=True):
            error = state.error()
            if error is not None:
                lines.append(f"agent {agent.number}: {error}")
        return lines

    def cancel(self) -> None:
        """End all agents."""
        for state in self.states:
            state.cancel()


def count_right(fleet: Sequence[Agent], answers: Sequence[Sequence[str]]) -> int:
    """How many answers are right."""
    return sum(
        check(task, answer)
        for agent, given in zip(fleet, answers, strict=True)
        for task, answer in zip(agent.tasks, given, strict=True)
    )
