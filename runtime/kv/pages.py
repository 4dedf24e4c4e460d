"""Page pools: which page of an arena is free, used, or at one end of a copy.

A handle is an int that carries the page's row and the generation it was handed out in, so that a stale handle is
caught where it is used and not where its text goes wrong.
"""

from __future__ import annotations

from enum import IntEnum

from caesura.runtime.errors import BrokenInvariant
from caesura.scheduler.types import PageId

_ROW_BITS = 32
_ROW_MASK = (1 << _ROW_BITS) - 1

Handle = int


class PageState(IntEnum):
    """Only FREE pages may be given away; both ends of a copy stay put until it is acknowledged."""

    FREE = 0
    USED = 1
    COPYING_OUT = 2
    COPYING_IN = 3


def row(handle: Handle) -> PageId:
    """The arena row a handle stands for."""
    return PageId(handle & _ROW_MASK)


def rows(handles: list[Handle]) -> tuple[PageId, ...]:
    """The arena rows of several handles."""
    return tuple(PageId(handle & _ROW_MASK) for handle in handles)


class PagePool:
    """A fixed set of equal pages on one tier; their rows are ``first`` to ``first + num_pages - 1``."""

    def __init__(self, num_pages: int, name: str, first: int = 0) -> None:
        self.name = name
        self.first = first
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._state = [PageState.FREE] * num_pages
        self._generation = [0] * num_pages
        self._references = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[Handle] | None:
        """``count`` pages with one reference each, or None when there are not enough."""
        if count > len(self._free):
            return None
        handles = []
        for _ in range(count):
            page = self._free.pop()
            self._generation[page] += 1
            self._state[page] = PageState.USED
            self._references[page] = 1
            handles.append(self._generation[page] << _ROW_BITS | (self.first + page))
        return handles

    def share(self, handle: Handle) -> None:
        """Take a second reference to a page."""
        page = self._live(handle)
        self._references[page] += 1

    def owners(self, handle: Handle) -> int:
        """References to a page that is in use."""
        return self._references[self._live(handle)]

    def is_shared(self, handle: Handle) -> bool:
        return self.owners(handle) > 1

    def free(self, handles: list[Handle]) -> int:
        """Give back one reference of each; returns how many pages became free."""
        freed = 0
        for handle in handles:
            page = self._live(handle)
            self._references[page] -= 1
            if self._references[page]:
                continue
            if self._state[page] is not PageState.USED:
                raise BrokenInvariant(f"{self.name} page {page} freed while {self._state[page].name}")
            self._state[page] = PageState.FREE
            self._free.append(page)
            freed += 1
        return freed

    def mark(self, handles: list[Handle], state: PageState) -> None:
        """Begin (COPYING_*) or end (USED) a copy on these pages."""
        for handle in handles:
            page = self._live(handle)
            if (state is PageState.USED) == (self._state[page] is PageState.USED):
                raise BrokenInvariant(f"{self.name} page {page}: {self._state[page].name} -> {state.name}")
            self._state[page] = state

    def state(self, handle: Handle) -> PageState:
        return self._state[self._live(handle)]

    def references(self) -> dict[PageId, int]:
        """Reference count of every row (for checks)."""
        return {PageId(row): count for row, count in enumerate(self._references, self.first)}

    def free_rows(self) -> list[PageId]:
        """The rows that are free now (for checks)."""
        return [PageId(self.first + page) for page in self._free]

    def check(self) -> None:
        """Free list, states and references agree."""
        free = set(self._free)
        if len(free) != len(self._free):
            raise BrokenInvariant(f"{self.name}: a page is twice on the free list")
        for page in range(self.num_pages):
            is_free = self._state[page] is PageState.FREE
            if is_free != (page in free) or is_free != (self._references[page] == 0):
                raise BrokenInvariant(
                    f"{self.name} page {page}: state {self._state[page].name}, "
                    f"references {self._references[page]}, on free list {page in free}"
                )

    def _live(self, handle: Handle) -> int:
        page = (handle & _ROW_MASK) - self.first
        if not 0 <= page < self.num_pages:
            raise BrokenInvariant(f"{self.name} has no page of row {handle & _ROW_MASK}")
        if self._generation[page] != handle >> _ROW_BITS or self._state[page] is PageState.FREE:
            raise BrokenInvariant(
                f"{self.name} page {page}: handle of generation {handle >> _ROW_BITS}, "
                f"page is at {self._generation[page]} and {self._state[page].name}"
            )
        return page
