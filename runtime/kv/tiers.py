"""The two tiers: who gets a page, what is evicted for it, and every copy that is in flight.

Works on nodes and leases; which context has which lease is the ledger's business. All pages are given away and taken
back here, and every copy begins and ends here, so "a page is never reused while a copy still uses it" has one owner.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from caesura.runtime.errors import BrokenInvariant
from caesura.runtime.kv.node import Hold, Node, PrefixLease, Transfer
from caesura.runtime.kv.pages import Handle, PagePool, PageState, row, rows
from caesura.runtime.kv.radix import RadixTree
from caesura.scheduler.ledger import Reclaimed, Segment
from caesura.scheduler.types import Action, ContextId, Move, MoveId, MoveKind


class Tiers:
    """Device and host pool, the tree that says what lies in them, and the copies between them."""

    def __init__(self, page_size: int, num_device_pages: int, num_host_pages: int) -> None:
        self.page_size = page_size
        self.device = PagePool(num_device_pages, "device")
        self.host = PagePool(num_host_pages, "host")
        self.tree = RadixTree(page_size)
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
                self.host.free(self.tree.remove(child))
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
        self.host.free(self.tree.remove(node))

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
        device = [handle for node in nodes for handle in node.device]
        host = [handle for node in nodes for handle in node.host]
        out = kind is MoveKind.OUT
        self.device.mark(device, PageState.COPYING_OUT if out else PageState.COPYING_IN)
        self.host.mark(host, PageState.COPYING_IN if out else PageState.COPYING_OUT)
        for node in nodes:
            self.tree.set_transfer(node, transfer)
        source, target = (device, host) if out else (host, device)
        self.begun.append(Move(transfer.id, kind, rows(source), rows(target)))
        self.transfers[transfer.id] = transfer

    def acknowledge(self, move: MoveId) -> None:
        """The copy has been made: both ends are ordinary pages again, and a run marked as leaving goes."""
        transfer = self.transfers.pop(move, None)
        if transfer is None:
            raise BrokenInvariant(f"move {move} acknowledged, but it is not in flight")
        for node in transfer.nodes:
            self.device.mark(node.device, PageState.USED)
            self.host.mark(node.host, PageState.USED)
            self.tree.set_transfer(node, None)
        deepest_first = sorted(transfer.nodes, key=lambda node: -node.start)
        for node in deepest_first:
            self._depart(node)
        for node in deepest_first:
            for end in [*node.children.values()][:1] + [node]:
                if end.id in self.tree.nodes:
                    self.tree.merge(end)

    def _depart(self, node: Node | None) -> None:
        """A run marked as leaving goes once it is copied and the device holds nothing below; then those above it."""
        while node is not None and node.leaving and node.transfer is None and self._clear_below(node):
            self.off_device(node)
            node = node.parent

    def copy_out(self, node: Node) -> int:
        """Begin a host copy of a run that has none; returns its tokens, 0 when there is no room or no need."""
        if node.host or node.transfer is not None or not node.device:
            return 0
        pages = self._host_pages(len(node.device))
        if pages is None:
            return 0
        self.tree.set_host(node, pages)
        self._begin(MoveKind.OUT, [node])
        return len(node.tokens)

    def _host_pages(self, count: int) -> list[Handle] | None:
        if count > self.host.num_free + self.tree.spare_host_pages:
            return None
        while self.host.num_free < count:
            self.drop_host_copy(self.tree.next_host_victim())
        return self.host.allocate(count)

    def drop_host_copy(self, node: Node | None) -> None:
        """Free a host run that may go; it leaves the tree when it was nowhere else."""
        if node is None:
            raise BrokenInvariant(f"{self.tree.spare_host_pages} host pages said to be spare, none found")
        if node.device:
            self.host.free(self.tree.set_host(node, []))
        else:
            self.host.free(self.tree.remove(node))

    def host_tokens(self, lease: PrefixLease, tokens: Sequence[int], limit: int) -> int:
        """Tokens after the computed ones that are on the host, or on their way to the device already."""
        found = list(self.tree.walk(lease.node.frontier(), tokens, limit))
        if all(node.device_ready for node, _ in found):
            return 0
        return max(0, sum(length for _, length in found) - lease.ahead)

    def load(self, lease: PrefixLease, tokens: Sequence[int], limit: int) -> int:
        """Begin copying in what follows the lease's usable part, as far as pages reach; returns its tokens.

        The lease is anchored behind what is coming before a page is asked for, so nothing of it can be evicted.
        """
        if not self.host_tokens(lease, tokens, limit):
            return 0
        origin = lease.node
        chain = list(self.tree.walk(origin.frontier(), tokens, limit))
        last, length = chain[-1]
        nodes = [node for node, _ in chain]
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
        if fresh:
            self._begin(MoveKind.IN, fresh)
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

    # -- taking memory from paused contexts -------------------------------------------------------------------

    def segments(self, leases: Iterable[PrefixLease]) -> list[Segment]:
        """What paused leases alone hold on the device: runs of the tree, and unfinished last pages."""
        found: dict[int, tuple[Node, list[ContextId]]] = {}
        tails: list[Segment] = []
        for lease in leases:
            if lease.hold is not Hold.PAUSED:
                continue
            node = lease.node
            while not node.running and node.parent is not None:
                if node.device:
                    found.setdefault(node.id, (node, []))[1].append(lease.holder)
                node = node.parent
            sharers = self._sharers(lease)
            if sharers and sharers[0] is lease:
                tails.append(
                    Segment(
                        id=-lease.holder - 1,
                        parent=lease.node.id if lease.node.id in found else None,
                        start=lease.node.end,
                        num_tokens=lease.ahead,
                        num_pages=len(lease.tail),
                        on_host=False,
                        leaving=False,
                        holders=tuple(sharer.holder for sharer in sharers),
                    )
                )
        runs = [
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
        return runs + tails

    def _sharers(self, lease: PrefixLease) -> list[PrefixLease]:
        """The paused leases whose tail is this one's; none when somebody running or a copy uses it besides."""
        if not lease.tail:
            return []
        owners = self.device.owners(lease.tail[0])
        same = [lease]
        if owners > 1:
            same = [other for other in lease.node.leases.values() if other.tail[:1] == lease.tail[:1]]
        return same if len(same) == owners and all(other.hold is Hold.PAUSED for other in same) else []

    def reclaim_tail(self, lease: PrefixLease, action: Action) -> Reclaimed:
        """Give up an unfinished last page: neither the host nor the cache takes it, so it will be recomputed."""
        if action is Action.PRESERVE or lease.hold is not Hold.PAUSED:
            return Reclaimed(0, 0, action)
        before = self.takeable_pages
        for sharer in self._sharers(lease):
            self.cut_tail(sharer, 0)
        return Reclaimed(self.takeable_pages - before, 0, Action.DISCARD)

    def reclaim(self, node: Node, num_pages: int, action: Action) -> Reclaimed:
        """Take the last ``num_pages`` of a run that paused leases hold, by ``action`` or a weaker one."""
        nothing = Reclaimed(0, 0, action)
        if action is Action.PRESERVE or num_pages < 1 or not node.device or node.running or not node.paused:
            return nothing
        before = self.takeable_pages
        clear = self._clear_below(node)
        follows = action is Action.SWAP and all(child.leaving for child in node.children.values() if child.device)
        if node.leaving or not (clear or follows):
            return nothing
        if num_pages < len(node.device):
            self.tree.split(node, (len(node.device) - num_pages) * self.page_size)
        if action is Action.RELEASE:
            self._let_go(node)
            pending = len(node.device) if node.moving else 0
            return Reclaimed(self.takeable_pages - before, pending, action)
        if node.transfer is None and action is Action.SWAP and node.host and clear:
            self.off_device(node)
            return Reclaimed(self.takeable_pages - before, 0, action)
        if node.transfer is not None or (action is Action.SWAP and (node.host or self.copy_out(node))):
            self.tree.mark_leaving(node)  # either end of the copy will do: then the host has it all
            for lease in node.leases.values():
                self.cut_tail(lease, 0)
            return Reclaimed(self.takeable_pages - before, len(node.device), Action.SWAP)
        if not clear:
            return nothing
        self._let_go(node)
        self.forget(node)
        return Reclaimed(self.takeable_pages - before, 0, Action.DISCARD)

    def _clear_below(self, node: Node) -> bool:
        """Evict what nobody needs below ``node``; says whether the device holds nothing there any more."""
        for child in [child for child in node.children.values() if child.device and not child.pinned]:
            for below in reversed(child.subtree()):
                if below.device:
                    self._evict(below, len(below.device))
        return not node.device_children

    def _let_go(self, node: Node) -> None:
        """Anchor every lease at or below ``node`` above it."""
        above = node.parent
        if above is None:
            raise BrokenInvariant(f"the root (node {node.id}) has no pages to let go of")
        for below in node.subtree():
            for lease in list(below.leases.values()):
                self.anchor(lease, above)
