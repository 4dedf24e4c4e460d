"""A ledger driven by hand, for its tests."""

from __future__ import annotations

from caesura.runtime.kv.check import check
from caesura.runtime.kv.ledger import KVLedger
from caesura.scheduler.types import Action, ContextId

A, B, C = ContextId(1), ContextId(2), ContextId(3)
TEN = list(range(10))


def run(ledger: KVLedger, context: ContextId, tokens: list[int], namespace: str = "") -> None:
    """Open a context if need be, and compute all its tokens."""
    if context not in ledger.holdings:
        ledger.open(context, namespace)
    ledger.acquire(context, tokens, len(tokens) - 1)
    assert ledger.extend(context, len(tokens))
    ledger.take_copies()
    ledger.commit(context, tokens, len(tokens))
    check(ledger)


def acknowledge_all(ledger: KVLedger) -> None:
    for move in list(ledger.transfers):
        ledger.acknowledge(move)
    check(ledger)


def swap_out(ledger: KVLedger, context: ContextId) -> None:
    ledger.pause(context)
    while segments := ledger.segments():
        deepest = max(segments, key=lambda segment: segment.start)
        ledger.reclaim(deepest.id, deepest.num_pages, Action.SWAP)
        acknowledge_all(ledger)
