"""300 seeds of agents with faults: nobody waits for ever, every page comes back, no answer is touched."""

from __future__ import annotations

import pytest
from caesura.scheduler.policies import POLICIES

from tests.sim.agents import World, populate

SEEDS = 300


@pytest.mark.parametrize("block", range(10))
def test_faults(block: int) -> None:
    names = sorted(POLICIES)
    for seed in range(block * SEEDS // 10, (block + 1) * SEEDS // 10):
        world = World(
            names[seed % len(names)],
            seed,
            page_size=(1, 2, 4, 16)[seed % 4],
            device_pages=(160, 70, 40, 12)[seed % 4],
            host_pages=(0, 3, 20, 200)[seed // 4 % 4],  # none, full at once, some, plenty
            slow=(1.0, 50.0, 1000.0)[seed % 3],
            max_running=(1, 8)[seed % 2],
            share=seed % 5 != 0,
            check_every=7 if seed % 10 else 1,
        )
        populate(world, 8, faults=0.15)
        world.settle()
        assert world.finished + world.lost > 0


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_crowd_on_two_small_tiers(policy: str) -> None:
    for seed in range(4):
        world = World(policy, 1000 + seed, device_pages=60, host_pages=(25, 60)[seed % 2], slow=20.0, check_every=9)
        populate(world, 60, within_s=0.5)
        world.settle()
        assert world.finished >= 60
