"""What paused contexts alone hold on the device, as the policies see it."""

from __future__ import annotations

from collections.abc import Iterable

from caesura.runtime.kv.node import Hold, Node, PrefixLease
from caesura.runtime.kv.pages import PagePool
from caesura.scheduler.ledger import Segment
from caesura.scheduler.types import ContextId


def segments(device: PagePool, leases: Iterable[PrefixLease], *, runs: bool = True) -> list[Segment]:
    """Runs of the tree, and unfinished last pages. Without ``runs`` there are none of the first, and no path is walked:
    while somebody waits for memory in vain, this is asked at every step."""
    found: dict[int, tuple[Node, list[ContextId]]] = {}
    tails: list[Segment] = []
    for lease in leases:
        if lease.hold is not Hold.PAUSED:
            continue
        node = lease.node
        while runs and not node.running and node.parent is not None:
            if node.device:
                found.setdefault(node.id, (node, []))[1].append(lease.holder)
            node = node.parent
        same = sharers(device, lease)
        if same and same[0] is lease:
            tails.append(
                Segment(
                    id=-lease.holder - 1,
                    parent=lease.node.id if lease.node.id in found else None,
                    start=lease.node.end,
                    num_tokens=lease.ahead,
                    num_pages=len(lease.tail),
                    on_host=False,
                    leaving=False,
                    holders=tuple(sharer.holder for sharer in same),
                )
            )
    whole = [
        Segment(
            id=node.id,
            parent=node.parent.id if node.parent is not None and node.parent.id in found else None,
            start=node.start,
            num_tokens=len(node.tokens),
            num_pages=len(node.device),
            on_host=node.host_ready,
            leaving=node.leaving,
            holders=tuple(holders),
        )
        for node, holders in found.values()
    ]
    return whole + tails


def sharers(device: PagePool, lease: PrefixLease) -> list[PrefixLease]:
    """The paused leases whose tail is this one's; none when somebody running or a copy uses it besides."""
    if not lease.tail:
        return []
    owners = device.owners(lease.tail[0])
    same = [lease]
    if owners > 1:
        same = [other for other in lease.node.leases.values() if other.tail[:1] == lease.tail[:1]]
    return same if len(same) == owners and all(other.hold is Hold.PAUSED for other in same) else []
