"""What happens at a pause: three agents on a pool too small for them, in simulated time.

    python examples/pause_timeline.py [policy]

The engine loop, radix tree, ledger and scheduler are the real ones; only the model (`SimExecutor`) and the clock
(`VirtualClock`) are simulated, so it runs in a blink and prints the same every time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer
from caesura.runtime.clock import VirtualClock
from caesura.runtime.engine import Engine
from caesura.runtime.executors.sim import SimExecutor
from caesura.runtime.generation import TokenChunk
from caesura.runtime.sim import Simulation, generation
from caesura.runtime.trace import state_of
from caesura.scheduler.context import Call
from caesura.scheduler.policies import make_policy
from caesura.scheduler.profile import CostProfile
from caesura.scheduler.types import ContextId, StepPlan, StepResult

# a 6B model on one GPU: 10 ms a step, 0.05 ms a token; a copy of 100 tokens takes 4.6 ms
PROFILE = CostProfile(0.010, 0.00005, 1e-9, 0.0, 0.000046, 384)
SHARED = [1] * 96  # the system prompt all three begin with
AGENTS = {  # name: start, own prompt tokens, tool, seconds the tool takes, tokens it returns
    "A": (0.0, 160, "search", 3.0, 40),
    "B": (0.0, 64, "shell", 0.8, 24),
    "C": (0.4, 240, "search", 2.0, 40),
}


class Agent:
    """Prompt, eight tokens, one tool call, eight more tokens."""

    def __init__(self, timeline: Timeline, name: str) -> None:
        self.timeline, self.name = timeline, name
        _, own, self.tool, self.tool_s, self.result_tokens = AGENTS[name]
        self.prompt = SHARED + [2 + ord(name)] * own

    def start(self) -> None:
        self.id = self.timeline.engine.open()
        self.timeline.names[self.id] = self.name
        self._generate(self.prompt, self._call)

    def _generate(self, tokens: list[int], then: Callable[[], None]) -> None:
        engine = self.timeline.engine
        engine.append(self.id, tokens)

        def sink(chunk: TokenChunk) -> None:
            if chunk.finish is not None:
                self.timeline.sim.after(0.0, then)

        engine.generate(self.id, generation(engine, self.id, 8, sink))

    def _call(self) -> None:
        self.timeline.engine.pause(self.id, [Call(self.tool, expected_s=self.tool_s)])
        self.timeline.sim.after(self.tool_s, lambda: self._generate([3] * self.result_tokens, self._leave))

    def _leave(self) -> None:
        self.timeline.engine.close(self.id)


class Timeline:
    """Prints a line whenever some context's state changes, and every decision with its three costs."""

    def __init__(self, policy: str) -> None:
        self.clock = VirtualClock()
        executor = SimExecutor(PROFILE, self.clock, page_size=16, num_device_pages=32, num_host_pages=64)
        self.engine = Engine(executor, make_policy(policy), PROFILE, self.clock)
        self.engine.observers.append(self)
        self.sim = Simulation(self.engine, self.clock)
        self.names: dict[ContextId, str] = {}
        self.before = ""

    def on_step(self, engine: Engine, plan: StepPlan, result: StepResult) -> None:
        for decision in plan.decisions:
            costs = decision.costs
            print(
                f"{decision.now:6.3f} s  {self.names[decision.context_id]}: {decision.action.value.upper()} "
                f"{decision.affected_tokens} of {decision.context_tokens} tokens - {decision.reason}\n"
                f"          preserve {costs.preserve_token_s:.1f}, swap {costs.swap_token_s:.1f}, "
                f"discard {costs.discard_token_s:.1f} token-seconds"
            )
        computed = engine.ledger.computed
        states = "  ".join(
            f"{self.names[context.id]} {state_of(context):<9} {computed(context.id):>3}/{context.num_tokens:<3}"
            for context in engine.scheduler.contexts.values()
        )
        shown = "".join(letter for letter in states if not letter.isdigit())
        if shown != self.before:
            ledger = engine.ledger
            print(f"{self.clock.now():6.3f} s  free {ledger.free_pages + ledger.evictable_pages:>2} pages  {states}")
            self.before = shown


def main(policy: Annotated[str, typer.Argument(help="See `caesura run --help`.")] = "min_waste") -> None:
    """Three agents on a pool too small for them, under one policy."""
    try:
        timeline = Timeline(policy)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    for name, (start_s, *_) in AGENTS.items():
        timeline.sim.after(start_s, Agent(timeline, name).start)
    timeline.sim.run()
    account = timeline.engine.scheduler.meter
    print(
        f"{policy}: {timeline.clock.now():.3f} s, {account.tokens_computed} tokens computed, "
        f"{account.tokens_recomputed} of them again, {account.pages_out + account.pages_in} pages copied"
    )


if __name__ == "__main__":
    typer.run(main)
