"""The ledger: which pages every context has, and what it may do with them. Ints only.

A context has a *lease* on a path of the radix tree (its whole pages, shared or not) and a *tail* (the pages
after the path: being computed, or not full yet). Whole pages move from the tail into the tree at every commit, so
between steps a tail is at most one unfinished page - and that page alone is shared by copy-on-write at a fork.

Where pages come from and which copies are in flight is ``tiers``' business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set

from caesura.runtime.errors import BrokenInvariant
from caesura.runtime.kv.node import Hold, PrefixLease, Transfer
from caesura.runtime.kv.pages import row, rows
from caesura.runtime.kv.reclaim import reclaim_run, reclaim_tail
from caesura.runtime.kv.segments import segments
from caesura.runtime.kv.spoiled import spoil
from caesura.runtime.kv.tiers import Tiers
from caesura.scheduler.ledger import Reclaimed, Segment
from caesura.scheduler.types import Action, ContextId, Move, MoveId, PageId


class KVLedger:
    """Implements ``caesura.scheduler.ledger.Ledger`` over page pools and a radix tree.

    ``disk_pays(start, num_tokens)`` says whether reading a run from the disk beats computing it again; the disk is
    used for no other.
    """

    def __init__(
        self,
        page_size: int,
        num_device_pages: int,
        num_host_pages: int = 0,
        num_disk_pages: int = 0,
        disk_pays: Callable[[int, int], bool] = lambda *_: True,
    ) -> None:
        self.page_size = page_size
        self.tiers = Tiers(page_size, num_device_pages, num_host_pages, num_disk_pages, disk_pays)
        self.tree, self.device, self.below = self.tiers.tree, self.tiers.device, self.tiers.below
        self.host = self.below.host
        self.namespaces: dict[ContextId, str] = {}  # every open context
        self.leases: dict[ContextId, PrefixLease] = {}  # those that hold something

    # -- counters ---------------------------------------------------------------------------------------------

    @property
    def num_device_pages(self) -> int:
        return self.device.num_pages

    @property
    def num_host_pages(self) -> int:
        return self.host.num_pages

    @property
    def free_host_pages(self) -> int:
        return self.host.num_free

    @property
    def spare_host_pages(self) -> int:
        return self.tree.spare_host_pages

    @property
    def num_disk_pages(self) -> int:
        return self.below.disk.num_pages

    @property
    def free_disk_pages(self) -> int:
        return self.below.disk.num_free

    @property
    def spare_disk_pages(self) -> int:
        return self.tree.spare_disk_pages

    @property
    def disk_writable(self) -> bool:
        """There is a disk tier, and no write to it has failed yet."""
        return self.below.disk_writable

    @property
    def free_pages(self) -> int:
        return self.device.num_free

    @property
    def evictable_pages(self) -> int:
        return self.tree.evictable_pages

    @property
    def paused_pages(self) -> int:
        return self.tree.paused_pages

    @property
    def pending_pages(self) -> int:
        return self.tiers.pending_pages

    @property
    def copying_pages(self) -> int:
        return sum(len(node.device) for transfer in self.tiers.transfers.values() for node in transfer.nodes)

    @property
    def transfers(self) -> Mapping[MoveId, Transfer]:
        """Tier moves begun and not yet acknowledged."""
        return self.tiers.transfers

    @property
    def holdings(self) -> Set[ContextId]:
        """The open contexts, whether they hold pages or not."""
        return self.namespaces.keys()

    def advance(self, tick: int) -> None:
        self.tiers.tick = tick

    # -- what a context has -----------------------------------------------------------------------------------

    def open(self, context: ContextId, namespace: str) -> None:
        if context in self.namespaces:
            raise BrokenInvariant(f"context {context} opened twice")
        self.namespaces[context] = namespace

    def close(self, context: ContextId, *, keep_cached: bool = True) -> None:
        if keep_cached:
            self.release(context)
        else:
            self.discard(context)
        del self.namespaces[context]

    def computed(self, context: ContextId) -> int:
        lease = self.leases.get(context) or self._lease(context)
        return lease.computed if lease is not None else 0

    def held_tokens(self, context: ContextId) -> int:
        lease = self._lease(context)
        if lease is None:
            return 0
        return lease.ahead + sum(len(node.tokens) for node in lease.node.path() if node.device)

    def exclusive_tokens(self, context: ContextId) -> int:
        lease = self._lease(context)
        if lease is None:
            return 0
        shared = lease.tail and self.device.is_shared(lease.tail[0])
        return self.tree.exclusive_pages(lease) * self.page_size + (0 if shared else lease.ahead)

    def table(self, context: ContextId) -> tuple[PageId, ...]:
        lease = self._lease(context)
        return tuple(lease.table()) if lease is not None else ()

    def is_loading(self, context: ContextId) -> bool:
        lease = self._lease(context)
        return lease is not None and self._awaits_copy(lease)

    def _awaits_copy(self, lease: PrefixLease) -> bool:
        return bool(lease.awaits) and not lease.awaits.isdisjoint(self.tiers.transfers)

    def _lease(self, context: ContextId) -> PrefixLease | None:
        if context not in self.namespaces:
            raise BrokenInvariant(f"context {context} is not open")
        return self.leases.get(context)

    def _running(self, context: ContextId) -> PrefixLease:
        lease = self.leases.get(context) or self._lease(context)
        if lease is None or lease.hold is not Hold.RUNNING:
            raise BrokenInvariant(f"context {context} has not been acquired for running")
        return lease

    # -- running ----------------------------------------------------------------------------------------------

    def acquire(self, context: ContextId, tokens: Sequence[int], limit: int) -> int:
        lease = self._lease(context)
        if lease is None:
            root = self.tree.root(self.namespaces[context])
            lease = self.leases[context] = self.tree.lease(context, Hold.RUNNING, root)
        if self.is_loading(context):
            return lease.computed
        self.tree.set_hold(lease, Hold.RUNNING)
        if lease.frontier is not lease.node:  # the rest is on the host: a claim until load or extend decides
            return lease.computed
        found, length = lease.node, 0
        for node, common in self.tree.walk(lease.node, tokens, limit):
            if not node.device_ready:
                break
            found, length = node, common
        if found.start + length > lease.computed and found is not lease.node:
            whole = length == len(found.tokens)
            self.tiers.anchor(lease, found if whole else self.tree.split(found, length))
        if lease.rows is None:
            lease.rows = lease.table()
        return lease.computed

    def host_tokens(self, context: ContextId, tokens: Sequence[int], limit: int) -> int:
        lease = self._lease(context)
        if lease is None:
            match = self.tree.probe(self.namespaces[context], tokens, limit)
            return match.host_tokens
        return self.tiers.host_tokens(lease, tokens, limit)

    def disk_tokens(self, context: ContextId, tokens: Sequence[int], limit: int) -> int:
        lease = self._lease(context)
        return self.tiers.disk_tokens(lease, tokens, limit) if lease is not None else 0

    def load(self, context: ContextId, tokens: Sequence[int], limit: int) -> int:
        lease = self._running(context)
        return 0 if self.is_loading(context) else self.tiers.load(lease, tokens, limit)

    def _lacking(self, lease: PrefixLease | None, num_tokens: int) -> tuple[int, int | None]:
        """Pages to allocate, and which tail page must be replaced because another context shares it."""
        size = self.page_size
        pages = -(-num_tokens // size)
        if lease is None:
            return pages, None
        lacking = max(0, pages - lease.frontier.end // size - len(lease.tail))
        at = lease.ahead // size
        if at < len(lease.tail) and num_tokens > lease.computed and self.device.is_shared(lease.tail[at]):
            return lacking + 1, at
        return lacking, None

    def shortfall(self, context: ContextId, num_tokens: int) -> int:
        lacking, _ = self._lacking(self._lease(context), num_tokens)
        return max(0, lacking - self.tiers.takeable_pages - self.tiers.pending_pages)

    def lacking_now(self, context: ContextId, num_tokens: int) -> int:
        lacking, _ = self._lacking(self._lease(context), num_tokens)
        return max(0, lacking - self.tiers.takeable_pages)

    def extend(self, context: ContextId, num_tokens: int) -> bool:
        lease = self._running(context)
        if self._awaits_copy(lease):
            raise BrokenInvariant(f"context {context} extended while its copy-in is in flight")
        lacking, shared_at = self._lacking(lease, num_tokens)
        if not lacking and lease.rows is not None:  # most tokens fall into a page that is there
            lease.reserved = max(lease.reserved, num_tokens)
            return True
        pages = self.tiers.allocate(lacking)
        if pages is None:
            return False
        frontier = lease.frontier
        if frontier is not lease.node:  # not loaded after all: recompute it
            self.tiers.anchor(lease, frontier)
        if lease.rows is None:
            lease.rows = lease.table()
        if shared_at is not None:
            old, new = lease.tail[shared_at], pages.pop()
            lease.tail[shared_at] = new
            lease.rows[lease.node.end // self.page_size + shared_at] = row(new)
            self.tiers.copy_on_write(old, new)
        lease.tail.extend(pages)
        lease.rows.extend(rows(pages))
        lease.reserved = max(lease.reserved, num_tokens)
        return True

    def commit(self, context: ContextId, tokens: Sequence[int], num_computed: int) -> None:
        self.tiers.end_step()
        lease = self._running(context)
        size = self.page_size
        start = lease.node.end
        held = start + len(lease.tail) * size
        if not (lease.computed <= num_computed <= held and num_computed <= len(tokens)):
            raise BrokenInvariant(
                f"context {context}: commit of {num_computed} of {len(tokens)} tokens after {lease.computed}, "
                f"with pages for {held}"
            )
        lease.ahead = num_computed - start
        lease.reserved = 0
        if lease.ahead < size:
            return
        count = lease.ahead // size
        done = self.tree.publish(lease, tokens[start : start + count * size], lease.tail[:count], self.tiers.tick)
        published = len(done.kept)
        if lease.rows is not None and done.surplus:
            lease.rows[start // size : start // size + published] = rows(done.kept)
        del lease.tail[:published]
        lease.ahead -= done.num_tokens
        self.device.free(done.surplus)

    # -- letting go -------------------------------------------------------------------------------------------

    def pause(self, context: ContextId) -> None:
        self.tiers.end_step()
        lease = self._lease(context)
        if lease is not None:
            self.tiers.cut_tail(lease, lease.ahead)
            lease.awaits.clear()
            lease.rows = None
            self.tree.set_hold(lease, Hold.PAUSED)

    def release(self, context: ContextId) -> None:
        self.tiers.end_step()
        lease = self._lease(context)
        if lease is not None:
            self.tiers.cut_tail(lease, 0)
            self.tree.release(lease, self.tiers.tick)
            del self.leases[context]

    def discard(self, context: ContextId) -> int:
        lease = self._lease(context)
        before = self.free_pages
        self.release(context)
        node = lease.node if lease is not None else None
        while node is not None and node.parent is not None and not node.pinned and not node.children:
            above = node.parent
            self.tiers.forget(node)
            node = above
        return self.free_pages - before

    def spoil(self, pages: Set[PageId]) -> set[ContextId]:
        return spoil(self.tiers, pages)

    def truncate(self, context: ContextId, num_tokens: int) -> None:
        self.tiers.end_step()
        lease = self._lease(context)
        if lease is None or num_tokens >= lease.node.end + lease.ahead:
            return
        if num_tokens >= lease.node.end:
            self.tiers.cut_tail(lease, num_tokens - lease.node.end)
            return
        keep = num_tokens // self.page_size * self.page_size
        node = lease.node
        while node.parent is not None and node.start >= keep:
            node = node.parent
        if node.end > keep:
            node = self.tree.split(node, keep - node.start)
        lease.awaits.clear()
        self.tiers.anchor(lease, node)

    def fork(self, parent: ContextId, child: ContextId) -> None:
        source = self._lease(parent)
        if self._lease(child) is not None:
            raise BrokenInvariant(f"context {child} is to be a fork, but holds pages already")
        self.namespaces[child] = self.namespaces[parent]
        if source is None:
            return
        target = self.leases[child] = self.tree.lease(child, Hold.PAUSED, source.node)
        self.tree.touch(source.node, self.tiers.tick)
        in_step = source.reserved > source.computed  # the page may be published before the child owns a copy
        if 0 < source.ahead < self.page_size and not in_step:
            self.device.share(source.tail[0])
            target.tail, target.ahead = source.tail[:1], source.ahead

    # -- paused contexts and the host tier --------------------------------------------------------------------

    def segments(self) -> list[Segment]:
        return segments(self.device, self.leases.values(), runs=self.tree.paused_pages > 0)

    def reclaim(self, segment: int, num_pages: int, action: Action) -> Reclaimed:
        if segment < 0:
            lease = self.leases.get(ContextId(-segment - 1))
            return reclaim_tail(self.tiers, lease, action) if lease is not None else Reclaimed(0, 0, action)
        node = self.tree.nodes.get(segment)
        return reclaim_run(self.tiers, node, num_pages, action) if node is not None else Reclaimed(0, 0, action)

    def copy_out(self, segment: int, num_pages: int | None = None) -> int:
        node = self.tree.nodes.get(segment)
        if node is None or node.host or node.transfer is not None:
            return 0
        if num_pages is not None and 0 < num_pages < len(node.device):
            self.tree.split(node, (len(node.device) - num_pages) * self.page_size)
        return self.tiers.copy_out(node)

    def write_back(self, context: ContextId) -> int:
        lease = self._lease(context)
        path = lease.node.path() if lease is not None else []
        return sum(self.tiers.copy_out(node) for node in path)

    def sink(self) -> int:
        return self.tiers.sink()

    def flush(self) -> int:
        """Drop everything cached that nobody needs, on all tiers; returns the device pages freed."""
        before = self.free_pages
        self.device.free(self.tiers.allocate(self.tiers.takeable_pages) or [])
        self.below.flush()
        return self.free_pages - before

    # -- what the step carries out ----------------------------------------------------------------------------

    def take_moves(self) -> tuple[Move, ...]:
        moves, self.tiers.begun = tuple(self.tiers.begun), []
        return moves

    def take_copies(self) -> tuple[Move, ...]:
        return self.tiers.take_copies()

    def take_evicted(self) -> int:
        evicted, self.tiers.evicted = self.tiers.evicted, 0
        return evicted

    def acknowledge(self, move: MoveId, *, failed: bool = False) -> None:
        self.tiers.acknowledge(move, failed=failed)
