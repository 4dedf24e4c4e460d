"""Recompute every counter of the ledger from scratch and compare; draw the tree. For tests and a doctor's look."""

from __future__ import annotations

from collections import Counter

from caesura.runtime.errors import BrokenInvariant
from caesura.runtime.kv.ledger import KVLedger
from caesura.runtime.kv.node import Hold, Node, PrefixLease
from caesura.runtime.kv.order import device_evictable, disk_evictable, host_evictable
from caesura.runtime.kv.pages import Handle, PagePool, PageState, row
from caesura.scheduler.types import MoveKind


def check(ledger: KVLedger) -> None:
    """Raise BrokenInvariant when any two facts of the ledger disagree. O(pages + nodes + leases)."""
    tiers, tree = ledger.tiers, ledger.tree
    nodes = [node for root in tree.roots().values() for node in root.subtree()]
    found = {node.id for node in nodes}
    _require(found == set(tree.nodes), f"nodes {found ^ set(tree.nodes)} are not reachable")
    for node in reversed(nodes):  # children before parents
        _check_node(ledger, node)
    for lease in ledger.leases.values():
        _check_lease(ledger, lease)
    anchored = {holder for node in nodes for holder in node.leases}
    _require(anchored == set(ledger.leases), f"contexts {anchored ^ set(ledger.leases)} lease nothing")
    tails = [page for lease in ledger.leases.values() for page in lease.tail]
    copies = [source for _, source in tiers.copies.values()]
    tree_pages = [page for node in nodes for page in node.device]
    _check_pool(tiers.device, tree_pages + tails + copies + tiers.step_pages)
    below = [page for node in nodes for page in node.host + node.sinking]
    _check_pool(tiers.below.host, [page for page in below if row(page) < tiers.below.disk.first])
    _check_pool(tiers.below.disk, [page for page in below if row(page) >= tiers.below.disk.first])
    references = tiers.device.references()
    for page in tree_pages:
        _require(references[row(page)] == 1, f"page {row(page)} is in the tree and has {references[row(page)]} owners")
    for name, total, part in (
        ("evictable", tree.evictable_pages, [node.shares().evictable for node in nodes]),
        ("paused", tree.paused_pages, [node.shares().paused for node in nodes]),
        ("blocked", tree.blocked_pages, [node.shares().blocked for node in nodes]),
        ("spare host", tree.spare_host_pages, [node.shares().spare_host for node in nodes]),
        ("doubled host", tree.doubled_host_pages, [node.shares().doubled_host for node in nodes]),
        ("spare disk", tree.spare_disk_pages, [node.shares().spare_disk for node in nodes]),
    ):
        _require(total == sum(part), f"{name} pages {total}, the tree says {sum(part)}")
    _check_order(ledger, nodes)
    for move, transfer in tiers.transfers.items():
        _require(move == transfer.id, f"transfer {transfer.id} filed under {move}")
        _require(all(node.transfer is transfer for node in transfer.nodes), f"transfer {move} lost a node")


def _check_pool(pool: PagePool, owners: list[Handle]) -> None:
    """Conservation: every page is free or has exactly the owners that can be found."""
    pool.check()
    found = Counter(row(handle) for handle in owners)
    expected = {page: count for page, count in pool.references().items() if count}
    _require(dict(found) == expected, f"{pool.name} references {expected}, found {dict(found)}")
    for handle in owners:
        pool.state(handle)  # raises for a stale handle


def _check_node(ledger: KVLedger, node: Node) -> None:
    children = node.children.values()
    mine = list(node.leases.values())
    running = sum(lease.hold is Hold.RUNNING for lease in mine) + sum(child.running for child in children)
    paused = sum(lease.hold is Hold.PAUSED for lease in mine) + sum(child.paused for child in children)
    moving = (node.transfer is not None) + sum(child.moving for child in children)
    on_device = sum(bool(child.device) for child in children)
    _require(node.running == running, f"node {node.id}: running {node.running}, leases say {running}")
    _require(node.paused == paused, f"node {node.id}: paused {node.paused}, leases say {paused}")
    _require(node.moving == moving, f"node {node.id}: moving {node.moving}, transfers say {moving}")
    _require(node.device_children == on_device, f"node {node.id}: {node.device_children} device children")
    _require(node.share == node.shares(), f"node {node.id}: counted {node.share}, is {node.shares()}")
    for holder, lease in node.leases.items():
        _require(lease.holder == holder and lease.node is node and not lease.released, f"lease of {holder} is astray")
    for key, child in node.children.items():
        _require(child.parent is node and child.start == node.end, f"node {child.id} hangs wrong")
        _require(key == tuple(child.tokens[: ledger.page_size]), f"node {child.id} under a wrong key")
        _require(bool(child.device or child.host), f"node {child.id} lies nowhere")
        _require(not child.device or bool(node.device) or node.parent is None, f"hole above node {child.id}")
        _require(child.tick <= node.tick, f"node {child.id} is newer than its parent")
    spoiled_above = node.parent is not None and node.parent.spoiled
    _require(node.pinned or not node.spoiled or spoiled_above, f"node {node.id} is spoiled, and nothing moves there")
    for tier in (node.device, node.host, node.sinking):
        _require(not tier or len(tier) * ledger.page_size == len(node.tokens), f"node {node.id}: {len(tier)} pages")
    _check_below(ledger, node)
    _check_transfer(ledger, node)


def _check_below(ledger: KVLedger, node: Node) -> None:
    first = ledger.below.disk.first
    _require(all((row(page) >= first) == node.on_disk for page in node.host), f"node {node.id}: on the wrong medium")
    _require(all(row(page) >= first for page in node.sinking), f"node {node.id}: sinks into memory")
    sinks = node.transfer is not None and node.transfer.kind is MoveKind.DOWN
    _require(bool(node.sinking) == sinks, f"node {node.id}: {len(node.sinking)} pages to sink to, moving: {sinks}")
    _require(not sinks or bool(node.host and not node.on_disk), f"node {node.id}: sinks from nowhere")


def _check_transfer(ledger: KVLedger, node: Node) -> None:
    transfer = node.transfer
    device = host = sinking = PageState.USED
    if transfer is None:
        follows = any(child.leaving for child in node.children.values())
        _require(not node.leaving or follows, f"node {node.id} is leaving, but nothing moves it")
    else:
        source, target = PageState.COPYING_OUT, PageState.COPYING_IN
        device, host, sinking = {
            MoveKind.OUT: (source, target, PageState.USED),
            MoveKind.IN: (target, source, PageState.USED),
            MoveKind.DOWN: (PageState.USED, source, target),
        }[transfer.kind]
        ends = node.sinking if transfer.kind is MoveKind.DOWN else node.device
        known = ledger.tiers.transfers.get(transfer.id) is transfer and node in transfer.nodes
        _require(known and bool(ends and node.host), f"node {node.id}: stray transfer {transfer.id}")
    below = ledger.below.state
    for name, look, pages, state in (
        ("device", ledger.device.state, node.device, device),
        ("host", below, node.host, host),
        ("sinking", below, node.sinking, sinking),
    ):
        states = {look(page) for page in pages}
        _require(states <= {state}, f"node {node.id}: {name} pages are {states}, should be {state.name}")


def _check_lease(ledger: KVLedger, lease: PrefixLease) -> None:
    size, who = ledger.page_size, f"context {lease.holder}"
    _require(lease.holder in ledger.namespaces, f"{who} has a lease, but is not open")
    root = lease.node
    while root.parent is not None:
        root = root.parent
    namespace = ledger.namespaces[lease.holder]
    _require(ledger.tree.roots().get(namespace) is root, f"{who} leases outside its namespace {namespace!r}")
    _require(0 <= lease.ahead <= len(lease.tail) * size, f"{who}: {lease.ahead} tokens in {len(lease.tail)} pages")
    ready = lease.node.frontier() is lease.node
    _require(ready or not lease.tail, f"{who} has a tail that hangs in the air")
    if lease.rows is not None:
        on_device = [row(page) for node in lease.node.path() for page in node.device]
        table = on_device + [row(page) for page in lease.tail]
        _require(ready and lease.hold is Hold.RUNNING, f"{who} keeps a page table that may change")
        _require(lease.rows == table, f"{who}: table {lease.rows}, pages {table}")


def _check_order(ledger: KVLedger, nodes: list[Node]) -> None:
    """The next victims are there, and are the ones used longest ago."""
    tree = ledger.tree
    for name, evictable, victim in (
        ("device", device_evictable, tree.next_device_victim()),
        ("host", host_evictable, tree.next_host_victim()),
        ("disk", disk_evictable, tree.next_host_victim(on_disk=True)),
    ):
        oldest = min((node.tick for node in nodes if evictable(node)), default=None)
        _require((victim.tick if victim is not None else None) == oldest, f"{name} victim is not the oldest: {oldest}")


def dump(ledger: KVLedger) -> str:
    """The tree as text: one line a node with its span, tiers, holders and age."""
    lines: list[str] = []
    for namespace, root in ledger.tree.roots().items():
        lines.append(f"namespace {namespace!r}")
        stack = [(root, 1)]
        while stack:
            node, depth = stack.pop()
            below = "disk" if node.on_disk else "host"
            tiers = f"[{node.start}, {node.end}) device {len(node.device)} {below} {len(node.host)}"
            moving = f" {node.transfer.kind.value}" if node.transfer is not None else ""
            leaving = " leaving" * node.leaving + " spoiled" * node.spoiled
            holders = " ".join(f"{lease.holder}:{lease.hold.value}" for lease in node.leases.values())
            lines.append(f"{'  ' * depth}{node.id} {tiers}{moving}{leaving} tick {node.tick} {holders}".rstrip())
            stack.extend((child, depth + 1) for child in reversed(node.children.values()))
    return "\n".join(lines)


def _require(fact: bool, message: str) -> None:
    if not fact:
        raise BrokenInvariant(message)
