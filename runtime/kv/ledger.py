"""The ledger: which pages every context has, on which tier, and which copies are in flight. Ints only.

A context has a *lease* on a path of the radix tree (its whole pages, shared or not) and a *tail* (the pages
after the lease: being computed, or not full yet). Whole pages move from the tail into the tree at every commit, so
between steps a tail is at most one unfinished page - and that page alone is shared by copy-on-write at a fork.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from caesura.runtime.errors import BrokenInvariant
from caesura.runtime.kv.node import Hold, Node, PrefixLease, Transfer
from caesura.runtime.kv.pages import Handle, PagePool, PageState, row, rows
from caesura.runtime.kv.radix import RadixTree
from caesura.scheduler.ledger import Reclaimed, Segment
from caesura.scheduler.types import Action, ContextId, Move, MoveId, MoveKind, PageId


@dataclass(slots=True)
class Holding:
    """One context's KV. ``computed`` lies between the lease's end and the end of the tail."""

    namespace: str
    lease: PrefixLease | None = None
    tail: list[Handle] = field(default_factory=list)
    computed: int = 0
    table: list[PageId] = field(default_factory=list)
    awaits: set[MoveId] = field(default_factory=set)

    @property
    def leased(self) -> int:
        return self.lease.num_tokens if self.lease is not None else 0


class KVLedger:
    """Implements ``caesura.scheduler.ledger.Ledger`` over two page pools and a radix tree."""

    def __init__(self, page_size: int, num_device_pages: int, num_host_pages: int = 0) -> None:
        self.page_size = page_size
        self.device = PagePool(num_device_pages, "device")
        self.host = PagePool(num_host_pages, "host")
        self.tree = RadixTree(page_size)
        self.holdings: dict[ContextId, Holding] = {}
        self.transfers: dict[MoveId, Transfer] = {}
        self._tick = 0
        self._next_move = 0
        self._begun: list[Move] = []
        self._copies: list[Move] = []
        self._copied: list[Handle] = []  # copy-on-write sources, kept until the step that copies them is over
        self._evicted = 0

    # -- counters ---------------------------------------------------------------------------------------------

    @property
    def num_device_pages(self) -> int:
        return self.device.num_pages

    @property
    def num_host_pages(self) -> int:
        return self.host.num_pages

    @property
    def free_pages(self) -> int:
        return self.device.num_free

    @property
    def evictable_pages(self) -> int:
        return self.tree.unheld_pages

    @property
    def pending_pages(self) -> int:
        return sum(
            len(node.device)
            for transfer in self.transfers.values()
            if transfer.drop_device
            for node in transfer.nodes
            if not node.running
        )

    @property
    def copying_pages(self) -> int:
        return sum(len(node.device) for transfer in self.transfers.values() for node in transfer.nodes)

    def advance(self, tick: int) -> None:
        self._tick = tick

    # -- life of a holding ------------------------------------------------------------------------------------

    def open(self, context: ContextId, namespace: str) -> None:
        if context in self.holdings:
            raise BrokenInvariant(f"context {context} opened twice")
        self.holdings[context] = Holding(namespace)

    def close(self, context: ContextId, *, keep_cached: bool = True) -> None:
        if keep_cached:
            self.release(context)
        else:
            self.discard(context)
        del self.holdings[context]

    def computed(self, context: ContextId) -> int:
        return self.holdings[context].computed

    def held_tokens(self, context: ContextId) -> int:
        holding = self.holdings[context]
        if holding.lease is None:
            return 0
        on_device = sum(len(node.tokens) for node in holding.lease.node.path() if node.device)
        return on_device + max(0, holding.computed - holding.leased)

    def exclusive_tokens(self, context: ContextId) -> int:
        holding = self.holdings[context]
        if holding.lease is None:
            return 0
        pages = self.tree.exclusive_pages(holding.lease)
        return pages * self.page_size + max(0, holding.computed - holding.leased)

    def table(self, context: ContextId) -> tuple[PageId, ...]:
        return tuple(self.holdings[context].table)

    def is_loading(self, context: ContextId) -> bool:
        return bool(self.holdings[context].awaits)

    def acquire(self, context: ContextId, tokens: Sequence[int], limit: int) -> int:
        holding = self.holdings[context]
        if holding.awaits:
            return holding.computed
        lease = holding.lease
        if lease is None:
            lease = holding.lease = self.tree.lease_root(holding.namespace, context, Hold.RUNNING)
        self.tree.set_hold(lease, Hold.RUNNING)
        ready = self._device_depth(lease.node)
        if ready.end < lease.num_tokens:  # the rest is on the host: keep the claim until load or extend decides
            self._drop_tail(holding)
            holding.computed = min(holding.computed, ready.end)
            holding.table = holding.table[: ready.end // self.page_size]
        match = self.tree.probe(holding.namespace, tokens, limit)
        if match.device_tokens > max(holding.computed, lease.num_tokens):
            self._drop_tail(holding)
            self.tree.deepen(lease, holding.namespace, tokens, limit, self._tick)
            holding.computed = lease.num_tokens
            holding.table = self._rows_of(lease.node)
        return holding.computed

    @staticmethod
    def _device_depth(node: Node) -> Node:
        """The deepest node on the path down to which all pages are on the device and usable."""
        path = node.path()
        ready = path[0].parent if path else node
        for below in path:
            if not below.device_ready:
                break
            ready = below
        assert ready is not None
        return ready

    def _retreat(self, holding: Holding, node: Node) -> None:
        """Anchor the lease at ``node``, an ancestor of where it is (or the same)."""
        lease = holding.lease
        assert lease is not None
        if lease.node is node:
            return
        self._drop_tail(holding)
        self.tree.move_lease(lease, node, self._tick)
        holding.computed = min(holding.computed, node.end)
        holding.table = holding.table[: holding.computed // self.page_size]

    def _drop_tail(self, holding: Holding) -> int:
        freed = self.device.free(holding.tail)
        holding.tail = []
        holding.computed = min(holding.computed, holding.leased)
        del holding.table[holding.leased // self.page_size :]
        return freed

    @staticmethod
    def _rows_of(node: Node) -> list[PageId]:
        return [page for above in node.path() for page in rows(above.device)]

    def pause(self, context: ContextId) -> None:
        holding = self.holdings[context]
        if holding.lease is not None:
            self._settle(holding)
            self.tree.set_hold(holding.lease, Hold.PAUSED)

    def _settle(self, holding: Holding) -> None:
        """Give back tail pages allocated ahead of what was computed, and stop waiting for copies."""
        if holding.awaits:
            holding.awaits.clear()
            assert holding.lease is not None
            self._retreat(holding, self._device_depth(holding.lease.node))
        keep = -(-max(0, holding.computed - holding.leased) // self.page_size)
        self.device.free(holding.tail[keep:])
        del holding.tail[keep:]
        del holding.table[holding.leased // self.page_size + keep :]

    def release(self, context: ContextId) -> None:
        holding = self.holdings[context]
        if holding.lease is None:
            return
        holding.awaits.clear()
        self._drop_tail(holding)
        self.tree.release(holding.lease, self._tick)
        holding.lease, holding.computed, holding.table = None, 0, []

    def discard(self, context: ContextId) -> int:
        holding = self.holdings[context]
        if holding.lease is None:
            return 0
        before = self.device.num_free
        path = holding.lease.node.path()
        self.release(context)
        for node in reversed(path):
            if node.held or node.children or node.transfer is not None:
                break
            self._forget(node)
        return self.device.num_free - before

    def truncate(self, context: ContextId, num_tokens: int) -> None:
        holding = self.holdings[context]
        if num_tokens >= holding.computed and not holding.awaits:
            return
        self._settle(holding)
        if num_tokens < holding.leased:
            assert holding.lease is not None
            node, keep = holding.lease.node, num_tokens // self.page_size * self.page_size
            while node.parent is not None and node.start >= keep:
                node = node.parent
            if node.parent is not None and node.end > keep:
                node = self.tree.split(node, keep - node.start)
            self._retreat(holding, node)
        holding.computed = min(holding.computed, num_tokens)
        self._settle(holding)

    def fork(self, parent: ContextId, child: ContextId) -> None:
        source, target = self.holdings[parent], self.holdings[child]
        target.namespace = source.namespace
        if source.lease is None:
            return
        ready = self._device_depth(source.lease.node)
        target.lease = self.tree.lease_root(source.namespace, child, Hold.PAUSED)
        self.tree.move_lease(target.lease, source.lease.node, self._tick)
        target.computed = min(source.computed, ready.end)
        if ready is source.lease.node and source.computed > source.leased:
            keep = -(-(source.computed - source.leased) // self.page_size)
            target.tail = source.tail[:keep]
            for handle in target.tail:
                self.device.share(handle)
            target.computed = source.computed
        target.table = self._rows_of(ready) + list(rows(target.tail))

    # -- growing ----------------------------------------------------------------------------------------------

    def _lacking(self, holding: Holding, num_tokens: int) -> tuple[int, bool]:
        """Pages to allocate, and whether the first one replaces a shared unfinished page."""
        pages = -(-num_tokens // self.page_size) - len(holding.table)
        unfinished = max(0, holding.computed - holding.leased) // self.page_size
        shared = unfinished < len(holding.tail) and self.device.is_shared(holding.tail[unfinished])
        return max(0, pages) + shared, shared

    def shortfall(self, context: ContextId, num_tokens: int) -> int:
        lacking, _ = self._lacking(self.holdings[context], num_tokens)
        return max(0, lacking - self.free_pages - self.evictable_pages - self.pending_pages)

    def extend(self, context: ContextId, num_tokens: int) -> bool:
        holding = self.holdings[context]
        if holding.lease is not None and holding.computed < holding.leased:  # not loaded after all: recompute
            self._retreat(holding, self._device_depth(holding.lease.node))
        lacking, shared = self._lacking(holding, num_tokens)
        pages = self._allocate(lacking)
        if pages is None:
            return False
        if shared:
            at = (holding.computed - holding.leased) // self.page_size
            old, new = holding.tail[at], pages.pop(0)
            holding.tail[at] = new
            holding.table[holding.leased // self.page_size + at] = row(new)
            self._copied.append(old)
            self._copies.append(Move(self._move_id(), MoveKind.COPY, (row(old),), (row(new),)))
        holding.tail.extend(pages)
        holding.table.extend(rows(pages))
        return True

    def commit(self, context: ContextId, tokens: Sequence[int], num_computed: int) -> None:
        holding = self.holdings[context]
        if holding.lease is None or num_computed < holding.computed:
            raise BrokenInvariant(f"context {context}: commit of {num_computed} after {holding.computed}")
        holding.computed = num_computed
        start = holding.leased
        end = num_computed // self.page_size * self.page_size
        count = (end - start) // self.page_size
        if count > 0:
            done = self.tree.publish(holding.lease, tokens[start:end], holding.tail[:count], self._tick)
            first = start // self.page_size
            published = done.num_tokens // self.page_size
            holding.table[first : first + published] = rows(done.kept)
            del holding.tail[:published]
            self.device.free(done.surplus)
        if self._copied:
            self.device.free(self._copied)
            self._copied = []

    def _allocate(self, count: int) -> list[Handle] | None:
        if count > self.device.num_free + self.tree.unheld_pages:
            return None
        while self.device.num_free < count:
            victim = self.tree.next_device_victim()
            if victim is None:
                return None
            self._evict(victim, count - self.device.num_free)
        return self.device.allocate(count)

    def _evict(self, node: Node, wanted: int) -> None:
        """Take up to ``wanted`` pages of an unheld node off the device, from its end."""
        taken = min(wanted, len(node.device))
        self._evicted += taken
        if taken < len(node.device):
            if not node.host and not node.children:
                self.device.free(self.tree.trim(node, taken))
                return
            self.tree.split(node, (len(node.device) - taken) * self.page_size)
        if node.host:
            self.device.free(self.tree.set_device(node, []))
        else:
            self._forget(node)

    def _forget(self, node: Node) -> None:
        """Free an unheld node everywhere, with the host-only runs below it."""
        self.device.free(self.tree.set_device(node, []))
        self.host.free(self.tree.remove(node))

    # -- between the tiers ------------------------------------------------------------------------------------

    def _move_id(self) -> MoveId:
        self._next_move += 1
        return MoveId(self._next_move)

    def _begin(self, kind: MoveKind, nodes: list[Node], *, drop_device: bool = False) -> Transfer:
        transfer = Transfer(self._move_id(), kind, nodes, drop_device)
        device = [handle for node in nodes for handle in node.device]
        host = [handle for node in nodes for handle in node.host]
        out = kind is MoveKind.OUT
        self.device.mark(device, PageState.COPYING_OUT if out else PageState.COPYING_IN)
        self.host.mark(host, PageState.COPYING_IN if out else PageState.COPYING_OUT)
        for node in nodes:
            node.transfer = transfer
        source, target = (device, host) if out else (host, device)
        self._begun.append(Move(transfer.id, kind, rows(source), rows(target)))
        self.transfers[transfer.id] = transfer
        return transfer

    def acknowledge(self, move: MoveId) -> None:
        transfer = self.transfers.pop(move)
        for node in transfer.nodes:
            self.device.mark(node.device, PageState.USED)
            self.host.mark(node.host, PageState.USED)
            node.transfer = None
        # deepest first: a parent leaves the device only after its children
        for node in sorted(transfer.nodes, key=lambda node: -node.start):
            if transfer.drop_device and not node.running and not node.device_children:
                self.device.free(self.tree.set_device(node, []))
                self._forget_tables_below(node)
            else:
                self.tree.touch(node, 0)
        for holding in self.holdings.values():
            if move in holding.awaits:
                holding.awaits.discard(move)
                if not holding.awaits and holding.lease is not None:
                    self._retreat(holding, self._device_depth(holding.lease.node))
                    holding.computed = holding.lease.num_tokens
                    holding.table = self._rows_of(holding.lease.node)

    def _forget_tables_below(self, node: Node) -> None:
        """Paused contexts at or below ``node`` can compute no further than its start now."""
        for below in node.subtree():
            for lease in below.leases:
                holding = self.holdings[ContextId(lease.holder)]
                self.device.free(holding.tail)
                holding.tail = []
                holding.computed = min(holding.computed, node.start)
                del holding.table[node.start // self.page_size :]

    def _host_pages(self, count: int) -> list[Handle] | None:
        while self.host.num_free < count:
            victim = self.tree.next_host_victim()
            if victim is None:
                return None
            self.host.free(self.tree.set_host(victim, []))
            if not victim.device:
                self.host.free(self.tree.remove(victim))
        return self.host.allocate(count)

    def _copy_out(self, node: Node, *, drop_device: bool) -> bool:
        pages = self._host_pages(len(node.device))
        if pages is None:
            return False
        self.tree.set_host(node, pages)
        self._begin(MoveKind.OUT, [node], drop_device=drop_device)
        return True

    def copy_out(self, segment: int) -> int:
        node = self.tree.nodes.get(segment)
        if node is None or node.host or node.transfer is not None or not node.device:
            return 0
        return len(node.tokens) if self._copy_out(node, drop_device=False) else 0

    def write_back(self, context: ContextId) -> int:
        lease = self.holdings[context].lease
        path = lease.node.path() if lease is not None else []
        return sum(self.copy_out(node.id) for node in path)

    def host_tokens(self, context: ContextId, tokens: Sequence[int], limit: int) -> int:
        holding = self.holdings[context]
        match = self.tree.probe(holding.namespace, tokens, limit)
        return max(0, match.device_tokens + match.host_tokens - holding.computed) if match.host_tokens else 0

    def load(self, context: ContextId, tokens: Sequence[int], limit: int) -> int:
        holding = self.holdings[context]
        lease = holding.lease
        if lease is None or holding.awaits:
            return 0
        coming: list[Node] = []
        fresh: list[Node] = []
        for node, length in self.tree.walk(holding.namespace, tokens, limit):
            if node.id not in self.tree.nodes:  # evicted by an allocation just made
                break
            if node.device_ready:
                continue
            if node.transfer is not None:  # on its way in for somebody else
                if length < len(node.tokens):
                    break
                coming.append(node)
                continue
            if not node.host_ready:
                break
            whole = node if length == len(node.tokens) else self.tree.split(node, length)
            pages = self._allocate(len(whole.host))
            if pages is None or whole.id not in self.tree.nodes or not whole.host:
                if pages is not None:
                    self.device.free(pages)
                break
            self.tree.set_device(whole, pages)
            self.tree.move_lease(lease, self._deeper(lease.node, whole), self._tick)
            coming.append(whole)
            fresh.append(whole)
        if not coming:
            return 0
        self._drop_tail(holding)
        self.tree.move_lease(lease, self._deeper(lease.node, coming[-1]), self._tick)
        if fresh:
            self._begin(MoveKind.IN, fresh)
        holding.awaits = {node.transfer.id for node in coming if node.transfer is not None}
        return sum(len(node.tokens) for node in coming)

    @staticmethod
    def _deeper(first: Node, second: Node) -> Node:
        return second if second.end > first.end else first

    # -- taking memory from paused contexts -------------------------------------------------------------------

    def segments(self) -> list[Segment]:
        holders: dict[int, list[ContextId]] = {}
        found: dict[int, Node] = {}
        tails: list[Segment] = []
        for context, holding in self.holdings.items():
            lease = holding.lease
            if lease is None or lease.hold is not Hold.PAUSED:
                continue
            node: Node | None = lease.node
            while node is not None and not node.running and node.parent is not None:
                if node.device:
                    found[node.id] = node
                holders.setdefault(node.id, []).append(context)
                node = node.parent
            if holding.tail:
                anchor = lease.node.id if lease.node.id in found else None
                length = holding.computed - holding.leased
                pages = len(holding.tail)
                tails.append(Segment(-context - 1, anchor, holding.leased, length, pages, False, False, (context,)))
        runs = [
            Segment(
                node.id,
                node.parent.id if node.parent is not None and node.parent.id in found else None,
                node.start,
                len(node.tokens),
                len(node.device),
                node.host_ready,
                node.transfer is not None,
                tuple(holders[node.id]),
            )
            for node in found.values()
        ]
        return runs + tails

    def reclaim(self, segment: int, num_pages: int, action: Action) -> Reclaimed:
        if segment < 0:
            holding = self.holdings.get(ContextId(-segment - 1))
            return Reclaimed(self._drop_tail(holding) if holding else 0, 0, Action.DISCARD)
        node = self.tree.nodes.get(segment)
        if node is None or not node.device or node.running or node.device_children:
            return Reclaimed(0, 0, action)
        before = self.device.num_free
        if num_pages < len(node.device):
            self.tree.split(node, (len(node.device) - num_pages) * self.page_size)
        if node.transfer is not None:
            if node.transfer.kind is MoveKind.OUT and action is not Action.RELEASE:
                self._drop_tails_below(node)
                node.transfer.drop_device = True
                return Reclaimed(self.device.num_free - before, len(node.device), Action.SWAP)
            return Reclaimed(0, 0, action)
        self._drop_tails_below(node)
        if action is Action.SWAP:
            if node.host:
                self.device.free(self.tree.set_device(node, []))
                self._forget_tables_below(node)
                return Reclaimed(self.device.num_free - before, 0, Action.SWAP)
            if self._copy_out(node, drop_device=True):
                return Reclaimed(self.device.num_free - before, len(node.device), Action.SWAP)
        above = node.parent
        assert above is not None
        for below in node.subtree():
            if below.transfer is not None:  # its host copy is being read or written; come back later
                return Reclaimed(self.device.num_free - before, 0, action)
        for below in node.subtree():
            for lease in list(below.leases):
                self._retreat(self.holdings[ContextId(lease.holder)], above)
        if not node.device_children:
            self._forget(node)
        return Reclaimed(self.device.num_free - before, 0, Action.DISCARD)

    def _drop_tails_below(self, node: Node) -> None:
        for below in node.subtree():
            for lease in below.leases:
                self._drop_tail(self.holdings[ContextId(lease.holder)])

    # -- what the step carries out ----------------------------------------------------------------------------

    def take_moves(self) -> tuple[Move, ...]:
        moves, self._begun = tuple(self._begun), []
        return moves

    def take_copies(self) -> tuple[Move, ...]:
        copies, self._copies = tuple(self._copies), []
        return copies

    def take_evicted(self) -> int:
        evicted, self._evicted = self._evicted, 0
        return evicted
