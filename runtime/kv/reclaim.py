"""Taking memory from paused contexts: a run of the tree, or an unfinished last page, by an action or a weaker one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from caesura.runtime.kv.node import Hold, Node, PrefixLease
from caesura.runtime.kv.segments import sharers
from caesura.scheduler.ledger import Reclaimed
from caesura.scheduler.types import Action

if TYPE_CHECKING:
    from caesura.runtime.kv.tiers import Tiers


def reclaim_tail(tiers: Tiers, lease: PrefixLease, action: Action) -> Reclaimed:
    """Give up an unfinished last page: neither the host nor the cache takes it, so it will be recomputed."""
    if action is Action.PRESERVE or lease.hold is not Hold.PAUSED:
        return Reclaimed(0, 0, action)
    before = tiers.takeable_pages
    for sharer in sharers(tiers.device, lease):
        tiers.cut_tail(sharer, 0)
    return Reclaimed(tiers.takeable_pages - before, 0, Action.DISCARD)


def reclaim_run(tiers: Tiers, node: Node, num_pages: int, action: Action) -> Reclaimed:
    """Take the last ``num_pages`` of a run that paused leases hold."""
    nothing = Reclaimed(0, 0, action)
    num_pages = min(num_pages, len(node.device))
    if action is Action.PRESERVE or num_pages < 1 or node.running or not node.paused:
        return nothing
    before = tiers.takeable_pages
    clear = tiers.clear_below(node)
    follows = action is Action.SWAP and all(child.leaving for child in node.children.values() if child.device)
    if node.leaving or not (clear or follows):
        return nothing
    if num_pages == len(node.device):
        return _take_whole(tiers, node, action, before, clear=clear)
    rest = tiers.tree.split(node, (len(node.device) - num_pages) * tiers.page_size)
    return replace(_take_whole(tiers, node, action, before, clear=clear), rest=rest.id)


def _take_whole(tiers: Tiers, node: Node, action: Action, before: int, *, clear: bool) -> Reclaimed:
    """``clear``: the device holds nothing below. ``before``: pages to take before any of this."""
    if action is Action.RELEASE:
        return _release(tiers, node, before)
    if node.transfer is None and action is Action.SWAP and node.host and clear:
        tiers.off_device(node)
        return Reclaimed(tiers.takeable_pages - before, 0, action)
    if node.transfer is not None or (action is Action.SWAP and (node.host or tiers.copy_out(node))):
        tiers.tree.mark_leaving(node)  # either end of the copy will do: then the host has it all
        for lease in node.leases.values():
            tiers.cut_tail(lease, 0)
        return Reclaimed(tiers.takeable_pages - before, len(node.device), Action.SWAP)
    if not clear:
        return Reclaimed(0, 0, action)
    if node.moving:  # what follows it is on its way down to the disk, and can only go when it is there
        return _release(tiers, node, before)
    tiers.let_go(node)
    tiers.forget(node)
    return Reclaimed(tiers.takeable_pages - before, 0, Action.DISCARD)


def _release(tiers: Tiers, node: Node, before: int) -> Reclaimed:
    tiers.let_go(node)
    return Reclaimed(tiers.takeable_pages - before, len(node.device) if node.moving else 0, Action.RELEASE)
