"""A radix tree over token ids whose edges are runs of KV pages. Ints only: no tensors, clock or requests.

Keys are compared token by token, never by hash. Device residency is prefix-closed along every path, and so is the
union of both tiers. On a split the old node stays the deeper half, so leases and transfers keep their meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from caesura.runtime.errors import BrokenInvariant
from caesura.runtime.kv.node import Hold, Match, Node, PrefixLease, Published, Transfer
from caesura.runtime.kv.order import EvictionOrder, device_evictable, disk_evictable, host_evictable, sinkable
from caesura.runtime.kv.pages import Handle
from caesura.scheduler.types import ContextId


class RadixTree:
    """Prefix tree with leases and LRU order. Callers own the pages; the tree only says which may go.

    ``disk_pays(start, num_tokens)`` says whether a run is better read from the disk than computed again.
    """

    def __init__(self, page_size: int, disk_pays: Callable[[int, int], bool] = lambda *_: True) -> None:
        self.page_size = page_size
        self.nodes: dict[int, Node] = {}
        self.evictable_pages = 0  # these six are the sums of all nodes' shares
        self.paused_pages = 0
        self.blocked_pages = 0
        self.spare_host_pages = 0
        self.doubled_host_pages = 0
        self.spare_disk_pages = 0
        self._roots: dict[str, Node] = {}
        self._names: dict[int, str] = {}  # root id to namespace
        self._next_id = 0
        self._device_order = EvictionOrder(device_evictable)
        self._host_order = EvictionOrder(host_evictable)
        self._disk_order = EvictionOrder(disk_evictable)
        self._sink_order = EvictionOrder(lambda node: sinkable(node) and disk_pays(node.start, len(node.tokens)))
        self._below_orders = (self._host_order, self._disk_order, self._sink_order)

    # -- reading ----------------------------------------------------------------------------------------------

    def roots(self) -> dict[str, Node]:
        """Namespace to root, for checks and pictures."""
        return dict(self._roots)

    def probe(self, namespace: str, tokens: Sequence[int], limit: int | None = None) -> Match:
        """How many leading tokens are resident, without changing anything. Whole pages only."""
        root = self._roots.get(namespace)
        if root is None:
            return Match(0, 0)
        device = host = 0
        for node, length in self.walk(root, tokens, limit):
            if node.device_ready and not host:
                device += length
            else:
                host += length
        return Match(device, host)

    def walk(self, node: Node, tokens: Sequence[int], limit: int | None = None) -> Iterator[tuple[Node, int]]:
        """Nodes below ``node`` that continue it along ``tokens[:limit]``, each with its matched length.

        Only the last may match in part, and then by whole pages. ``tokens`` starts at the root.
        """
        size = self.page_size
        end = len(tokens) if limit is None else min(limit, len(tokens))
        end -= end % size
        position, whole = node.end, True
        while whole and position < end:
            child = node.children.get(tuple(tokens[position : position + size]))
            if child is None or child.spoiled:
                return
            length = self._common(child.tokens, tokens, position, end)
            whole = length == len(child.tokens)
            yield child, length
            position += length
            node = child

    def _common(self, run: list[int], tokens: Sequence[int], position: int, end: int) -> int:
        """Length of the common prefix in whole pages, by bisection over equal slices."""
        size = self.page_size
        theirs = tokens[position : min(position + len(run), end)]
        if not isinstance(theirs, list):
            theirs = list(theirs)
        if theirs == run:
            return len(run)
        low, high = 1, len(theirs) // size  # the first page is the child's key
        if run[: len(theirs)] == theirs:
            return len(theirs)
        while low < high - 1:
            middle = (low + high) // 2
            if run[low * size : middle * size] == theirs[low * size : middle * size]:
                low = middle
            else:
                high = middle
        return low * size

    def exclusive_pages(self, lease: PrefixLease) -> int:
        """Device pages in the tree that only this lease holds."""
        pages = 0
        node = lease.node
        while node.parent is not None and node.running + node.paused == 1:
            pages += len(node.device)
            node = node.parent
        return pages

    # -- leases -----------------------------------------------------------------------------------------------

    def lease(self, holder: ContextId, hold: Hold, node: Node) -> PrefixLease:
        """A lease on the path down to ``node``."""
        lease = PrefixLease(holder, node, hold)
        node.leases[holder] = lease
        self._count(node, hold, +1)
        return lease

    def root(self, namespace: str) -> Node:
        """The namespace's root, made when there is none."""
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = self._new_node(None, 0, [])
            self._names[root.id] = namespace
        return root

    def release(self, lease: PrefixLease, tick: int) -> None:
        """Give a lease back. Its pages become evictable when it was the last."""
        if lease.released:
            raise BrokenInvariant(f"lease of context {lease.holder} released twice")
        lease.released = True
        node = lease.node
        del node.leases[lease.holder]
        self.touch(node, tick)
        self._count(node, lease.hold, -1)
        self._prune_root(node)

    def set_hold(self, lease: PrefixLease, hold: Hold) -> None:
        """Switch a lease between RUNNING and PAUSED."""
        if lease.hold is not hold:
            self._count(lease.node, hold, +1)
            self._count(lease.node, lease.hold, -1)
            lease.hold = hold

    def move_lease(self, lease: PrefixLease, node: Node, tick: int) -> None:
        """Anchor a lease at another node of the same namespace."""
        old = lease.node
        self.touch(node, tick)
        if old is node:
            return
        self._count(node, lease.hold, +1)
        self._count(old, lease.hold, -1)
        del old.leases[lease.holder]
        node.leases[lease.holder] = lease
        lease.node = node

    def _count(self, node: Node | None, hold: Hold, by: int) -> None:
        while node is not None:
            if hold is Hold.RUNNING:
                node.running += by
                node.leaving = node.leaving and not node.running
            else:
                node.paused += by
            if node.running < 0 or node.paused < 0:
                raise BrokenInvariant(f"node {node.id}: {node.running} running, {node.paused} paused")
            self._refresh(node)
            node = node.parent

    def set_transfer(self, node: Node, transfer: Transfer | None) -> None:
        """A copy of this node's run begins, or (None) has ended. Pins the path above."""
        node.transfer = transfer
        by = -1 if transfer is None else 1
        above: Node | None = node
        while above is not None:
            above.moving += by
            self._refresh(above)
            above = above.parent

    def mark_leaving(self, node: Node, leaving: bool = True) -> None:
        """The node is to leave the device as soon as it can; until then its host copy stays."""
        node.leaving = leaving
        self._refresh(node)

    # -- growing ----------------------------------------------------------------------------------------------

    def publish(self, lease: PrefixLease, tokens: Sequence[int], pages: list[Handle], tick: int) -> Published:
        """Enter ``pages`` for the ``tokens`` that follow the lease, and move the lease behind them.

        Runs that are there already are taken instead and the caller's pages returned as surplus; a run that is
        only on the host gets the caller's pages. Stops early where a copy into the device is in flight, or where a
        spoiled run has yet to go.
        """
        size = self.page_size
        if len(tokens) != len(pages) * size:
            raise BrokenInvariant(f"publish of {len(tokens)} tokens with {len(pages)} pages of {size}")
        node, position = lease.node, 0
        kept: list[Handle] = []
        surplus: list[Handle] = []
        while position < len(tokens):
            child = node.children.get(tuple(tokens[position : position + size]))
            if child is None:
                rest = pages[position // size :]
                node = self._add(lease, node, tokens[position:], rest)
                kept.extend(rest)
                position = len(tokens)
                break
            if child.spoiled or (child.device and not child.device_ready):
                break
            length = self._common(child.tokens, tokens, position, len(tokens))
            if length < len(child.tokens):
                child = self.split(child, length)
            mine = pages[position // size : (position + length) // size]
            if child.device:
                surplus.extend(mine)
            else:
                self.set_device(child, mine)
            kept.extend(child.device)
            node, position = child, position + length
        self.move_lease(lease, node, tick)
        return Published(position, kept, surplus)

    def _add(self, lease: PrefixLease, parent: Node, tokens: Sequence[int], pages: list[Handle]) -> Node:
        """A new leaf, or more of the lease's own node where nobody else has it and nothing hangs below."""
        if (
            parent is lease.node
            and parent.parent is not None
            and parent.running + parent.paused == 1
            and not parent.children
            and not parent.host
            and parent.transfer is None
        ):
            parent.tokens.extend(tokens)
            parent.device.extend(pages)
            return parent
        node = self._new_node(parent, parent.end, list(tokens))
        parent.children[tuple(tokens[: self.page_size])] = node
        self.set_device(node, pages)
        self._refresh(parent)
        return node

    def _new_node(self, parent: Node | None, start: int, tokens: list[int]) -> Node:
        node = Node(self._next_id, parent, start, tokens)
        self._next_id += 1
        self.nodes[node.id] = node
        return node

    # -- shape ------------------------------------------------------------------------------------------------

    def split(self, node: Node, length: int) -> Node:
        """Cut ``node`` after ``length`` tokens; returns the new upper half. The old node stays the deeper one."""
        size = self.page_size
        cut = length // size
        if not 0 < length < len(node.tokens) or length % size or node.parent is None:
            raise BrokenInvariant(f"split of node {node.id} ({len(node.tokens)} tokens) at {length}")
        upper = self._new_node(node.parent, node.start, node.tokens[:length])
        upper.device, node.device = node.device[:cut], node.device[cut:]
        upper.host, node.host = node.host[:cut], node.host[cut:]
        upper.sinking, node.sinking = node.sinking[:cut], node.sinking[cut:]
        upper.on_disk = node.on_disk
        upper.running, upper.paused, upper.moving = node.running, node.paused, node.moving
        upper.tick, upper.leaving, upper.spoiled = node.tick, node.leaving, node.spoiled
        upper.device_children = 1 if node.device else 0
        node.parent.children[tuple(node.tokens[:size])] = upper
        node.tokens = node.tokens[length:]
        node.start += length
        node.parent = upper
        upper.children[tuple(node.tokens[:size])] = node
        self._refresh(node)
        self._refresh(upper)
        if node.transfer is not None:
            node.transfer.nodes.append(upper)
            self.set_transfer(upper, node.transfer)
        return upper

    def merge(self, node: Node) -> None:
        """Undo splits above ``node`` that nothing needs any more: it absorbs its parent, and so on upwards.

        Without this a run that is swapped out page by page would stay a chain of one-page nodes for good.
        """
        parent = node.parent
        while parent is not None and parent.parent is not None and self._one_run(parent, node):
            node.tokens = parent.tokens + node.tokens
            node.device = parent.device + node.device
            node.host = parent.host + node.host
            node.start, node.tick, node.parent = parent.start, parent.tick, parent.parent
            parent.parent.children[tuple(node.tokens[: self.page_size])] = node
            self._drop(parent)
            self._refresh(node)
            parent = node.parent

    @staticmethod
    def _one_run(parent: Node, node: Node) -> bool:
        return (
            len(parent.children) == 1
            and not parent.leases
            and parent.transfer is None
            and node.transfer is None
            and not parent.leaving
            and not node.leaving
            and parent.spoiled == node.spoiled
            and bool(parent.device) == bool(node.device)
            and bool(parent.host) == bool(node.host)
            and parent.on_disk == node.on_disk
        )

    def remove(self, node: Node) -> list[Handle]:
        """Take a node and all below it out of the tree; returns the host pages that go with it."""
        host: list[Handle] = []
        for gone in node.subtree():
            if gone.device or gone.pinned:
                raise BrokenInvariant(
                    f"node {gone.id} removed with {len(gone.device)} device pages, {gone.running} running, "
                    f"{gone.paused} paused, {gone.moving} moving"
                )
            host.extend(gone.host)
            self._drop(gone)
        parent = node.parent
        if parent is not None:
            del parent.children[tuple(node.tokens[: self.page_size])]
            self._refresh(parent)
            self._prune_root(parent)
        return host

    def trim(self, node: Node, pages: int) -> list[Handle]:
        """Cut the last device pages off a plain leaf (no host copy, nothing below, nobody's)."""
        keep = len(node.device) - pages
        if node.host or node.children or node.pinned or keep < 1:
            raise BrokenInvariant(f"node {node.id} trimmed by {pages} of {len(node.device)} pages")
        freed = node.device[keep:]
        del node.device[keep:]
        del node.tokens[keep * self.page_size :]
        self._refresh(node)
        return freed

    def _drop(self, node: Node) -> None:
        node.device, node.host = [], []
        self._refresh(node)
        for order in (self._device_order, *self._below_orders):
            order.forget(node)
        del self.nodes[node.id]

    def _prune_root(self, node: Node) -> None:
        while node.parent is not None:
            node = node.parent
        if not node.children and not node.leases and node.id in self._names:
            del self._roots[self._names.pop(node.id)]
            self._drop(node)

    # -- residency and order ----------------------------------------------------------------------------------

    def set_device(self, node: Node, pages: list[Handle]) -> list[Handle]:
        """Put a node on the device (or take it off with ``[]``); returns the pages it had there."""
        old, node.device = node.device, list(pages)
        self._refresh(node)
        if bool(old) != bool(pages) and node.parent is not None:
            node.parent.device_children += 1 if pages else -1
            self._refresh(node.parent)
        return old

    def set_host(self, node: Node, pages: list[Handle], *, on_disk: bool = False) -> list[Handle]:
        """The same for the copy below the device."""
        old, node.host, node.on_disk = node.host, list(pages), on_disk
        self._refresh(node)
        if node.parent is not None:
            self._refresh(node.parent)
        return old

    def touch(self, node: Node | None, tick: int) -> None:
        """Mark a path as just used. A parent is never older than its child."""
        while node is not None and node.tick < tick:
            node.tick = tick
            self._refresh(node)
            node = node.parent

    def _refresh(self, node: Node) -> None:
        """Bring the totals and the eviction order up to date after a change of ``node``."""
        old, new = node.share, node.shares()
        if old != new:
            self.evictable_pages += new.evictable - old.evictable
            self.paused_pages += new.paused - old.paused
            self.blocked_pages += new.blocked - old.blocked
            self.spare_host_pages += new.spare_host - old.spare_host
            self.doubled_host_pages += new.doubled_host - old.doubled_host
            self.spare_disk_pages += new.spare_disk - old.spare_disk
            node.share = new
        self._device_order.offer(node)
        if node.host:
            for order in self._below_orders:
                order.offer(node)

    def next_device_victim(self) -> Node | None:
        """The least recently used node that may leave the device, or None."""
        return self._device_order.first(self.nodes)

    def next_host_victim(self, *, on_disk: bool = False) -> Node | None:
        """The least recently used node whose copy in memory (or in the file) may go, or None."""
        return (self._disk_order if on_disk else self._host_order).first(self.nodes)

    def next_to_sink(self) -> Node | None:
        """The least recently used run in memory that is worth moving down to the disk, or None."""
        return self._sink_order.first(self.nodes)
