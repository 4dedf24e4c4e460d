"""What the scheduler needs to know of KV memory. ``caesura.runtime.kv.ledger`` is the real one.

The scheduler moves pages only through these verbs. They work on ints, return at once and are deterministic, so a
plan made from the same history is the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from caesura.scheduler.types import Action, ContextId, Move, MoveId, PageId


class Segment(NamedTuple):
    """Device pages held by paused contexts alone: one run of the tree, or one context's unfinished last page.

    ``holders`` are the paused contexts at or below it. Taking a segment takes all below it first, so callers go
    leaf first: ``parent`` becomes takeable when every segment naming it as parent is gone.
    """

    id: int
    parent: int | None
    start: int
    num_tokens: int
    num_pages: int
    on_host: bool  # a complete host copy exists, so the device pages can go for nothing
    leaving: bool  # goes when its copy ends
    holders: tuple[ContextId, ...]


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """``freed`` pages are free now, ``pending`` ones when their copy ends. ``action`` may be weaker than asked.

    ``rest`` is the segment that is left of one taken in part.
    """

    freed: int
    pending: int
    action: Action
    rest: int | None = None


class Ledger(Protocol):
    """Owner of the fact where every context's KV lies."""

    page_size: int

    @property
    def num_device_pages(self) -> int: ...

    @property
    def num_host_pages(self) -> int: ...

    @property
    def free_host_pages(self) -> int:
        """Host pages that are free now."""

    @property
    def spare_host_pages(self) -> int:
        """Host pages that may be taken: second copies of what is on the device, and what nobody holds."""

    @property
    def num_disk_pages(self) -> int: ...

    @property
    def free_disk_pages(self) -> int:
        """Pages of the disk tier that are free now."""

    @property
    def spare_disk_pages(self) -> int:
        """Pages of the disk tier that may be taken, as ``spare_host_pages``."""

    @property
    def disk_writable(self) -> bool:
        """There is a disk tier, and no write to it has failed."""

    @property
    def free_pages(self) -> int:
        """Device pages that are free now."""

    @property
    def evictable_pages(self) -> int:
        """Device pages that nobody holds: cached, and free for the taking."""

    @property
    def paused_pages(self) -> int:
        """Device pages of whole runs that paused contexts alone hold."""

    @property
    def pending_pages(self) -> int:
        """Device pages that become free when a copy-out is acknowledged."""

    @property
    def copying_pages(self) -> int:
        """Pages at either end of a copy in flight."""

    def open(self, context: ContextId, namespace: str) -> None: ...

    def close(self, context: ContextId, *, keep_cached: bool = True) -> None: ...

    def computed(self, context: ContextId) -> int:
        """Tokens whose KV is on the device and usable."""

    def acquire(self, context: ContextId, tokens: Sequence[int], limit: int) -> int:
        """Pin the device-resident prefix for running; returns computed tokens."""

    def host_tokens(self, context: ContextId, tokens: Sequence[int], limit: int) -> int:
        """Tokens after the computed ones that a copy-in could bring, from host memory or from the disk."""

    def disk_tokens(self, context: ContextId, tokens: Sequence[int], limit: int) -> int:
        """Those of ``host_tokens`` that would have to be read from the disk."""

    def load(self, context: ContextId, tokens: Sequence[int], limit: int) -> int:
        """Begin copying them in (or join a copy in flight); returns how many tokens are on their way."""

    def is_loading(self, context: ContextId) -> bool: ...

    def extend(self, context: ContextId, num_tokens: int) -> bool:
        """Have pages for ``[0, num_tokens)``, taking unheld cached ones; False (nothing changed) when out of pages."""

    def shortfall(self, context: ContextId, num_tokens: int) -> int:
        """Pages that ``extend`` would lack."""

    def lacking_now(self, context: ContextId, num_tokens: int) -> int:
        """Pages that ``extend`` would lack if it could not wait for copies in flight."""

    def table(self, context: ContextId) -> tuple[PageId, ...]: ...

    def commit(self, context: ContextId, tokens: Sequence[int], num_computed: int) -> None:
        """``[0, num_computed)`` has been computed; publish its whole pages."""

    def pause(self, context: ContextId) -> None:
        """Hold, revocably."""

    def release(self, context: ContextId) -> None:
        """Let go of everything; the cache keeps it until someone needs the pages."""

    def discard(self, context: ContextId) -> int:
        """Let go and free what no other context holds; returns pages freed."""

    def spoil(self, pages: Set[PageId]) -> set[ContextId]:
        """What was written to these device pages is wrong: nobody finds it from now on, nor what follows it.

        Returns the contexts that had it; what they have ends before it.
        """

    def exclusive_tokens(self, context: ContextId) -> int: ...

    def held_tokens(self, context: ContextId) -> int:
        """Tokens the context still has on the device."""

    def segments(self) -> list[Segment]: ...

    def reclaim(self, segment: int, num_pages: int, action: Action) -> Reclaimed: ...

    def copy_out(self, segment: int, num_pages: int | None = None) -> int:
        """Begin a host copy (of the last ``num_pages``) ahead of need; returns tokens on their way.

        0 when there is no room, or nothing to do.
        """

    def write_back(self, context: ContextId) -> int:
        """Begin host copies of all the context's runs that have none; returns tokens on their way."""

    def sink(self) -> int:
        """Begin to move what was wanted longest ago from host memory, when that is short, to the disk.

        Returns its tokens; 0 when there is no need, no room, or a move down in flight.
        """

    def fork(self, parent: ContextId, child: ContextId) -> None: ...

    def truncate(self, context: ContextId, num_tokens: int) -> None: ...

    def take_moves(self) -> tuple[Move, ...]:
        """Tier moves begun since the last call."""

    def take_copies(self) -> tuple[Move, ...]:
        """Copy-on-write moves begun since the last call."""

    def take_evicted(self) -> int: ...

    def acknowledge(self, move: MoveId, *, failed: bool = False) -> None:
        """A copy has ended. ``failed``: it brought nothing, so what it should have brought in is computed again."""

    def advance(self, tick: int) -> None:
        """Set the logical time of what follows."""
