"""The tier below the device: pages of host memory and, after them, pages of a file on disk.

A run lies there once, wholly in memory or wholly in the file. Which of the two is decided when it is copied out, and
again when memory runs short and what was wanted longest ago moves down.
"""

from __future__ import annotations

from collections.abc import Callable

from caesura.runtime.errors import BrokenInvariant
from caesura.runtime.kv.node import Node
from caesura.runtime.kv.pages import Handle, PagePool, PageState, row
from caesura.runtime.kv.radix import RadixTree

FREE_SHARE = 4  # a quarter of host memory is kept free, or for second copies, by moving runs down
SINK_PAGES = 64  # of one move down, so that nobody waits long for it


class Below:
    """The two pools below the device, and which run gets pages in which of them."""

    def __init__(
        self, tree: RadixTree, num_host_pages: int, num_disk_pages: int, disk_pays: Callable[[int, int], bool]
    ) -> None:
        self.host = PagePool(num_host_pages, "host")
        self.disk = PagePool(num_disk_pages, "disk", first=num_host_pages)
        self.kept_free_pages = num_host_pages // FREE_SHARE
        self.disk_writable = num_disk_pages > 0  # until a write fails
        self._tree = tree
        self._disk_pays = disk_pays

    def _pool(self, handle: Handle) -> PagePool:
        return self.disk if row(handle) >= self.disk.first else self.host

    def free(self, handles: list[Handle]) -> None:
        """Give back pages of either kind."""
        for handle in handles:
            self._pool(handle).free([handle])

    def mark(self, handles: list[Handle], state: PageState) -> None:
        """Begin or end a copy on pages of either kind."""
        for handle in handles:
            self._pool(handle).mark([handle], state)

    def state(self, handle: Handle) -> PageState:
        return self._pool(handle).state(handle)

    def give(self, node: Node) -> bool:
        """Pages for a copy of ``node``'s device run: in memory if it fits, else in the file where that pays."""
        count = len(node.device)
        pages = self._allocate(count, on_disk=False)
        on_disk = pages is None and self.disk_writable and self._disk_pays(node.start, len(node.tokens))
        if on_disk:
            pages = self._allocate(count, on_disk=True)
        if pages is None:
            return False
        self._tree.set_host(node, pages, on_disk=on_disk)
        return True

    def _allocate(self, count: int, *, on_disk: bool) -> list[Handle] | None:
        """``count`` pages, dropping spare copies for them; None (and nothing dropped) when they cannot be had."""
        pool = self.disk if on_disk else self.host
        spare = self._tree.spare_disk_pages if on_disk else self._tree.spare_host_pages
        if count > pool.num_free + spare:
            return None
        while pool.num_free < count:
            self._drop_victim(spare, on_disk=on_disk)
        return pool.allocate(count)

    def _drop_victim(self, spare: int, *, on_disk: bool) -> None:
        victim = self._tree.next_host_victim(on_disk=on_disk)
        if victim is None:
            raise BrokenInvariant(f"{spare} pages below the device said to be spare, none found (disk: {on_disk})")
        self.drop(victim)

    def drop(self, node: Node) -> None:
        """Free a copy that may go; the run leaves the tree when it was nowhere else."""
        self.free(self._tree.set_host(node, []) if node.device else self._tree.remove(node))

    def flush(self) -> None:
        """Drop every copy that may go."""
        for on_disk in (False, True):
            while (victim := self._tree.next_host_victim(on_disk=on_disk)) is not None:
                self.drop(victim)

    def next_to_sink(self) -> Node | None:
        """When memory is short: the run wanted longest ago, with file pages to go to. None when there is none."""
        short = self.kept_free_pages - self.host.num_free - self._tree.doubled_host_pages
        if short <= 0 or not self.disk_writable:
            return None
        node = self._tree.next_to_sink()
        if node is None:
            return None
        # the upper part stays: more contexts share it, and they need it first
        count = min(len(node.host), short, SINK_PAGES, self.disk.num_free + self._tree.spare_disk_pages)
        if not count:
            return None
        if count < len(node.host):
            self._tree.split(node, len(node.tokens) - count * self._tree.page_size)
        pages = self._allocate(count, on_disk=True)
        if pages is None:
            raise BrokenInvariant(f"{count} disk pages counted, but not to be had")
        if node.id not in self._tree.nodes:  # it followed a run whose pages these were
            self.free(pages)
            return None
        node.sinking = pages
        return node

    def arrived(self, node: Node, *, failed: bool) -> None:
        """A move down has ended: the run is in the file now or, if that failed, where it was."""
        pages, node.sinking = node.sinking, []
        if failed:
            self.free(pages)
        else:
            self.free(self._tree.set_host(node, pages, on_disk=True))
