"""A hundred thousand seeded operations on the ledger, with the contents of every page simulated beside it."""

from __future__ import annotations

import random

import pytest

from tests.property.kv_model import KVModel, RandomDriver

OPERATIONS = 500
SEEDS = 100
INTERESTING = {
    "closed while loading",
    "copy in",
    "copy out",
    "extend refused",
    "load",
    "lost before commit",
    "reclaim discard as discard",
    "reclaim discard as swap",
    "reclaim release as release",
    "reclaim swap as discard",
    "reclaim swap as swap",
}


@pytest.mark.parametrize("page_size", [1, 2, 16])
def test_nothing_is_lost_or_overwritten(page_size: int) -> None:
    seen: dict[str, int] = {}
    for seed in range(SEEDS):
        rng = random.Random(page_size * 1_000 + seed)
        model = KVModel(page_size, rng.randint(8, 40), rng.randint(0, 12))
        try:
            RandomDriver(model, rng).run(OPERATIONS, full_every=8)
            model.finish()
        except AssertionError as error:
            raise AssertionError(f"page size {page_size}, seed {seed}, operation {model.tick}: {error}") from error
        for event, count in model.seen.items():
            seen[event] = seen.get(event, 0) + count
    expected = INTERESTING if page_size == 1 else INTERESTING | {"copy-on-write", "shared unfinished page"}
    assert seen.keys() >= expected, f"never happened: {expected - seen.keys()}"
