"""The ledger's runs on their way between the device and the host."""

from __future__ import annotations

import pytest
from caesura.runtime.errors import BrokenInvariant
from caesura.runtime.kv.check import check
from caesura.runtime.kv.ledger import KVLedger
from caesura.scheduler.ledger import Reclaimed
from caesura.scheduler.types import Action, MoveKind

from tests.unit.kv_ledger import TEN, A, B, C, acknowledge_all, run, swap_out


def test_a_round_trip_over_the_host() -> None:
    ledger = KVLedger(2, 5, 5)
    run(ledger, A, TEN)
    swap_out(ledger, A)
    assert (ledger.free_pages, ledger.computed(A), ledger.held_tokens(A)) == (5, 0, 0)
    assert ledger.acquire(A, TEN, 10) == 0
    assert ledger.host_tokens(A, TEN, 10) == 10
    assert ledger.load(A, TEN, 10) == 10
    assert ledger.is_loading(A) and ledger.computed(A) == 0
    assert ledger.load(A, TEN, 10) == 0, "one load at a time"
    acknowledge_all(ledger)
    assert not ledger.is_loading(A)
    assert ledger.computed(A) == 10
    out, back = ledger.take_moves()
    assert (out.kind, back.kind) == (MoveKind.OUT, MoveKind.IN)
    assert out.target == back.source and back.target == ledger.table(A)


def test_two_contexts_wait_for_the_same_copy() -> None:
    ledger = KVLedger(2, 8, 8)
    run(ledger, A, TEN)
    swap_out(ledger, A)
    ledger.open(B, "")
    for context in (A, B):
        ledger.acquire(context, TEN, 10)
        assert ledger.load(context, TEN, 10) == 10
    assert len(ledger.transfers) == 1
    ledger.close(A)
    acknowledge_all(ledger)
    assert ledger.computed(B) == 10


def test_a_load_takes_what_fits() -> None:
    ledger = KVLedger(2, 5, 5)
    run(ledger, A, TEN)
    swap_out(ledger, A)
    run(ledger, B, [9, 9, 9, 9])
    ledger.acquire(A, TEN, 10)
    assert ledger.load(A, TEN, 10) == 6
    acknowledge_all(ledger)
    assert ledger.computed(A) == 6
    assert ledger.host_tokens(A, TEN, 10) == 4
    ledger.close(B)
    assert ledger.extend(A, 10), "the rest is recomputed instead"
    ledger.commit(A, TEN, 10)
    check(ledger)


def test_what_a_load_builds_on_is_not_counted_as_room() -> None:
    """Copies acknowledged out of order leave a usable run below one that is still coming; it must not be evicted."""
    ledger = KVLedger(2, 4, 6)
    run(ledger, A, [0, 1, 2, 3])
    swap_out(ledger, A)
    run(ledger, B, [0, 1, 2, 3, 4, 5, 6, 7])
    swap_out(ledger, B)
    assert ledger.tree.probe("", [0, 1, 2, 3, 4, 5, 6, 7]).host_tokens == 8
    ledger.take_moves()
    for context, limit in ((A, 2), (B, 6)):
        ledger.acquire(context, TEN[:8], limit)
        ledger.load(context, TEN[:8], limit)
    first, second = [move.id for move in ledger.take_moves()]
    ledger.acknowledge(second)
    ledger.release(A)
    run(ledger, A, [9, 9])  # the last free page
    ledger.release(B)
    ledger.open(C, "")
    ledger.acquire(C, TEN[:8], 8)
    assert ledger.load(C, TEN[:8], 8) == 6
    check(ledger)
    ledger.acknowledge(first)
    check(ledger)
    assert ledger.computed(C) == 6


def test_no_room_on_the_host_is_a_discard() -> None:
    ledger = KVLedger(2, 8, 1)
    run(ledger, A, TEN)
    ledger.pause(A)
    (segment,) = ledger.segments()
    assert ledger.reclaim(segment.id, 5, Action.SWAP) == Reclaimed(5, 0, Action.DISCARD)
    check(ledger)
    assert ledger.host.num_free == 1


def test_a_part_is_taken_from_the_end() -> None:
    ledger = KVLedger(2, 8, 8)
    run(ledger, A, TEN)
    ledger.pause(A)
    (segment,) = ledger.segments()
    taken = ledger.reclaim(segment.id, 2, Action.DISCARD)
    assert ledger.computed(A) == 6
    (rest,) = ledger.segments()
    assert taken == Reclaimed(2, 0, Action.DISCARD, rest=rest.id)
    taken = ledger.reclaim(rest.id, 1, Action.SWAP)
    assert (taken.freed, taken.pending, taken.action) == (0, 1, Action.SWAP)
    assert taken.rest in {segment.id for segment in ledger.segments()}
    assert ledger.pending_pages == 1
    acknowledge_all(ledger)
    assert (ledger.computed(A), ledger.free_pages) == (4, 6)


def test_running_on_a_part_of_a_leaving_run_keeps_that_part() -> None:
    ledger = KVLedger(2, 8, 8)
    run(ledger, A, TEN)
    ledger.pause(A)
    (segment,) = ledger.segments()
    ledger.reclaim(segment.id, 5, Action.SWAP)
    run(ledger, B, TEN[:4])  # shares the first half
    ledger.pause(B)
    assert ledger.pending_pages == 3
    acknowledge_all(ledger)
    assert ledger.free_pages == 6


def test_a_chain_of_runs_leaves_in_one_step() -> None:
    ledger = KVLedger(2, 8, 8)
    run(ledger, A, TEN[:6])
    ledger.pause(A)
    ledger.write_back(A)
    acknowledge_all(ledger)
    run(ledger, A, TEN)  # grows a second run below the one that has a host copy
    ledger.pause(A)
    upper, lower = sorted(ledger.segments(), key=lambda segment: segment.start)
    assert ledger.reclaim(lower.id, 9, Action.SWAP) == Reclaimed(0, 2, Action.SWAP)
    assert ledger.reclaim(upper.id, 9, Action.SWAP) == Reclaimed(0, 3, Action.SWAP)
    assert ledger.pending_pages == 5
    acknowledge_all(ledger)
    assert ledger.free_pages == 8


def test_whoever_comes_back_during_the_copy_keeps_the_pages() -> None:
    ledger = KVLedger(2, 8, 8)
    run(ledger, A, TEN)
    ledger.pause(A)
    (segment,) = ledger.segments()
    ledger.reclaim(segment.id, 5, Action.SWAP)
    assert ledger.acquire(A, TEN, 10) == 10
    acknowledge_all(ledger)
    assert ledger.computed(A) == 10


def test_page_by_page_swapping_leaves_one_run() -> None:
    ledger = KVLedger(1, 32, 32)
    run(ledger, A, list(range(20)))
    ledger.pause(A)
    while segments := ledger.segments():
        ledger.reclaim(segments[0].id, 1, Action.SWAP)
        acknowledge_all(ledger)
    assert len(ledger.tree.nodes) == 2


def test_running_contexts_are_never_taken_from() -> None:
    ledger = KVLedger(2, 8, 8)
    run(ledger, A, TEN[:9])
    ledger.pause(A)
    run_segment, tail = ledger.segments()
    ledger.acquire(A, TEN[:9], 8)
    assert ledger.segments() == []
    for segment in (run_segment, tail):
        for action in Action:
            assert ledger.reclaim(segment.id, 9, action) == Reclaimed(0, 0, action)
    assert ledger.computed(A) == 9


def test_a_release_under_pressure_keeps_the_cache() -> None:
    ledger = KVLedger(2, 8)
    run(ledger, A, TEN)
    ledger.pause(A)
    (segment,) = ledger.segments()
    assert ledger.reclaim(segment.id, 5, Action.RELEASE) == Reclaimed(5, 0, Action.RELEASE)
    assert (ledger.free_pages, ledger.evictable_pages) == (3, 5)
    assert ledger.acquire(A, TEN, 10) == 10


def test_an_unknown_acknowledgement_raises() -> None:
    ledger = KVLedger(2, 8, 8)
    run(ledger, A, TEN)
    ledger.write_back(A)
    (move,) = ledger.transfers
    ledger.acknowledge(move)
    with pytest.raises(BrokenInvariant, match="not in flight"):
        ledger.acknowledge(move)


def test_truncate_gives_up_a_claim_that_lies_on_the_host() -> None:
    ledger = KVLedger(2, 8, 8)
    run(ledger, A, TEN)
    swap_out(ledger, A)
    ledger.truncate(A, 5)
    run(ledger, B, TEN)  # brings the old continuation back to the device
    assert ledger.computed(A) == 4
    run(ledger, A, [0, 1, 2, 3, 4, 7, 7, 7])
    assert ledger.computed(A) == 8


def test_a_spoiled_run_goes_with_the_copy_that_kept_it() -> None:
    """Of a run that is copied out in two parts the second is on its way when all turns out to be wrong."""
    ledger = KVLedger(2, 5, 5)
    run(ledger, A, TEN)
    ledger.pause(A)
    assert ledger.copy_out(ledger.segments()[0].id, 2) == 4
    acknowledge_all(ledger)
    first = min(ledger.segments(), key=lambda segment: segment.start)
    assert ledger.copy_out(first.id) == 6
    ledger.spoil(frozenset(range(5)))
    check(ledger)
    acknowledge_all(ledger)
    assert (ledger.free_pages, ledger.free_host_pages) == (5, 5)
