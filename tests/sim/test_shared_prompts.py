"""Contexts that arrive together with one beginning: it is computed once, and nobody waits for ever."""

from __future__ import annotations

from typing import Any

import pytest
from caesura.runtime.sim import generation
from caesura.scheduler.types import StepPlan

from tests.sim.agents import World

SHARED = [number % 7 + 1 for number in range(40)]  # ten pages
COUNT = 6


class Plans:
    """Every step's plan."""

    def __init__(self) -> None:
        self.all: list[StepPlan] = []

    def on_step(self, engine: Any, plan: StepPlan, result: Any) -> None:
        self.all.append(plan)

    @property
    def prompt_rows(self) -> int:
        return sum(piece.num_tokens for plan in self.all for piece in plan.slices if piece.num_tokens > 1)


def arrive(world: World, prompts: list[list[int]], namespaces: list[str] | None = None) -> Plans:
    """All prompts at once; every context generates three tokens and is closed."""
    plans, engine = Plans(), world.engine
    engine.observers.append(plans)
    for number, prompt in enumerate(prompts):
        context = engine.open(namespaces[number] if namespaces else "")
        engine.append(context, prompt)
        got: list[int] = []

        def take(chunk: Any, context: Any = context, prompt: Any = prompt, got: list[int] = got) -> None:
            got.extend(chunk.token_ids)
            if chunk.finish is not None:
                world.expect(context, prompt, got)
                world.sim.at(world.clock.now(), lambda: world.engine.close(context))

        engine.generate(context, generation(engine, context, 3, take))
    return plans


def own_ends(count: int = COUNT) -> list[list[int]]:
    return [[*SHARED, *([10 + number] * 6)] for number in range(count)]


@pytest.mark.parametrize("max_step_tokens", [12, 64, 400])
def test_what_several_have_in_common_is_computed_once(max_step_tokens: int) -> None:
    world = World("min_waste", device_pages=200, max_step_tokens=max_step_tokens)
    plans = arrive(world, own_ends())
    world.settle()
    assert plans.prompt_rows <= len(SHARED) + COUNT * 6
    if max_step_tokens == 400:
        assert [len(plan.slices) for plan in plans.all[:2]] == [1, COUNT], "they wait for one step"


def test_equal_prompts_leave_each_its_last_page() -> None:
    world = World("min_waste", device_pages=200, max_step_tokens=400)
    plans = arrive(world, [SHARED] * COUNT)
    world.settle()
    assert plans.prompt_rows <= len(SHARED) + (COUNT - 1) * world.page_size


def test_other_namespaces_and_other_beginnings_do_not_wait() -> None:
    world = World("min_waste", device_pages=200, max_step_tokens=400)
    plans = arrive(world, [SHARED] * 3, ["one", "two", "three"])
    world.settle()
    assert len(plans.all[0].slices) == 3
    world = World("min_waste", device_pages=200, max_step_tokens=400)
    plans = arrive(world, [[number] * 40 for number in (1, 2, 3)])
    world.settle()
    assert len(plans.all[0].slices) == 3


def test_a_chain_of_beginnings_on_a_short_pool_ends() -> None:
    """Every prompt goes on from another one, and the pool holds two of them."""
    world = World("discard", device_pages=30, host_pages=0, max_step_tokens=16, max_running=4)
    arrive(world, [SHARED[: 8 * length] for length in (5, 1, 4, 2, 3)] * 3)
    world.settle()
