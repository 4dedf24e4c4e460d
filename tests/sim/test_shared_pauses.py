"""Pauses of contexts that share: what all have let go of goes, and nobody is ranked or counted twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from caesura.runtime.clock import VirtualClock
from caesura.runtime.engine import Engine
from caesura.runtime.executors.sim import SimExecutor
from caesura.runtime.sim import Simulation, generation
from caesura.scheduler.context import Call
from caesura.scheduler.policies import make_policy
from caesura.scheduler.policies.admission_only import AdmissionOnly
from caesura.scheduler.policies.base import PausePolicy, Take, View
from caesura.scheduler.policies.min_waste import MinWaste
from caesura.scheduler.profile import GPT_J_6B_A100
from caesura.scheduler.types import ContextId

PAGE = 16


def engine(policy: PausePolicy, *, pages: int = 512, host_pages: int = 2048) -> tuple[Engine, Simulation]:
    clock = VirtualClock()
    executor = SimExecutor(GPT_J_6B_A100, clock, num_device_pages=pages, num_host_pages=host_pages, page_size=PAGE)
    running = Engine(executor, policy, GPT_J_6B_A100, clock)
    return running, Simulation(running, clock)


def generate(running: Engine, context: ContextId, tokens: list[int], count: int) -> None:
    running.append(context, tokens)
    running.generate(context, generation(running, context, count, lambda _: None))


@pytest.mark.parametrize("policy", ["swap", "swap_blocking", "infercept", "improved_discard"])
def test_the_last_of_those_who_share_a_run_takes_it_along(policy: str) -> None:
    running, simulation = engine(make_policy(policy))
    parent = running.open()
    generate(running, parent, [1] * 4000, 1)
    simulation.run()
    child = running.fork(parent)
    for context in (parent, child):
        generate(running, context, [context] * 64, 20)
        simulation.run()
    for context in (parent, child):
        running.pause(context, [Call("t")])
    bystander = running.open()  # without steps nobody would look at the pauses
    generate(running, bystander, [9] * 40, 2000)
    simulation.run()
    assert running.ledger.held_tokens(parent) == running.ledger.held_tokens(child) == 0
    for context in (parent, child):
        running.resume(context)
        generate(running, context, [7], 4)
    simulation.run()
    running.check()


def test_paused_contexts_are_ranked_once_a_step() -> None:
    class Counting(MinWaste):
        rankings = 0

        def reclaim(self, view: View, wanted_pages: int) -> Iterator[Take]:
            self.rankings += 1
            return super().reclaim(view, wanted_pages)

    policy = Counting()
    running, simulation = engine(policy, pages=81)
    for number in range(20):  # that fill the pool
        context = running.open()
        generate(running, context, [number] * 60, 1)
        simulation.run()
        running.pause(context, [Call("t")])
    for number in range(10):  # that all want some of it
        generate(running, running.open(), [100 + number] * 20, 1)
    before = policy.rankings
    plan = running.step()
    assert policy.rankings == before + 1
    assert len(plan.slices) == 10  # and each got it
    simulation.run()
    running.check()


def test_a_program_is_active_until_its_last_context_is_closed() -> None:
    policy = make_policy("admission_only")
    assert isinstance(policy, AdmissionOnly)
    running, simulation = engine(policy)
    for number in range(40):  # far more than the window has places
        root = running.open()
        generate(running, root, [number] * 40, 2)
        simulation.run()
        branch = running.fork(root)
        running.close(root)
        generate(running, branch, [number] * 8, 2)
        simulation.run()
        running.close(branch)
    outcome: list[object] = []
    last = running.open()
    running.append(last, [3] * 40)
    running.prefill(last, outcome.append)
    simulation.run()
    assert outcome == [40]
