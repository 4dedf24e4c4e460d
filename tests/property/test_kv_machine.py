"""Hypothesis looks for the shortest sequence of verbs that breaks the ledger with its three tiers."""

from __future__ import annotations

import pytest
from caesura.scheduler.types import Action, ContextId
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.property.kv_model import KVModel

INDEX = st.integers(0, 63)
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=5)


class LedgerMachine(RuleBasedStateMachine):
    """Every verb of the ledger in any order a scheduler could use; contents are checked after each."""

    page_size = 1

    @initialize(
        device_pages=st.integers(8, 40),
        host_pages=st.integers(0, 12),
        disk_pages=st.sampled_from((0, 3, 16, 41)),
        crowd=st.lists(st.tuples(TOKENS, st.booleans()), max_size=4),
    )
    def start(self, device_pages: int, host_pages: int, disk_pages: int, crowd: list[tuple[list[int], bool]]) -> None:
        """Some contexts have run already, each on top of the one before, and some of them are paused."""
        self.model = KVModel(self.page_size, device_pages, host_pages, disk_pages)
        self.touched: ContextId | None = None
        prefix: list[int] = []
        for tokens, paused in crowd:
            prefix = [*prefix, *self.letters(tokens)]
            context = self.model.open(0, prefix)
            self.model.plan(context, 1000, load=False)
            self.model.execute()
            if paused:
                self.model.pause(context)

    def pick(self, index: int) -> ContextId:
        contexts = list(self.model.subjects)
        self.touched = contexts[index % len(contexts)]
        return self.touched

    def has_contexts(self) -> bool:
        return bool(self.model.subjects)

    def letters(self, tokens: list[int]) -> list[int]:
        """Each letter stands for half a page (at least one token), so that whole pages are often equal."""
        return [token for token in tokens for _ in range(max(1, self.page_size // 2))]

    @precondition(lambda self: len(self.model.subjects) < 8)
    @rule(index=INDEX, share=st.booleans(), namespace=st.integers(0, 1), tokens=TOKENS)
    def open(self, index: int, share: bool, namespace: int, tokens: list[int]) -> None:
        prefix: list[int] = []
        if share and self.model.subjects:
            subject = self.model.subjects[self.pick(index)]
            namespace, prefix = subject.namespace, subject.tokens
        self.touched = self.model.open(namespace, [*prefix, *self.letters(tokens)])

    @precondition(has_contexts)
    @rule(index=INDEX, tokens=TOKENS)
    def append(self, index: int, tokens: list[int]) -> None:
        context = self.pick(index)
        if context not in self.model.planned:
            self.model.append(context, self.letters(tokens))

    @precondition(has_contexts)
    @rule(index=INDEX, num_tokens=st.sampled_from((1, 3, 17, 1000)), load=st.booleans())
    def plan(self, index: int, num_tokens: int, load: bool) -> None:
        self.model.plan(self.pick(index), num_tokens, load=load)

    @precondition(has_contexts)
    @rule(num_tokens=st.sampled_from((5, 1000)), failing=st.sampled_from((None, 0, 1)))
    def run_everybody(self, num_tokens: int, failing: int | None) -> None:
        for context in list(self.model.subjects):
            self.model.plan(context, num_tokens, load=True)
        self.execute(failing)

    @rule(failing=st.sampled_from((None, None, 0, 1)))
    def execute(self, failing: int | None) -> None:
        self.model.execute(frozenset() if failing is None else frozenset([failing]))

    @precondition(has_contexts)
    @rule(index=INDEX)
    def pause(self, index: int) -> None:
        self.model.pause(self.pick(index))

    @precondition(has_contexts)
    @rule(index=INDEX, settle=st.booleans())
    def swap_out(self, index: int, settle: bool) -> None:
        """A whole context goes to the host, as far as the host has room and nobody else needs it."""
        context = self.pick(index)
        self.model.pause(context)
        for number, segment in reversed([*enumerate(self.model.ledger.segments())]):
            if segment.holders == (context,):
                self.model.reclaim(number, segment.num_pages, Action.SWAP)
                break
        if settle:
            self.model.settle_flights()

    @precondition(has_contexts)
    @rule(index=INDEX)
    def release(self, index: int) -> None:
        self.model.release(self.pick(index))

    @precondition(has_contexts)
    @rule(index=INDEX)
    def discard(self, index: int) -> None:
        self.model.discard(self.pick(index))

    @precondition(has_contexts)
    @rule(index=INDEX, keep_cached=st.booleans())
    def close(self, index: int, keep_cached: bool) -> None:
        self.model.close(self.pick(index), keep_cached=keep_cached)

    @precondition(lambda self: 0 < len(self.model.subjects) < 8)
    @rule(index=INDEX)
    def fork(self, index: int) -> None:
        self.touched = self.model.fork(self.pick(index))

    @precondition(has_contexts)
    @rule(index=INDEX, keep=st.integers(0, 40))
    def truncate(self, index: int, keep: int) -> None:
        context = self.pick(index)
        self.model.truncate(context, min(keep, len(self.model.subjects[context].tokens)))

    @precondition(lambda self: self.model.ledger.paused_pages)
    @rule(index=INDEX, num_pages=st.integers(1, 8), action=st.sampled_from(Action))
    def reclaim(self, index: int, num_pages: int, action: Action) -> None:
        self.model.reclaim(index, num_pages, action)

    @precondition(has_contexts)
    @rule(index=INDEX, first=INDEX)
    def spoil(self, index: int, first: int) -> None:
        self.model.spoil(self.pick(index), first)

    @precondition(lambda self: self.model.ledger.paused_pages)
    @rule(index=INDEX)
    def copy_out(self, index: int) -> None:
        self.model.copy_out(index)

    @precondition(has_contexts)
    @rule(index=INDEX)
    def write_back(self, index: int) -> None:
        self.model.ledger.write_back(self.pick(index))

    @precondition(lambda self: self.model.flights)
    @rule(index=INDEX)
    def arrive(self, index: int) -> None:
        self.model.arrive(index)

    @precondition(lambda self: self.model.flights)
    @rule(index=INDEX)
    def acknowledge(self, index: int) -> None:
        self.model.acknowledge(index)

    @precondition(lambda self: self.model.flights and self.model.ledger.num_disk_pages)
    @rule(index=INDEX)
    def fail(self, index: int) -> None:
        self.model.fail(index)

    @precondition(lambda self: self.model.ledger.num_disk_pages)
    @rule()
    def sink(self) -> None:
        self.model.sink()

    @rule(action=st.sampled_from((Action.SWAP, Action.DISCARD, Action.RELEASE)))
    def squeeze(self, action: Action) -> None:
        self.model.squeeze(action)

    @rule()
    def flush(self) -> None:
        self.model.ledger.flush()

    @invariant()
    def everything_holds(self) -> None:
        if hasattr(self, "model"):
            self.model.after(self.touched, full=True)

    def teardown(self) -> None:
        if hasattr(self, "model"):
            self.model.finish()


@pytest.mark.parametrize("page_size", [1, 2, 16])
def test_machine(page_size: int) -> None:
    machine = type(f"LedgerMachine{page_size}", (LedgerMachine,), {"page_size": page_size})
    machine.TestCase.settings = settings(
        max_examples=350,
        stateful_step_count=60,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    machine.TestCase("runTest").runTest()
