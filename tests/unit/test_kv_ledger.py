"""The ledger's promises by name: KV-01 conservation, KV-02 counters, KV-03 failed steps, KV-04 own copies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from caesura.runtime.errors import BrokenInvariant
from caesura.runtime.kv.check import check, dump
from caesura.runtime.kv.ledger import KVLedger
from caesura.scheduler.types import MoveKind

from tests.unit.kv_ledger import TEN, A, B, C, acknowledge_all, run, swap_out

# -- KV-01: conservation ------------------------------------------------------------------------------------------


def test_kv01_every_page_comes_back() -> None:
    ledger = KVLedger(2, 8, 4)
    run(ledger, A, TEN)
    assert ledger.free_pages == 3
    ledger.close(A)
    check(ledger)
    assert (ledger.free_pages, ledger.evictable_pages) == (3, 5)
    assert ledger.flush() == 5
    assert (ledger.free_pages, ledger.evictable_pages) == (8, 0)
    assert not ledger.tree.nodes


def test_kv01_discard_frees_only_what_nobody_shares() -> None:
    ledger = KVLedger(2, 8)
    run(ledger, A, [0, 1, 2, 3])
    run(ledger, B, [0, 1, 2, 3, 4, 5, 6])
    assert ledger.exclusive_tokens(B) == 3
    assert ledger.discard(B) == 2
    assert ledger.computed(A) == 4
    assert ledger.discard(A) == 2
    check(ledger)
    assert ledger.free_pages == 8


def test_a_context_opens_and_closes_once() -> None:
    ledger = KVLedger(2, 8)
    ledger.open(A, "")
    with pytest.raises(BrokenInvariant, match="opened twice"):
        ledger.open(A, "")
    ledger.close(A)
    with pytest.raises(BrokenInvariant, match="not open"):
        ledger.close(A)


def _loading(ledger: KVLedger) -> None:
    swap_out(ledger, A)
    ledger.acquire(A, TEN, 9)
    assert ledger.load(A, TEN, 9) == 8


def _preserved(ledger: KVLedger) -> None:
    ledger.pause(A)


def _swapping_out(ledger: KVLedger) -> None:
    ledger.pause(A)
    ledger.write_back(A)


def _swapped(ledger: KVLedger) -> None:
    swap_out(ledger, A)


def _discarded(ledger: KVLedger) -> None:
    ledger.pause(A)
    ledger.discard(A)


def _extended(ledger: KVLedger) -> None:
    ledger.acquire(A, TEN, 9)
    ledger.extend(A, 13)


@pytest.mark.parametrize("state", [_preserved, _swapping_out, _swapped, _discarded, _loading, _extended])
@pytest.mark.parametrize("keep_cached", [True, False])
def test_kv01_closing_in_any_state_gives_everything_back(state: Callable[[KVLedger], None], keep_cached: bool) -> None:
    ledger = KVLedger(2, 8, 8)
    run(ledger, A, TEN)
    state(ledger)
    ledger.close(A, keep_cached=keep_cached)
    check(ledger)
    acknowledge_all(ledger)
    assert ledger.free_pages + ledger.evictable_pages == 8
    ledger.flush()
    assert ledger.free_pages == 8
    assert ledger.host.num_free == 8


# -- KV-02: counters come from the tree -----------------------------------------------------------------------------


@pytest.mark.parametrize("counter", ["evictable_pages", "paused_pages", "blocked_pages", "spare_host_pages"])
def test_kv02_a_wrong_counter_is_found(counter: str) -> None:
    ledger = KVLedger(2, 8, 4)
    run(ledger, A, TEN)
    setattr(ledger.tree, counter, getattr(ledger.tree, counter) + 1)
    with pytest.raises(BrokenInvariant, match="pages 1, the tree says 0"):
        check(ledger)


def test_kv02_pages_being_copied_out_are_not_evictable_yet() -> None:
    ledger = KVLedger(2, 8, 8)
    run(ledger, A, TEN)
    ledger.pause(A)
    ledger.write_back(A)
    ledger.release(A)
    assert (ledger.evictable_pages, ledger.pending_pages, ledger.free_pages) == (0, 5, 3)
    ledger.open(B, "")
    ledger.acquire(B, [9] * 8, 7)
    assert (ledger.lacking_now(B, 8), ledger.shortfall(B, 8)) == (1, 0)
    assert not ledger.extend(B, 8)
    acknowledge_all(ledger)
    assert (ledger.evictable_pages, ledger.pending_pages) == (5, 0)
    assert ledger.extend(B, 8)


def test_shared_pages_are_counted_once() -> None:
    ledger = KVLedger(2, 8)
    for context in (A, B, C):
        run(ledger, context, TEN)
        ledger.pause(context)
    assert ledger.paused_pages == 5
    assert {segment.holders for segment in ledger.segments()} == {(1, 2, 3)}
    ledger.release(A)
    ledger.release(B)
    assert (ledger.paused_pages, ledger.evictable_pages) == (5, 0)
    ledger.release(C)
    assert (ledger.paused_pages, ledger.evictable_pages) == (0, 5)


# -- KV-03: a step that fails between allocate and commit -----------------------------------------------------------


def test_kv03_a_refused_extend_changes_nothing() -> None:
    ledger = KVLedger(2, 4, 4)
    run(ledger, A, [0, 1, 2, 3])
    ledger.close(A)
    run(ledger, B, [9, 9])
    before = dump(ledger), ledger.free_pages, ledger.evictable_pages
    assert not ledger.extend(B, 10)
    assert (dump(ledger), ledger.free_pages, ledger.evictable_pages) == before, "cached pages were lost for nothing"
    check(ledger)


def test_kv03_a_step_that_is_never_committed_leaves_nothing_behind() -> None:
    ledger = KVLedger(2, 8)
    run(ledger, A, [0, 1, 2])
    assert ledger.extend(A, 9)
    ledger.pause(A)
    check(ledger)
    assert ledger.computed(A) == 3
    assert ledger.free_pages == 8 - 2


def test_kv03_a_called_off_copy_on_write_leaves_nothing_behind() -> None:
    ledger = KVLedger(2, 8)
    run(ledger, A, [0, 1, 2])
    ledger.open(B, "")
    ledger.fork(A, B)
    ledger.acquire(B, [0, 1, 2, 5], 3)
    assert ledger.extend(B, 4)
    ledger.close(B)
    assert ledger.take_copies() == ()
    check(ledger)
    assert ledger.free_pages == 8 - 2


def test_a_commit_beyond_the_pages_raises() -> None:
    ledger = KVLedger(2, 8)
    run(ledger, A, [0, 1])
    ledger.extend(A, 4)
    with pytest.raises(BrokenInvariant, match="commit of 5 of 10 tokens after 2, with pages for 4"):
        ledger.commit(A, TEN, 5)
    with pytest.raises(BrokenInvariant, match="commit of 1"):
        ledger.commit(A, TEN, 1)


def test_a_paused_context_cannot_be_extended() -> None:
    ledger = KVLedger(2, 8)
    run(ledger, A, TEN)
    ledger.pause(A)
    with pytest.raises(BrokenInvariant, match="not been acquired"):
        ledger.extend(A, 12)


# -- KV-04: nodes hold their own copies -----------------------------------------------------------------------------


def test_kv04_the_callers_buffer_may_change_afterwards() -> None:
    ledger = KVLedger(2, 8)
    tokens = [0, 1, 2, 3]
    run(ledger, A, tokens)
    tokens[:] = [7, 7, 7, 7]
    assert ledger.tree.probe("", [0, 1, 2, 3]).device_tokens == 4
    assert ledger.tree.probe("", tokens).device_tokens == 0
    table = ledger.table(A)
    run(ledger, B, [0, 1, 2, 3])
    assert ledger.table(B)[:2] == table[:2]


# -- sharing --------------------------------------------------------------------------------------------------------


def test_namespaces_do_not_share_pages() -> None:
    ledger = KVLedger(2, 16)
    run(ledger, A, TEN, "alice")
    ledger.open(B, "bob")
    assert ledger.acquire(B, TEN, 9) == 0
    ledger.open(C, "alice")
    assert ledger.acquire(C, TEN, 9) == 8


def test_a_fork_copies_the_unfinished_page_when_it_is_written() -> None:
    ledger = KVLedger(4, 8)
    run(ledger, A, [0, 1, 2, 3, 4, 5])
    ledger.open(B, "")
    ledger.fork(A, B)
    assert ledger.table(B) == ledger.table(A)
    assert ledger.computed(B) == 6
    assert ledger.free_pages == 6
    ledger.acquire(B, [0, 1, 2, 3, 4, 5, 9], 6)
    assert ledger.extend(B, 7)
    (copy,) = ledger.take_copies()
    assert (copy.kind, copy.source, copy.target) == (MoveKind.COPY, ledger.table(A)[1:], ledger.table(B)[1:])
    ledger.commit(B, [0, 1, 2, 3, 4, 5, 9], 7)
    check(ledger)
    assert ledger.table(B)[0] == ledger.table(A)[0]
    ledger.acquire(A, [0, 1, 2, 3, 4, 5, 8], 6)
    assert ledger.extend(A, 7)
    assert ledger.take_copies() == (), "the other branch has left the page"


def test_the_source_of_a_copy_stays_until_the_step_is_over() -> None:
    ledger = KVLedger(4, 3)
    run(ledger, A, [0, 1])
    ledger.open(B, "")
    ledger.fork(A, B)
    ledger.acquire(B, [0, 1, 2], 2)
    assert ledger.extend(B, 3)
    source = ledger.table(A)[0]
    ledger.close(A)
    ledger.open(C, "")
    ledger.acquire(C, [5] * 8, 7)
    assert not ledger.extend(C, 8)
    assert ledger.extend(C, 4)
    assert source not in ledger.table(C)
    ledger.take_copies()
    assert not ledger.extend(C, 8), "the step has not been carried out yet"
    ledger.commit(B, [0, 1, 2], 3)
    check(ledger)
    assert ledger.extend(C, 8)


def test_a_second_copy_of_the_same_tokens_is_given_back() -> None:
    ledger = KVLedger(2, 16)
    for context in (A, B):
        ledger.open(context, "")
        ledger.acquire(context, TEN, 9)
        assert ledger.extend(context, 10)
    for context in (A, B):
        ledger.commit(context, TEN, 10)
        check(ledger)
    assert ledger.free_pages == 16 - 5
    assert ledger.table(A) == ledger.table(B)
