"""Page pools: generations, references, states."""

from __future__ import annotations

import pytest
from caesura.runtime.errors import BrokenInvariant
from caesura.runtime.kv.pages import PagePool, PageState, row, rows


def pool(num_pages: int = 4) -> PagePool:
    return PagePool(num_pages, "device")


def take(pages: PagePool, count: int) -> list[int]:
    handles = pages.allocate(count)
    assert handles is not None
    return handles


def test_out_of_pages_is_a_value_and_takes_nothing() -> None:
    pages = pool(2)
    assert pages.allocate(3) is None
    assert pages.num_free == 2
    pages.check()


def test_only_free_pages_are_given_away() -> None:
    pages = pool(3)
    first, second = take(pages, 2), take(pages, 1)
    assert len(set(rows(first + second))) == 3
    assert pages.allocate(1) is None
    pages.free([first[0]])
    assert rows(take(pages, 1)) == (row(first[0]),)


def test_a_stale_handle_raises_wherever_it_is_used() -> None:
    pages = pool(1)
    (old,) = take(pages, 1)
    pages.free([old])
    for use in (pages.share, pages.state, pages.is_shared, lambda handle: pages.free([handle])):
        with pytest.raises(BrokenInvariant, match="page 0"):
            use(old)
    (new,) = take(pages, 1)
    assert row(new) == row(old)
    with pytest.raises(BrokenInvariant, match="generation 1, page is at 2"):
        pages.free([old])
    pages.free([new])
    pages.check()


def test_a_shared_page_is_free_when_its_last_owner_lets_go() -> None:
    pages = pool(1)
    (page,) = take(pages, 1)
    pages.share(page)
    assert pages.owners(page) == 2
    assert pages.free([page]) == 0
    assert pages.num_free == 0
    assert pages.free([page]) == 1
    with pytest.raises(BrokenInvariant):
        pages.free([page])


def test_neither_end_of_a_copy_can_be_freed_or_copied_again() -> None:
    pages = pool(1)
    handles = take(pages, 1)
    pages.mark(handles, PageState.COPYING_OUT)
    with pytest.raises(BrokenInvariant, match="freed while COPYING_OUT"):
        pages.free(handles)


def test_a_copy_begins_and_ends_once() -> None:
    pages = pool(1)
    handles = take(pages, 1)
    pages.mark(handles, PageState.COPYING_IN)
    with pytest.raises(BrokenInvariant, match="COPYING_IN -> COPYING_OUT"):
        pages.mark(handles, PageState.COPYING_OUT)
    pages.mark(handles, PageState.USED)
    with pytest.raises(BrokenInvariant, match="USED -> USED"):
        pages.mark(handles, PageState.USED)
    pages.free(handles)
    pages.check()
