"""Programs that are never done do not keep a newcomer out for ever."""

from __future__ import annotations

import pytest
from caesura.runtime.clock import VirtualClock
from caesura.runtime.engine import Engine
from caesura.runtime.executors.sim import SimExecutor
from caesura.runtime.generation import TokenChunk
from caesura.runtime.sim import Simulation, generation
from caesura.scheduler.context import Call
from caesura.scheduler.policies import make_policy
from caesura.scheduler.policies.min_waste import STARVING_S
from caesura.scheduler.profile import GPT_J_6B_A100
from caesura.scheduler.scheduler import SchedulerConfig
from caesura.scheduler.types import ContextId

PROMPT_TOKENS, TURN_TOKENS, TOOL_S = 180, 40, 0.02


def test_a_newcomer_is_served_although_those_before_it_never_end() -> None:
    """Six programs of 14 pages each, on 40 pages, come back from every tool with the earlier arrival."""
    clock = VirtualClock()
    executor = SimExecutor(GPT_J_6B_A100, clock, num_device_pages=40, num_host_pages=200, check_kv=False)
    engine = Engine(executor, make_policy("min_waste"), GPT_J_6B_A100, clock)
    simulation = Simulation(engine, clock)

    def turn(context: ContextId) -> None:
        def ended(chunk: TokenChunk) -> None:
            if chunk.finish is not None:
                simulation.at(clock.now(), lambda: call(context))

        engine.generate(context, generation(engine, context, TURN_TOKENS, ended))

    def call(context: ContextId) -> None:
        engine.truncate(context, PROMPT_TOKENS)
        engine.pause(context, [Call("tool")])
        simulation.at(clock.now() + TOOL_S, lambda: turn(context))

    for number in range(6):
        context = engine.open()
        engine.append(context, [(number * 11 + place) % 60 for place in range(PROMPT_TOKENS)])
        turn(context)
    simulation.run(until_s=1.0)
    asked_s, served_s = clock.now(), []
    newcomer = engine.open()
    engine.append(newcomer, [(99 + place) % 60 for place in range(PROMPT_TOKENS)])
    engine.generate(newcomer, generation(engine, newcomer, 1, lambda _: served_s.append(clock.now())))
    simulation.run(until_s=asked_s + STARVING_S + 2.0)
    assert served_s, "the newcomer was never served"
    engine.check()


@pytest.mark.parametrize("prompt_tokens", [100, 140])
def test_who_is_preempted_keeps_its_place_and_waits_since_it_last_got_on(prompt_tokens: int) -> None:
    """16 pages for two, both growing. With 140 tokens the second gives way before it has read its prompt to the end."""
    clock = VirtualClock()
    executor = SimExecutor(GPT_J_6B_A100, clock, num_device_pages=16, num_host_pages=0)
    engine = Engine(executor, make_policy("lru"), GPT_J_6B_A100, clock, SchedulerConfig(max_step_tokens=16))
    first, second = engine.open(), engine.open()
    for context, tokens in ((first, 105), (second, prompt_tokens)):
        engine.append(context, [(context * 11 + place) % 60 for place in range(tokens)])
        engine.generate(context, generation(engine, context, 100, lambda _: None))
    asked_s, plan = clock.now(), engine.step()
    while second not in plan.preempted:
        plan = engine.step()
    state = engine.scheduler.contexts[second]
    assert state.submitted == asked_s < plan.now
    assert state.waiting_since == (plan.now if prompt_tokens == 100 else asked_s)
    engine.check()
