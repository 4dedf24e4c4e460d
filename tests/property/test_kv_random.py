"""A hundred thousand seeded operations on the ledger, with the contents of every page simulated beside it."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from caesura.scheduler.types import Action, ContextId

from tests.property.kv_model import KVModel

OPERATIONS = 500
SEEDS = 100
INTERESTING = {
    "closed while loading",
    "copy down",
    "copy in",
    "copy out",
    "extend refused",
    "failed down",
    "failed in",
    "failed out",
    "load",
    "lost before commit",
    "reclaim discard as discard",
    "reclaim discard as swap",
    "reclaim release as release",
    "reclaim swap as discard",
    "reclaim swap as swap",
    "sink",
    "spoiled",
    "spoiled under a copy",
    "wait for a sinking run",
}


ACTIONS = (Action.SWAP, Action.DISCARD, Action.RELEASE, Action.PRESERVE)


def random_tokens(rng: random.Random, page_size: int) -> list[int]:
    """Runs of one letter, so that whole pages are often equal although there are only two letters."""
    return [rng.randrange(2)] * rng.randint(1, 2 * page_size + 1) + [rng.randrange(2) for _ in range(rng.randrange(3))]


class RandomDriver:
    """Plain seeded operations on a model, as weighted as a busy server would weight them."""

    def __init__(self, model: KVModel, rng: random.Random, max_contexts: int = 8) -> None:
        self.model = model
        self.rng = rng
        self.max_contexts = max_contexts
        self.verbs: list[tuple[Callable[[ContextId], object], int]] = [
            (self._plan, 30),
            (self._execute, 14),
            (self._append, 8),
            (self._open, 8),
            (self._pause, 12),
            (self._fork, 5),
            (self._reclaim, 14),
            (self._arrive, 4),
            (self._acknowledge, 10),
            (self._copy_out, 4),
            (self._swap_out, 8),
            (self._sink, 16),
            (self._fail, 4),
            (lambda context: model.ledger.write_back(context), 4),
            (self._truncate, 4),
            (lambda context: model.spoil(context, rng.randrange(64)), 2),
            (model.release, 2),
            (model.discard, 2),
            (lambda context: model.close(context, keep_cached=rng.random() < 0.7), 6),
            (lambda _: model.ledger.flush() if rng.random() < 0.1 else None, 1),
            (lambda _: model.squeeze(rng.choice(ACTIONS[:3])) if rng.random() < 0.5 else None, 1),
        ]

    def run(self, num_operations: int, full_every: int) -> None:
        verbs, weights = zip(*self.verbs, strict=True)
        for number, verb in enumerate(self.rng.choices(verbs, weights, k=num_operations)):
            context = self._pick()
            verb(context)
            self.model.after(context, full=number % full_every == 0)

    def _pick(self) -> ContextId:
        if not self.model.subjects:
            self._open(ContextId(0))
        return self.rng.choice(list(self.model.subjects))

    def _open(self, context: ContextId) -> None:
        rng, model = self.rng, self.model
        if len(model.subjects) >= self.max_contexts:
            model.close(context)
        tokens = random_tokens(rng, model.size)
        if model.subjects and rng.random() < 0.6:
            other = rng.choice(list(model.subjects.values()))
            tokens = other.tokens[: rng.randint(0, len(other.tokens))] + tokens
        model.open(0 if rng.random() < 0.8 else 1, tokens)

    def _append(self, context: ContextId) -> None:
        if context not in self.model.planned:
            self.model.append(context, random_tokens(self.rng, self.model.size))

    def _plan(self, context: ContextId) -> None:
        whole = self.rng.random() < 0.6
        num_tokens = self.model.room_tokens if whole else self.rng.randint(1, 2 * self.model.size)
        self.model.plan(context, num_tokens, load=self.rng.random() < 0.7)

    def _execute(self, _: ContextId) -> None:
        self.model.execute(frozenset([0]) if self.rng.random() < 0.05 else frozenset())

    def _pause(self, context: ContextId) -> None:
        self.model.pause(context)
        if self.rng.random() < 0.1:
            self.model.pause(context)

    def _fork(self, context: ContextId) -> None:
        if len(self.model.subjects) >= self.max_contexts:
            return
        child = self.model.fork(context)
        if self.rng.random() < 0.7:  # both branches go on, in this step
            for branch in (context, child):
                self._append(branch)
                self._plan(branch)

    def _reclaim(self, _: ContextId) -> None:
        action = self.rng.choices(ACTIONS, (6, 3, 2, 1))[0]
        self.model.reclaim(self.rng.randrange(64), self.rng.randint(1, 6), action)

    def _arrive(self, _: ContextId) -> None:
        self.model.arrive(self.rng.randrange(8))

    def _acknowledge(self, _: ContextId) -> None:
        self.model.acknowledge(self.rng.randrange(8))

    def _swap_out(self, context: ContextId) -> None:
        """Most of a context goes to the host, and now and then at once."""
        self.model.pause(context)
        for number, segment in reversed([*enumerate(self.model.ledger.segments())]):
            if context in segment.holders:
                self.model.reclaim(number, segment.num_pages, Action.SWAP)
        if self.rng.random() < 0.5:
            self.model.settle_flights()

    def _sink(self, _: ContextId) -> None:
        self.model.sink()

    def _fail(self, _: ContextId) -> None:
        self.model.fail(2 * self.rng.randrange(32) if self.rng.random() < 0.3 else 1)

    def _copy_out(self, _: ContextId) -> None:
        self.model.copy_out(self.rng.randrange(64))

    def _truncate(self, context: ContextId) -> None:
        self.model.truncate(context, self.rng.randint(0, len(self.model.subjects[context].tokens)))


@pytest.mark.parametrize("page_size", [1, 2, 16])
def test_nothing_is_lost_or_overwritten(page_size: int) -> None:
    seen: dict[str, int] = {}
    for seed in range(SEEDS):
        rng = random.Random(page_size * 1_000 + seed)
        host_pages, disk_pages = rng.randint(0, rng.choice((4, 12))), rng.choice((0, 4, 16, 21, 40))
        model = KVModel(page_size, rng.randint(8, 40), host_pages, disk_pages)
        try:
            RandomDriver(model, rng).run(OPERATIONS, full_every=8)
            model.finish()
        except AssertionError as error:
            raise AssertionError(f"page size {page_size}, seed {seed}, operation {model.tick}: {error}") from error
        for event, count in model.seen.items():
            seen[event] = seen.get(event, 0) + count
    expected = INTERESTING if page_size == 1 else INTERESTING | {"copy-on-write", "shared unfinished page"}
    assert seen.keys() >= expected, f"never happened: {expected - seen.keys()}"
