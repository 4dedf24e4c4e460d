"""The tiers: who gets a page, what is evicted for it, and every copy that is in flight.

Works on nodes and leases; which context has which lease is the ledger's business. All pages are given away and taken
back here, and every copy begins and ends here, so "a page is never reused while a copy still uses it" has one owner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from caesura.runtime.errors import BrokenInvariant
from caesura.runtime.kv.below import Below
from caesura.runtime.kv.node import Node, PrefixLease, Transfer
from caesura.runtime.kv.pages import Handle, PagePool, PageState, row, rows
from caesura.runtime.kv.radix import RadixTree
from caesura.runtime.kv.spoiled import purge
from caesura.scheduler.types import Move, MoveId, MoveKind


class Tiers:
    """The device pool and what is below it, the tree that says what lies where, and the copies between them."""

    def __init__(
        self,
        page_size: int,
        num_device_pages: int,
        num_host_pages: int,
        num_disk_pages: int,
        disk_pays: Callable[[int, int], bool],
    ) -> None:
        self.page_size = page_size
        self.device = PagePool(num_device_pages, "device")
        self.tree = RadixTree(page_size, disk_pays)
        self.below = Below(self.tree, num_host_pages, num_disk_pages, disk_pays)
        self.tick = 0
        self.evicted = 0
        self.transfers: dict[MoveId, Transfer] = {}
        self.begun: list[Move] = []
        self.copies: dict[Handle, tuple[Move, Handle]] = {}  # copy-on-write not yet taken: target to (move, source)
        self.step_pages: list[Handle] = []  # both ends of the copies that the present step carries out
        self._next_move = 0

    @property
    def takeable_pages(self) -> int:
        """Device pages to be had at once."""
        return self.device.num_free + self.tree.evictable_pages

    @property
    def pending_pages(self) -> int:
        """Device pages that can be had when the copies in flight have ended."""
        leaving: dict[int, int] = {}
        for transfer in self.transfers.values():
            for moving in transfer.nodes:
                node: Node | None = moving
                while node is not None and node.leaving and node.id not in leaving:
                    leaving[node.id] = len(node.device) if node.paused else 0
                    node = node.parent
        return sum(leaving.values()) + self.tree.blocked_pages

    # -- giving and taking pages ------------------------------------------------------------------------------

    def allocate(self, count: int) -> list[Handle] | None:
        """``count`` device pages, evicting for them; None (and nothing evicted) when they cannot be had."""
        if count > self.takeable_pages:
            return None
        while self.device.num_free < count:
            self._evict(self.tree.next_device_victim(), count - self.device.num_free)
        return self.device.allocate(count)

    def _evict(self, node: Node | None, wanted: int) -> None:
        """Take an unpinned node off the device: whole when the host has it too, else ``wanted`` from its end."""
        if node is None:
            raise BrokenInvariant(f"{self.tree.evictable_pages} pages said to be evictable, none found")
        taken = len(node.device) if node.host else min(wanted, len(node.device))
        self.evicted += taken
        if node.host:
            self.off_device(node)
        elif taken == len(node.device):
            self.forget(node)
        else:
            for child in list(node.children.values()):  # what follows the cut is out of reach
                self.below.free(self.tree.remove(child))
            self.device.free(self.tree.trim(node, taken))

    def off_device(self, node: Node) -> None:
        """Free a node's device pages; the tails of leases anchored there follow nothing now and go as well."""
        for lease in node.leases.values():
            self.cut_tail(lease, 0)
        node.leaving = False
        self.device.free(self.tree.set_device(node, []))

    def forget(self, node: Node) -> None:
        """Free an unpinned node everywhere, with the host-only runs below it."""
        self.device.free(self.tree.set_device(node, []))
        self.below.free(self.tree.remove(node))

    def remove(self, top: Node) -> None:
        """Free an unpinned node and all below it, on every tier; those above it may have waited for that to leave."""
        above = top.parent
        for node in reversed(top.subtree()):
            if node.device:
                self.device.free(self.tree.set_device(node, []))
        self.below.free(self.tree.remove(top))
        self._depart(above)

    def cut_tail(self, lease: PrefixLease, num_tokens: int) -> int:
        """Keep the first ``num_tokens`` computed in the tail and free the pages behind; returns how many."""
        lease.ahead = min(lease.ahead, num_tokens)
        lease.reserved = 0
        keep = -(-lease.ahead // self.page_size)
        gone = lease.tail[keep:]
        if not gone:
            return 0
        del lease.tail[keep:]
        lease.rows = None
        for handle in gone:
            if handle in self.copies and not self.device.is_shared(handle):  # not taken yet: call the copy off
                _, source = self.copies.pop(handle)
                self.device.free([source])
        return self.device.free(gone)

    def anchor(self, lease: PrefixLease, node: Node) -> None:
        """Move a lease to another node of its path (or deeper along its tokens), giving up the tail."""
        self.cut_tail(lease, 0)
        lease.rows = None
        self.tree.move_lease(lease, node, self.tick)

    # -- copies within the device -----------------------------------------------------------------------------

    def copy_on_write(self, source: Handle, target: Handle) -> None:
        """``target`` stands in for ``source``, whose reference passes to the copy until the step is over.

        Copies of one step run in no order, so a source that is itself yet to be written is copied from its origin.
        """
        if source in self.copies:
            _, origin = self.copies[source]
            self.device.share(origin)
            self.device.free([source])
            source = origin
        move = Move(self._move_id(), MoveKind.COPY, (row(source),), (row(target),))
        self.copies[target] = (move, source)

    def take_copies(self) -> tuple[Move, ...]:
        self.end_step()
        for target, (_, source) in self.copies.items():
            self.device.share(target)
            self.step_pages += (source, target)
        moves = tuple(move for move, _ in self.copies.values())
        self.copies.clear()
        return moves

    def end_step(self) -> None:
        """The step that carried the taken copies out is over."""
        if self.step_pages:
            self.device.free(self.step_pages)
            self.step_pages = []

    # -- copies between the tiers -----------------------------------------------------------------------------

    def _move_id(self) -> MoveId:
        self._next_move += 1
        return MoveId(self._next_move)

    def _begin(self, kind: MoveKind, nodes: list[Node]) -> None:
        transfer = Transfer(self._move_id(), kind, nodes)
        source = [handle for node in nodes for handle in (node.device if kind is MoveKind.OUT else node.host)]
        target = [handle for node in nodes for handle in _target(kind, node)]
        self._pool(kind is MoveKind.OUT).mark(source, PageState.COPYING_OUT)
        self._pool(kind is MoveKind.IN).mark(target, PageState.COPYING_IN)
        for node in nodes:
            self.tree.set_transfer(node, transfer)
        self.begun.append(Move(transfer.id, kind, rows(source), rows(target)))
        self.transfers[transfer.id] = transfer

    def _pool(self, on_device: bool) -> PagePool | Below:
        return self.device if on_device else self.below

    def acknowledge(self, move: MoveId, *, failed: bool = False) -> None:
        """The copy has ended: both ends are ordinary pages again, and a run marked as leaving goes.

        ``failed``: it brought nothing. A copy out or down leaves the run where it was, and the file is not written
        any more. What a copy in should have brought is forgotten with all below it, so that it is computed again.
        """
        transfer = self.transfers.get(move)
        if transfer is None or transfer.failed:
            raise BrokenInvariant(f"move {move} acknowledged, but it is not in flight")
        if failed and transfer.kind is MoveKind.IN:
            transfer.failed = True
        else:
            self._end(transfer, failed)
        for lost in [transfer for transfer in self.transfers.values() if transfer.failed]:
            self._give_up(lost)

    def _end(self, transfer: Transfer, failed: bool) -> None:
        del self.transfers[transfer.id]
        for node in transfer.nodes:
            self._unmark(node)
            if transfer.kind is MoveKind.DOWN:
                self.below.arrived(node, failed=failed)
            self.tree.set_transfer(node, None)
        self.below.disk_writable = self.below.disk_writable and not failed
        deepest_first = sorted(transfer.nodes, key=lambda node: -node.start)
        kept = deepest_first if failed and transfer.kind is MoveKind.OUT else []
        for node in kept:
            self.tree.mark_leaving(node, False)
            self.below.free(self.tree.set_host(node, []))
        for node in kept:
            self._depart(node.parent)
        for node in deepest_first:
            self._depart(node)
        for node in deepest_first:
            purge(self, node)  # before merging, in which a run that waited for this would take the place of its parent
        for node in deepest_first:
            if node.id in self.tree.nodes:
                for end in [*node.children.values()][:1] + [node]:
                    if end.id in self.tree.nodes:
                        self.tree.merge(end)

    def _unmark(self, node: Node) -> None:
        """The ends of a node's copy are ordinary pages again."""
        kind = node.transfer.kind if node.transfer is not None else None
        if kind is MoveKind.DOWN:
            self.below.mark(node.sinking, PageState.USED)
        else:
            self.device.mark(node.device, PageState.USED)
        self.below.mark(node.host, PageState.USED)

    def _give_up(self, failed: Transfer) -> None:
        """Forget what a failed copy in should have brought, unless something else still moves below it."""
        while failed.nodes:
            top = min(failed.nodes, key=lambda node: node.start)
            gone = top.subtree()
            if any(node.transfer is not None and not node.transfer.failed for node in gone):
                return
            for node in gone:
                transfer = node.transfer
                if transfer is not None:
                    self._unmark(node)
                    self.tree.set_transfer(node, None)
                    transfer.nodes.remove(node)
                    if not transfer.nodes:
                        del self.transfers[transfer.id]
            self.let_go(top)
            above = top.parent
            self.remove(top)
            if above is not None:
                purge(self, above)  # it may have waited for this to end

    def _depart(self, node: Node | None) -> None:
        """A run marked as leaving goes once it is copied and the device holds nothing below; then those above it.

        One whose followers have stayed, since their copies failed, stays as well.
        """
        while node is not None and node.leaving and node.transfer is None:
            if self.clear_below(node):
                self.off_device(node)
            elif any(child.leaving for child in node.children.values()):
                return
            else:
                self.tree.mark_leaving(node, False)
            node = node.parent

    def sink(self) -> int:
        """When host memory is short, begin to move a run to the disk; returns its tokens. One at a time."""
        if any(transfer.kind is MoveKind.DOWN for transfer in self.transfers.values()):
            return 0
        node = self.below.next_to_sink()
        if node is None:
            return 0
        self._begin(MoveKind.DOWN, [node])
        return len(node.tokens)

    def copy_out(self, node: Node) -> int:
        """Begin a host copy of a run that has none; returns its tokens, 0 when there is no room or no need."""
        if node.host or node.transfer is not None or not node.device:
            return 0
        if not self.below.give(node):
            return 0
        self._begin(MoveKind.OUT, [node])
        return len(node.tokens)

    def host_tokens(self, lease: PrefixLease, tokens: Sequence[int], limit: int) -> int:
        """Tokens after the computed ones that lie below the device, or are on their way to it already."""
        found = list(self.tree.walk(lease.node.frontier(), tokens, limit))
        if all(node.device_ready for node, _ in found):
            return 0
        return max(0, sum(length for _, length in found) - lease.ahead)

    def disk_tokens(self, lease: PrefixLease, tokens: Sequence[int], limit: int) -> int:
        """Those of ``host_tokens`` that would have to be read from the disk."""
        found = self.tree.walk(lease.node.frontier(), tokens, limit)
        return sum(length for node, length in found if not node.device and node.on_disk)

    def load(self, lease: PrefixLease, tokens: Sequence[int], limit: int) -> int:
        """Begin copying in what follows the lease's usable part, as far as pages reach; returns its tokens.

        The lease is anchored behind what is coming before a page is asked for, so nothing of it can be evicted.
        What is on its way down to the disk has to get there first: then there is nothing to do but wait for it.
        """
        if not self.host_tokens(lease, tokens, limit):
            return 0
        origin = lease.node
        chain = list(self.tree.walk(origin.frontier(), tokens, limit))
        ready = next((at for at, (node, _) in enumerate(chain) if node.sinking and not node.device), len(chain))
        if all(node.device_ready for node, _ in chain[:ready]):
            sinking, length = chain[ready]
            lease.awaits = {sinking.transfer.id} if sinking.transfer is not None else set()
            return length - lease.ahead
        last, length = chain[ready - 1]
        nodes = [node for node, _ in chain[:ready]]
        if length < len(last.tokens):
            nodes[-1] = self.tree.split(last, length)
        if nodes[-1].end > origin.end:
            self.tree.move_lease(lease, nodes[-1], self.tick)
        coming, num_tokens = self._within_reach(nodes)
        num_tokens -= lease.ahead
        if num_tokens <= 0:
            self.tree.move_lease(lease, origin, self.tick)
            return 0
        self.anchor(lease, max(origin, coming[-1], key=lambda node: node.end))
        fresh = [node for node in coming if not node.device]
        for node in fresh:
            pages = self.allocate(len(node.host))
            if pages is None:
                raise BrokenInvariant(f"no pages for node {node.id} after counting {self.takeable_pages}")
            self.tree.set_device(node, pages)
        for on_disk in (False, True):  # one move each, so that a fault of the disk takes nothing else along
            if part := [node for node in fresh if node.on_disk is on_disk]:
                self._begin(MoveKind.IN, part)
        lease.awaits = {node.transfer.id for node in coming if node.transfer is not None and not node.device_ready}
        return num_tokens

    def _within_reach(self, nodes: list[Node]) -> tuple[list[Node], int]:
        """The leading nodes that are on the device or fit there; the last is cut to what fits. And their tokens."""
        room = self.takeable_pages
        reached: list[Node] = []
        for node in nodes:
            needed = 0 if node.device else len(node.host)
            if needed > room:
                if room:
                    reached.append(self.tree.split(node, room * self.page_size))
                break
            room -= needed
            reached.append(node)
        return reached, sum(len(node.tokens) for node in reached)

    # -- making way -------------------------------------------------------------------------------------------

    def clear_below(self, node: Node) -> bool:
        """Evict what nobody needs below ``node``; says whether the device holds nothing there any more."""
        for child in [child for child in node.children.values() if child.device and not child.pinned]:
            for below in reversed(child.subtree()):
                if below.device:
                    self._evict(below, len(below.device))
        return not node.device_children

    def let_go(self, node: Node) -> None:
        """Anchor every lease at or below ``node`` above it."""
        above = node.parent
        if above is None:
            raise BrokenInvariant(f"the root (node {node.id}) has no pages to let go of")
        for below in node.subtree():
            for lease in list(below.leases.values()):
                self.anchor(lease, above)


def _target(kind: MoveKind, node: Node) -> list[Handle]:
    """The pages that a copy of ``node``'s run fills."""
    if kind is MoveKind.IN:
        return node.device
    return node.host if kind is MoveKind.OUT else node.sinking
