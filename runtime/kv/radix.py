"""A radix tree over token ids whose edges are runs of KV pages. Ints only: no tensors, clock or requests.

Keys are compared token by token, never by hash. Device residency is prefix-closed along every path, and so is the
union of both tiers. On a split the old node stays the deeper half, so leases and transfers keep their meaning.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from caesura.runtime.errors import BrokenInvariant
from caesura.runtime.kv.node import Hold, Node, PrefixLease
from caesura.runtime.kv.pages import Handle


@dataclass(frozen=True, slots=True)
class Match:
    """How much of a prompt lies where: ready on the device, then continuing on the host."""

    device_tokens: int
    host_tokens: int


@dataclass(frozen=True, slots=True)
class Published:
    """``kept`` are the pages now standing for the published tokens; ``surplus`` are duplicates to free."""

    num_tokens: int
    kept: list[Handle]
    surplus: list[Handle]


class RadixTree:
    """Prefix tree with leases and LRU eviction. Callers own the pages; the tree only says which to free."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.nodes: dict[int, Node] = {}
        self._roots: dict[str, Node] = {}
        self.unheld_pages = 0  # device pages of nodes without a lease, kept as a running sum
        self._next_id = 0
        self._device_order: list[tuple[int, int]] = []  # (tick, node id); stale entries are skipped when met
        self._host_order: list[tuple[int, int]] = []

    # -- reading ----------------------------------------------------------------------------------------------

    def probe(self, namespace: str, tokens: Sequence[int], limit: int | None = None) -> Match:
        """How many leading tokens are resident, without changing anything. Whole pages only."""
        device = host = 0
        on_device = True
        for node, length in self._walk(namespace, tokens, limit):
            on_device = on_device and node.device_ready
            if on_device:
                device += length
            elif node.host_ready or node.device:
                host += length
            else:
                break
        return Match(device, host)

    def walk(self, namespace: str, tokens: Sequence[int], limit: int | None = None) -> list[tuple[Node, int]]:
        """Nodes matched in order, with the matched length of each."""
        return list(self._walk(namespace, tokens, limit))

    def _walk(self, namespace: str, tokens: Sequence[int], limit: int | None) -> Iterator[tuple[Node, int]]:
        node = self._roots.get(namespace)
        size = self.page_size
        end = len(tokens) if limit is None else min(limit, len(tokens))
        end -= end % size
        position = 0
        while node is not None and position < end:
            child = node.children.get(tuple(tokens[position : position + size]))
            if child is None:
                return
            length = self._common(child.tokens, tokens, position, end)
            yield child, length
            if length < len(child.tokens):
                return
            position += length
            node = child

    def _common(self, run: list[int], tokens: Sequence[int], position: int, end: int) -> int:
        """Length of the common prefix in whole pages, by bisection over equal slices."""
        size = self.page_size
        high = min(len(run), end - position) // size
        if run[: high * size] == list(tokens[position : position + high * size]):
            return high * size
        low = 1  # the first page is the child's key
        while low < high - 1:
            middle = (low + high) // 2
            if run[low * size : middle * size] == list(tokens[position + low * size : position + middle * size]):
                low = middle
            else:
                high = middle
        return low * size

    def exclusive_pages(self, lease: PrefixLease) -> int:
        """Device pages that only this lease holds."""
        return sum(len(node.device) for node in lease.node.path() if node.running + node.paused == 1)

    # -- leases -----------------------------------------------------------------------------------------------

    def lease_root(self, namespace: str, holder: int, hold: Hold) -> PrefixLease:
        """A lease on nothing yet."""
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = self._new_node(None, 0, [])
        lease = PrefixLease(holder, root, hold)
        root.leases.add(lease)
        self._count(root, hold, +1)
        return lease

    def release(self, lease: PrefixLease, tick: int) -> None:
        """Give a lease back."""
        if lease.released:
            raise BrokenInvariant(f"lease of context {lease.holder} released twice")
        lease.released = True
        node = lease.node
        node.leases.discard(lease)
        self._count(node, lease.hold, -1)
        self.touch(node, tick)
        self._prune_roots(node)

    def set_hold(self, lease: PrefixLease, hold: Hold) -> None:
        """Switch a lease between RUNNING and PAUSED."""
        if lease.hold is not hold:
            self._count(lease.node, lease.hold, -1)
            lease.hold = hold
            self._count(lease.node, hold, +1)

    def move_lease(self, lease: PrefixLease, node: Node, tick: int) -> None:
        """Anchor a lease at another node of the same namespace."""
        old = lease.node
        if old is node:
            return
        self._count(node, lease.hold, +1)
        self._count(old, lease.hold, -1)
        old.leases.discard(lease)
        node.leases.add(lease)
        lease.node = node
        self.touch(old, 0)
        self.touch(node, tick)

    def deepen(self, lease: PrefixLease, namespace: str, tokens: Sequence[int], limit: int, tick: int) -> int:
        """Move a lease to the deepest device-ready match of ``tokens[:limit]``; returns its length."""
        node = lease.node
        while node.parent is not None:
            node = node.parent
        for child, length in self.walk(namespace, tokens, limit):
            if not child.device_ready:
                break
            node = child if length == len(child.tokens) else self.split(child, length)
        if node.end > lease.num_tokens:
            self.move_lease(lease, node, tick)
        return lease.num_tokens

    def _count(self, node: Node | None, hold: Hold, by: int) -> None:
        while node is not None:
            was_held = node.held
            if hold is Hold.RUNNING:
                node.running += by
            else:
                node.paused += by
            if node.running < 0 or node.paused < 0:
                raise BrokenInvariant(f"node {node.id}: {node.running} running, {node.paused} paused")
            if was_held != node.held:
                self.unheld_pages += -len(node.device) if node.held else len(node.device)
            node = node.parent

    # -- growing ----------------------------------------------------------------------------------------------

    def publish(self, lease: PrefixLease, tokens: Sequence[int], pages: list[Handle], tick: int) -> Published:
        """Enter ``pages`` for the ``tokens`` that follow the lease, and move the lease behind them.

        Runs that are there already are taken instead and the caller's pages returned as surplus; a run that is
        only on the host gets the caller's pages. Stops early where a copy into the device is in flight.
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
                node = self._add(node, tokens[position:], pages[position // size :])
                kept.extend(pages[position // size :])
                position = len(tokens)
                break
            length = self._common(child.tokens, tokens, position, len(tokens))
            if child.device and not child.device_ready:
                break
            if length < len(child.tokens):
                child = self.split(child, length)
            mine = pages[position // size : (position + length) // size]
            if child.device:
                surplus.extend(mine)
            else:
                self.set_device(child, list(mine))
            kept.extend(child.device)
            node, position = child, position + length
        self.move_lease(lease, node, tick)
        return Published(position, kept, surplus)

    def _add(self, parent: Node, tokens: Sequence[int], pages: list[Handle]) -> Node:
        """A new leaf, or more of ``parent`` itself where only the publisher holds it and nothing hangs below."""
        grows = (
            parent.parent is not None
            and not parent.children
            and not parent.host
            and parent.transfer is None
            and parent.running + parent.paused == 1
        )
        if grows:
            parent.tokens.extend(tokens)
            parent.device.extend(pages)
            return parent
        node = self._new_node(parent, parent.end, list(tokens))
        parent.children[tuple(tokens[: self.page_size])] = node
        self.set_device(node, list(pages))
        return node

    def _new_node(self, parent: Node | None, start: int, tokens: list[int]) -> Node:
        node = Node(self._next_id, parent, start, tokens)
        self._next_id += 1
        self.nodes[node.id] = node
        return node

    def split(self, node: Node, length: int) -> Node:
        """Cut ``node`` after ``length`` tokens; returns the new upper half. The old node stays the deeper one."""
        size = self.page_size
        cut = length // size
        if not 0 < length < len(node.tokens) or length % size or node.parent is None:
            raise BrokenInvariant(f"split of node {node.id} ({len(node.tokens)} tokens) at {length}")
        upper = self._new_node(node.parent, node.start, node.tokens[:length])
        upper.device, node.device = node.device[:cut], node.device[cut:]
        upper.host, node.host = node.host[:cut], node.host[cut:]
        upper.running, upper.paused, upper.tick = node.running, node.paused, node.tick
        upper.device_children = 1 if node.device else 0
        node.parent.children[tuple(node.tokens[:size])] = upper
        node.tokens = node.tokens[length:]
        node.start += length
        node.parent = upper
        upper.children[tuple(node.tokens[:size])] = node
        if node.transfer is not None:
            upper.transfer = node.transfer
            node.transfer.nodes.append(upper)
        self._offer(upper)
        self._offer(node)
        return upper

    # -- residency --------------------------------------------------------------------------------------------

    def set_device(self, node: Node, pages: list[Handle]) -> list[Handle]:
        """Put a node on the device (or take it off with ``[]``); returns the pages it had there."""
        old, node.device = node.device, pages
        if not node.held:
            self.unheld_pages += len(pages) - len(old)
        if bool(old) != bool(pages) and node.parent is not None:
            node.parent.device_children += 1 if pages else -1
            self._offer(node.parent)
        self._offer(node)
        return old

    def set_host(self, node: Node, pages: list[Handle]) -> list[Handle]:
        """The same for the host tier."""
        old, node.host = node.host, pages
        self._offer(node)
        return old

    def remove(self, node: Node) -> list[Handle]:
        """Take a node and all below it out of the tree; returns the host pages that go with it."""
        host: list[Handle] = []
        for gone in node.subtree():
            if gone.device or gone.transfer is not None or gone.held:
                raise BrokenInvariant(
                    f"node {gone.id} removed with {len(gone.device)} device pages, {gone.running}+{gone.paused}"
                )
            host.extend(gone.host)
            del self.nodes[gone.id]
        parent = node.parent
        if parent is not None:
            del parent.children[tuple(node.tokens[: self.page_size])]
            self._offer(parent)
            self._prune_roots(parent)
        return host

    def trim(self, node: Node, pages: int) -> list[Handle]:
        """Cut the last device pages off a plain leaf (no host copy, nothing below, nobody's)."""
        keep = len(node.device) - pages
        freed = node.device[keep:]
        del node.device[keep:]
        del node.tokens[keep * self.page_size :]
        self.unheld_pages -= pages
        self._offer(node)
        return freed

    def _prune_roots(self, node: Node) -> None:
        while node.parent is not None:
            node = node.parent
        if node.children or node.leases:
            return
        for namespace, root in self._roots.items():
            if root is node:
                del self._roots[namespace]
                del self.nodes[node.id]
                return

    # -- order of eviction ------------------------------------------------------------------------------------

    def touch(self, node: Node | None, tick: int) -> None:
        """Mark a path as just used. A parent is never older than its child."""
        while node is not None:
            node.tick = max(node.tick, tick)
            self._offer(node)
            node = node.parent

    def _offer(self, node: Node) -> None:
        if device_evictable(node):
            self._push(self._device_order, node)
        if host_evictable(node):
            self._push(self._host_order, node)

    def _push(self, order: list[tuple[int, int]], node: Node) -> None:
        heapq.heappush(order, (node.tick, node.id))
        if len(order) > 4 * len(self.nodes) + 64:  # mostly stale by now; amortised O(1) per push
            live = {(n.tick, n.id) for _, i in order if (n := self.nodes.get(i)) is not None}
            order[:] = sorted(live)

    def next_device_victim(self) -> Node | None:
        """The least recently used node that may leave the device, or None. Amortised O(log nodes)."""
        return self._next(self._device_order, device_evictable)

    def next_host_victim(self) -> Node | None:
        """The least recently used node whose host copy may go, or None."""
        return self._next(self._host_order, host_evictable)

    def _next(self, order: list[tuple[int, int]], evictable: Callable[[Node], bool]) -> Node | None:
        while order:
            tick, node_id = order[0]
            node = self.nodes.get(node_id)
            if node is not None and node.tick == tick and evictable(node):
                return node
            heapq.heappop(order)
        return None

    # -- looking ----------------------------------------------------------------------------------------------

    def roots(self) -> dict[str, Node]:
        """Namespace to root, for checks and pictures."""
        return dict(self._roots)


def device_evictable(node: Node) -> bool:
    """Nobody's, nothing below it on the device, and no copy in flight."""
    return bool(node.device) and not node.device_children and not node.held and node.transfer is None


def host_evictable(node: Node) -> bool:
    """A second copy, or a leaf that nobody holds."""
    if not node.host or node.transfer is not None:
        return False
    return bool(node.device) or (not node.held and not node.children)
