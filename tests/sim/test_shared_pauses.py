"""Pauses of contexts that share: what all have let go of goes, and nobody is ranked or counted twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from caesura.runtime.clock import VirtualClock
from caesura.runtime.engine import Engine
from caesura.runtime.executors.sim import SimExecutor
from caesura.runtime.generation import TokenChunk
from caesura.runtime.sim import Simulation, generation
from caesura.scheduler.context import Call
from caesura.scheduler.policies import make_policy
from caesura.scheduler.policies.admission_only import AdmissionOnly
from caesura.scheduler.policies.base import Choice, PausePolicy, Take, View
from caesura.scheduler.policies.min_waste import MinWaste
from caesura.scheduler.profile import GPT_J_6B_A100
from caesura.scheduler.scheduler import SchedulerConfig
from caesura.scheduler.types import Action, ContextId, MoveKind

PAGE = 16


def engine(
    policy: PausePolicy, *, pages: int = 512, host_pages: int = 2048, max_running: int = 64
) -> tuple[Engine, Simulation]:
    clock = VirtualClock()
    executor = SimExecutor(GPT_J_6B_A100, clock, num_device_pages=pages, num_host_pages=host_pages, page_size=PAGE)
    running = Engine(executor, policy, GPT_J_6B_A100, clock, SchedulerConfig(512, max_running))
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


def test_no_more_are_copied_in_than_can_run() -> None:
    running, simulation = engine(make_policy("swap"), max_running=2)
    contexts = []
    for number in range(20):
        context = running.open()
        running.append(context, [(number * 7 + place) % 60 for place in range(64)])
        running.prefill(context, lambda _: None)
        simulation.run()
        running.pause(context, [Call("t")])
        simulation.run()
        contexts.append(context)
    assert not any(running.ledger.held_tokens(context) for context in contexts)
    for context in contexts:
        running.generate(context, generation(running, context, 4, lambda _: None))
    coming = [move for move in running.step().moves if move.kind is MoveKind.IN]
    assert 0 < len(coming) <= 2
    simulation.run()
    running.check()


def test_infercept_copies_what_hides_behind_the_coming_step() -> None:
    """However long the prompt is of which that step computes a chunk."""
    running, simulation = engine(make_policy("infercept_oracle"), pages=2000)
    context = running.open()
    running.append(context, list(range(4000)))
    running.prefill(context, lambda _: None)
    simulation.run()
    other = running.open()
    running.append(other, [7] * 20_000)
    running.prefill(other, lambda _: None)
    running.step()
    running.pause(context, [Call("person", true_s=60.0)])
    plan = running.step()
    copied = sum(len(move.source) for move in plan.moves) * PAGE
    hidden = GPT_J_6B_A100.hidden_tokens(plan.num_query_tokens)
    assert hidden - PAGE < copied <= hidden + PAGE


@pytest.mark.parametrize("soon", [0, 1])
def test_who_says_that_it_will_soon_be_back_keeps_its_memory(soon: int) -> None:
    """Two wait for the same tool; a second later one has nearly done, the other has hardly begun."""
    running, simulation = engine(make_policy("min_waste"), pages=64, host_pages=0)
    contexts = []
    for number in range(2):
        context = running.open()
        generate(running, context, [number] * (24 * PAGE), 1)
        simulation.run()
        running.pause(context, [Call("build")])
        contexts.append(context)
    simulation.clock.advance_to(simulation.clock.now() + 1.0)
    for number, context in enumerate(contexts):
        running.report(context, 0.9 if number == soon else 0.01)
        running.report(context, 0.5, call=1)  # no such call
        running.pause(context, [Call("build", expected_s=3.0)])  # said again, now with a hint: still the same pause
    generate(running, running.open(), [9] * (24 * PAGE), 1)
    simulation.run()
    held = [running.ledger.held_tokens(context) for context in contexts]
    assert held[soon] > 23 * PAGE > held[1 - soon]
    assert running.decisions(contexts[1 - soon])[-1].expected_remaining_s > 50
    running.resume(contexts[soon])
    running.report(contexts[soon], 0.5)  # too late
    running.check()


@pytest.mark.parametrize("scores", [False, True])
def test_who_shares_a_run_that_is_brought_back_computes_its_own_last_row(scores: bool) -> None:
    """Both have all of their KV on the host when they go on; what the first brings back is all that the second has."""
    running, simulation = engine(make_policy("swap"), pages=32, max_running=2)
    parent = running.open()
    running.append(parent, list(range(2 * PAGE)))
    running.prefill(parent, lambda _: None)
    simulation.run()
    children = [running.fork(parent) for _ in range(2)]
    running.close(parent)
    for child in children:
        running.pause(child, [Call("t")])
    simulation.run()
    assert [running.ledger.held_tokens(child) for child in children] == [0, 0]
    ended: list[object] = []

    def told(chunk: TokenChunk) -> None:
        if chunk.finish is not None:
            ended.append(chunk.finish.reason)

    bystander = running.open()
    running.append(bystander, [7] * 20)
    running.generate(bystander, generation(running, bystander, 30, told))
    running.step()
    for child in children:
        if scores:
            running.score(child, 2, lambda found: ended.append(len(found)))  # type: ignore[arg-type]
        else:
            running.generate(child, generation(running, child, 3, told))
    simulation.run()
    assert sorted(map(str, ended)) == (["30", "30", "length"] if scores else ["length"] * 3)
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


def test_what_is_left_of_one_who_was_taken_in_part_is_there_for_the_next() -> None:
    """50 pages of one paused context and 13 free ones, for two that want 20 each in the same step."""
    running, simulation = engine(make_policy("min_waste"), pages=64, host_pages=0)
    context = running.open()
    generate(running, context, [1] * (50 * PAGE - 4), 1)
    simulation.run()
    running.pause(context, [Call("t")])
    for number in range(2):
        generate(running, running.open(), [100 + number] * (20 * PAGE - 4), 1)
    plan = running.step()
    assert len(plan.slices) == 2
    assert not plan.preempted
    simulation.run()
    running.check()


def test_who_was_taken_in_part_is_reviewed_again() -> None:
    class Watchful(PausePolicy):
        name = "watchful"
        on_demand = True
        review_every_s = 0.0

        def __init__(self) -> None:
            super().__init__()
            self.reviewed: list[int] = []  # tokens of the context, at each look

        def review(self, view: View) -> list[Choice]:
            self.reviewed += [paused.held_tokens for paused in view.paused if paused.tool]
            return [
                Choice(paused.id, Action.PRESERVE, view.costs(paused), "for now")
                for paused in view.paused
                if paused.decided is None
            ]

    policy = Watchful()
    running, simulation = engine(policy, pages=64, host_pages=0)
    context = running.open()
    generate(running, context, [1] * (50 * PAGE - 4), 1)
    simulation.run()
    running.pause(context, [Call("t")])
    generate(running, running.open(), [2] * (20 * PAGE - 4), 3)
    simulation.run()
    assert policy.reviewed[0] > 49 * PAGE > policy.reviewed[-1] > 0
    assert [decision.action for decision in running.decisions(context)] == [Action.PRESERVE, Action.DISCARD]
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
