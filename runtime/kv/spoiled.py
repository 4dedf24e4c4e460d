"""Taking out of the tree what a failed step wrote: such a run is found by nobody from then on, and is freed as soon as
no copy uses it."""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING

from caesura.runtime.kv.node import Node
from caesura.runtime.kv.pages import row
from caesura.scheduler.types import ContextId, PageId

if TYPE_CHECKING:
    from caesura.runtime.kv.tiers import Tiers


def spoil(tiers: Tiers, written: Set[PageId]) -> set[ContextId]:
    """What is on these device pages is wrong: it goes, on every tier, with all that follows it.

    Leases on it end above it; returns whose they are. A page that a copy in fills by now is another run's.
    """
    hit = [
        node
        for node in tiers.tree.nodes.values()
        if node.device_ready and not node.spoiled and not written.isdisjoint(map(row, node.device))
    ]
    holders: set[ContextId] = set()
    for top in sorted(hit, key=lambda node: node.start):
        if top.spoiled or top.id not in tiers.tree.nodes:  # it followed another one
            continue
        clean = next(at for at, page in enumerate(top.device) if row(page) in written)
        if clean:
            tiers.tree.split(top, clean * tiers.page_size)
        gone = top.subtree()
        holders.update(holder for node in gone for holder in node.leases)
        tiers.let_go(top)
        for node in gone:
            node.spoiled = True
        purge(tiers, top)
    return holders


def purge(tiers: Tiers, node: Node) -> None:
    """Free a spoiled run with all that is spoiled around it, unless something still moves there."""
    if not node.spoiled or node.id not in tiers.tree.nodes:
        return
    while node.parent is not None and node.parent.spoiled:
        node = node.parent
    if not node.pinned:
        tiers.remove(node)
