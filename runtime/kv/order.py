"""The order of eviction: least recently used first, at a cost that does not grow with the tree."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from caesura.runtime.kv.node import Node


class EvictionOrder:
    """A heap of (tick, node id) in which outdated entries are skipped when they come up.

    A node is offered whenever it may have become evictable; whether it still is gets asked when it is taken.
    """

    def __init__(self, evictable: Callable[[Node], bool]) -> None:
        self._evictable = evictable
        self._heap: list[tuple[int, int]] = []
        self._queued: dict[int, int] = {}  # node id to the tick of its one entry that counts

    def offer(self, node: Node) -> None:
        """Enter ``node`` if it may go now. O(log nodes)."""
        if not self._evictable(node) or self._queued.get(node.id) == node.tick:
            return
        self._queued[node.id] = node.tick
        heapq.heappush(self._heap, (node.tick, node.id))
        if len(self._heap) > 2 * len(self._queued) + 64:  # mostly outdated by now; amortised O(1) per offer
            self._heap = [(tick, node_id) for node_id, tick in self._queued.items()]
            heapq.heapify(self._heap)

    def forget(self, node: Node) -> None:
        """The node is no longer in the tree."""
        self._queued.pop(node.id, None)

    def first(self, nodes: dict[int, Node]) -> Node | None:
        """The evictable node used longest ago, or None. Amortised O(log nodes)."""
        while self._heap:
            tick, node_id = self._heap[0]
            if self._queued.get(node_id) == tick:
                node = nodes[node_id]
                if node.tick == tick and self._evictable(node):
                    return node
                del self._queued[node_id]
            heapq.heappop(self._heap)
        return None


def device_evictable(node: Node) -> bool:
    """Nobody's, nothing below it on the device, and no copy in flight."""
    return bool(node.device) and not node.device_children and not node.pinned


def host_evictable(node: Node) -> bool:
    """In memory below the device: a second copy, or a run that nobody holds with nothing below it in memory."""
    return not node.on_disk and _spare(node)


def disk_evictable(node: Node) -> bool:
    """The same in the file."""
    return node.on_disk and _spare(node)


def sinkable(node: Node) -> bool:
    """In memory below the device and nowhere else, and nobody is about to run on it."""
    in_memory = bool(node.host) and not node.on_disk and not node.device
    return in_memory and node.transfer is None and not node.running and not node.spoiled


def _spare(node: Node) -> bool:
    if not node.host or node.transfer is not None or node.leaving:
        return False
    if node.device:
        return True
    return not node.pinned and all(child.on_disk is not node.on_disk for child in node.children.values())
