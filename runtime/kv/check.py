"""Recompute every counter of the ledger from scratch and compare. For tests, and for a doctor's look at a server."""

from __future__ import annotations

from collections import Counter

from caesura.runtime.errors import BrokenInvariant
from caesura.runtime.kv.ledger import KVLedger
from caesura.runtime.kv.node import Hold, Node
from caesura.runtime.kv.pages import PageState, row
from caesura.scheduler.types import MoveKind


def check(ledger: KVLedger) -> None:
    """Raise BrokenInvariant when any two facts of the ledger disagree."""
    ledger.device.check()
    ledger.host.check()
    device: Counter[int] = Counter()
    host: Counter[int] = Counter()
    seen: set[int] = set()
    for root in ledger.tree.roots().values():
        for node in root.subtree():
            seen.add(node.id)
            _check_node(ledger, node)
            device.update(row(handle) for handle in node.device)
            host.update(row(handle) for handle in node.host)
    _require(seen == set(ledger.tree.nodes), f"nodes {seen ^ set(ledger.tree.nodes)} are not reachable")
    for context, holding in ledger.holdings.items():
        device.update(row(handle) for handle in holding.tail)
        _check_holding(ledger, context, holding.leased)
    device.update(row(handle) for handle in ledger._copied)
    for pool, found in ((ledger.device, device), (ledger.host, host)):
        expected = {page: count for page, count in enumerate(pool.references()) if count}
        _require(dict(found) == expected, f"{pool.name} references {expected}, found {dict(found)}")
    unheld = sum(len(node.device) for node in ledger.tree.nodes.values() if not node.held)
    _require(unheld == ledger.tree.unheld_pages, f"unheld {ledger.tree.unheld_pages}, found {unheld}")


def _check_node(ledger: KVLedger, node: Node) -> None:
    size = ledger.page_size
    subtree = node.subtree()
    leases = [lease for below in subtree for lease in below.leases]
    running = sum(lease.hold is Hold.RUNNING for lease in leases)
    _require(node.running == running, f"node {node.id}: running {node.running}, leases say {running}")
    _require(node.paused == len(leases) - running, f"node {node.id}: paused {node.paused} of {len(leases)}")
    for lease in node.leases:
        _require(lease.node is node and not lease.released, f"node {node.id} lists a lease that is elsewhere")
        _require(lease.holder in ledger.holdings, f"lease of unknown context {lease.holder}")
    on_device = sum(bool(child.device) for child in node.children.values())
    _require(node.device_children == on_device, f"node {node.id}: {node.device_children} device children")
    for key, child in node.children.items():
        _require(child.parent is node and child.start == node.end, f"node {child.id} hangs wrong")
        _require(key == tuple(child.tokens[:size]), f"node {child.id} under a wrong key")
        _require(bool(child.device or child.host), f"node {child.id} lies nowhere")
        _require(not child.device or bool(node.device) or node.parent is None, f"hole above node {child.id}")
        _require(child.tick <= node.tick, f"node {child.id} is newer than its parent")
    for tier in (node.device, node.host):
        _require(not tier or len(tier) * size == len(node.tokens), f"node {node.id}: {len(tier)} pages")
    transfer = node.transfer
    if transfer is not None:
        _require(transfer.id in ledger.transfers and node in transfer.nodes, f"node {node.id}: stray transfer")
    out = transfer is not None and transfer.kind is MoveKind.OUT
    busy = {False: PageState.USED, True: PageState.COPYING_OUT if out else PageState.COPYING_IN}
    _require(
        all(ledger.device.state(page) is busy[transfer is not None] for page in node.device),
        f"node {node.id}: page state does not fit its transfer",
    )


def _check_holding(ledger: KVLedger, context: int, leased: int) -> None:
    holding = ledger.holdings[context]  # type: ignore[index]
    size = ledger.page_size
    if holding.lease is None:
        _require(not holding.tail and not holding.computed, f"context {context} has pages without a lease")
        return
    _require(leased + len(holding.tail) * size >= holding.computed, f"context {context} computed too much")
    if holding.computed >= leased:
        on_device = [page for node in holding.lease.node.path() for page in node.device]
        table = [row(handle) for handle in on_device + holding.tail]
        _require(holding.table == table, f"context {context}: table {holding.table}, pages {table}")


def _require(fact: bool, message: str) -> None:
    if not fact:
        raise BrokenInvariant(message)
