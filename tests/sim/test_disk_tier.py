"""The disk tier under whole agents: whatever moves where and whatever fails on the way, every token is right."""

from __future__ import annotations

from dataclasses import replace

import pytest
from caesura.scheduler.policies import POLICIES
from caesura.scheduler.types import StepPlan

from tests.sim.agents import PROFILE, World, populate
from tests.sim.test_engine_promises import Watcher

WITH_DISK = replace(PROFILE, disk_base_s=0.0002, disk_token_s=0.00002)
SWAPPING = sorted(name for name, policy in POLICIES.items() if policy.uses_host)


def run(policy: str, seed: int, **fields: object) -> World:
    world = World(policy, seed, device_pages=24, slow=3.0, profile=WITH_DISK, **fields)  # type: ignore[arg-type]
    populate(world, 10, faults=0.02)
    world.settle()
    return world


@pytest.mark.parametrize("policy", SWAPPING)
@pytest.mark.parametrize(("host_pages", "disk_pages"), [(8, 60), (0, 60), (8, 12)])
def test_every_policy_that_swaps_uses_it(policy: str, host_pages: int, disk_pages: int) -> None:
    to_disk = from_disk = 0
    for seed in range(3):
        meter = run(policy, seed, host_pages=host_pages, disk_pages=disk_pages).engine.scheduler.meter
        to_disk, from_disk = to_disk + meter.pages_to_disk, from_disk + meter.pages_from_disk
        assert not meter.copies_failed
    assert to_disk and from_disk


@pytest.mark.parametrize("host_pages", [0, 8])
def test_a_disk_that_fails_costs_time_and_no_token(host_pages: int) -> None:
    """``settle`` compares every token, and looks for pages and contexts left behind."""
    failed = finished = 0
    for seed in range(12):
        world = run("min_waste", seed, host_pages=host_pages, disk_pages=60, disk_faults=0.2)
        failed += world.engine.scheduler.meter.copies_failed
        finished += world.finished
    assert failed
    assert finished


def test_after_a_failed_write_the_disk_is_written_no_more() -> None:
    world = World("swap", 1, device_pages=24, host_pages=0, disk_pages=60, disk_faults=1.0, profile=WITH_DISK)
    plans: list[StepPlan] = []

    def look(plan: StepPlan) -> None:
        if not world.engine.ledger.disk_writable:
            plans.append(plan)

    world.engine.observers.append(Watcher(look))
    populate(world, 10)
    world.settle()
    assert world.engine.scheduler.meter.copies_failed
    assert not world.engine.ledger.disk_writable
    assert len(plans) > 1
    assert not any(plan.moves for plan in plans[1:])  # in the first one seen the failure became known
    assert world.finished == len(world.transcripts) > 0


def test_a_disk_slower_than_computing_is_left_alone() -> None:
    slow = replace(PROFILE, disk_base_s=1.0, disk_token_s=1.0)
    world = World("min_waste", 3, device_pages=24, host_pages=6, disk_pages=60, profile=slow)
    populate(world, 10)
    world.settle()
    assert world.engine.scheduler.meter.pages_to_disk == 0


def test_what_was_wanted_longest_ago_moves_down_and_makes_room() -> None:
    world = run("swap", 2, host_pages=8, disk_pages=60)
    meter = world.engine.scheduler.meter
    without = run("swap", 2, host_pages=8, disk_pages=0)
    assert meter.pages_to_disk > 0
    assert meter.tokens_recomputed < without.engine.scheduler.meter.tokens_recomputed
