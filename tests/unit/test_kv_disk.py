"""The disk tier: what the ledger sends there and gets back, and the file that holds it."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from caesura.runtime.errors import BrokenInvariant, InvalidRequest
from caesura.runtime.kv import pagefile
from caesura.runtime.kv.check import check
from caesura.runtime.kv.ledger import KVLedger
from caesura.runtime.kv.pagefile import BadPage, PageFile
from caesura.scheduler.ledger import Reclaimed
from caesura.scheduler.profile import CostProfile
from caesura.scheduler.types import Action, ContextId, MoveKind

from tests.unit.test_kv_ledger import acknowledge_all, run, swap_out

A, B = ContextId(1), ContextId(2)
TEN, OTHER = list(range(10)), list(range(100, 110))
PAGE = 64


def moves(ledger: KVLedger) -> list[tuple[MoveKind, tuple[int, ...]]]:
    """The copies begun since the last call: what they are, and their rows below the device."""
    begun = ledger.take_moves()
    return [(move.kind, move.source if move.kind is MoveKind.IN else move.target) for move in begun]


def swapped(host_pages: int, disk_pages: int, **options: Any) -> KVLedger:
    """A ledger with A's five pages below the device."""
    ledger = KVLedger(2, 8, host_pages, disk_pages, **options)
    run(ledger, A, TEN)
    swap_out(ledger, A)
    return ledger


# -- the ledger ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host_pages", [0, 4])
def test_what_memory_has_no_room_for_goes_to_the_disk_and_comes_back(host_pages: int) -> None:
    ledger = swapped(host_pages, 6)
    disk = tuple(range(host_pages, host_pages + 5))
    assert moves(ledger) == [(MoveKind.OUT, disk)]
    assert (ledger.free_pages, ledger.free_host_pages, ledger.free_disk_pages) == (8, host_pages, 1)
    ledger.acquire(A, TEN, 9)
    assert ledger.host_tokens(A, TEN, 10) == ledger.disk_tokens(A, TEN, 10) == 10
    assert ledger.load(A, TEN, 10) == 10
    assert moves(ledger) == [(MoveKind.IN, disk)]
    acknowledge_all(ledger)
    assert ledger.computed(A) == 10
    ledger.pause(A)
    [segment] = ledger.segments()
    assert ledger.reclaim(segment.id, 5, Action.SWAP) == Reclaimed(5, 0, Action.SWAP)  # the copy is there still


def test_the_disk_takes_only_what_is_dear_to_compute() -> None:
    profile = CostProfile(0.001, 0.001, 0.0, 0.0, 0.0, 64, disk_base_s=0.004, disk_token_s=0.0001)
    assert not profile.disk_pays(0, 2)
    assert profile.disk_pays(0, 10)
    assert not CostProfile(1.0, 1.0, 0.0, 0.0, 0.0, 64).disk_pays(0, 1000), "nothing measured, nothing used"
    ledger = KVLedger(2, 8, 0, 6, disk_pays=profile.disk_pays)
    run(ledger, A, TEN)
    ledger.pause(A)
    [segment] = ledger.segments()
    assert ledger.reclaim(segment.id, 1, Action.SWAP).action is Action.DISCARD
    assert ledger.free_disk_pages == 6


def test_when_memory_is_short_what_was_wanted_longest_ago_sinks() -> None:
    ledger = swapped(8, 6)
    assert ledger.sink() == 0  # three of eight pages are free
    ledger.advance(2)
    run(ledger, B, OTHER[:6])
    swap_out(ledger, B)
    moves(ledger)
    assert ledger.sink() == 4  # two pages of A's, from its end
    assert ledger.sink() == 0  # one at a time
    assert [kind for kind, _ in moves(ledger)] == [MoveKind.DOWN]
    check(ledger)
    acknowledge_all(ledger)
    assert (ledger.free_host_pages, ledger.free_disk_pages) == (2, 4)
    ledger.acquire(A, TEN, 9)
    assert (ledger.host_tokens(A, TEN, 10), ledger.disk_tokens(A, TEN, 10)) == (10, 4)
    assert ledger.load(A, TEN, 10) == 10
    assert [(kind, len(rows)) for kind, rows in moves(ledger)] == [(MoveKind.IN, 3), (MoveKind.IN, 2)]
    acknowledge_all(ledger)
    assert ledger.computed(A) == 10


def test_whoever_wants_a_sinking_run_waits_until_it_is_down() -> None:
    ledger = swapped(5, 6)
    assert ledger.sink() == 2
    [down] = ledger.transfers
    ledger.acquire(A, TEN, 9)
    assert ledger.load(A, TEN, 10) == 8  # what does not move
    ledger.acknowledge(max(ledger.transfers))
    assert ledger.computed(A) == 8
    assert ledger.load(A, TEN, 10) == 2
    assert list(ledger.transfers) == [down]
    assert ledger.is_loading(A)
    acknowledge_all(ledger)
    assert not ledger.is_loading(A)
    assert ledger.load(A, TEN, 10) == 2
    acknowledge_all(ledger)
    assert ledger.computed(A) == 10


def test_a_failed_read_is_forgotten_and_computed_again() -> None:
    ledger = swapped(0, 6)
    ledger.acquire(A, TEN, 9)
    ledger.load(A, TEN, 10)
    [move] = ledger.transfers
    ledger.acknowledge(move, failed=True)
    check(ledger)
    assert not ledger.is_loading(A)
    assert (ledger.computed(A), ledger.host_tokens(A, TEN, 10)) == (0, 0)
    assert (ledger.free_pages, ledger.free_disk_pages) == (8, 6)
    assert ledger.disk_writable  # reading has failed, not writing
    run(ledger, A, TEN)


def test_what_failed_goes_only_when_nothing_below_it_moves() -> None:
    ledger = swapped(0, 6)
    ledger.open(B, "")
    ledger.acquire(B, TEN, 9)
    ledger.load(B, TEN, 4)
    ledger.acquire(A, TEN, 9)
    ledger.load(A, TEN, 10)
    first, second = ledger.transfers
    ledger.acknowledge(first, failed=True)
    check(ledger)
    assert ledger.is_loading(A)
    assert ledger.is_loading(B)
    with pytest.raises(BrokenInvariant, match="not in flight"):
        ledger.acknowledge(first)
    ledger.acknowledge(second)
    check(ledger)
    assert not ledger.transfers
    assert (ledger.computed(A), ledger.computed(B), ledger.free_pages, ledger.free_disk_pages) == (0, 0, 8, 6)


def test_a_failed_write_leaves_the_run_where_it_is_and_ends_writing() -> None:
    ledger = KVLedger(2, 8, 0, 6)
    run(ledger, A, TEN)
    ledger.pause(A)
    [segment] = ledger.segments()
    assert ledger.reclaim(segment.id, 5, Action.SWAP) == Reclaimed(0, 5, Action.SWAP)
    [move] = ledger.transfers
    ledger.acknowledge(move, failed=True)
    check(ledger)
    assert (ledger.computed(A), ledger.pending_pages, ledger.free_disk_pages) == (10, 0, 6)
    assert not ledger.disk_writable
    assert ledger.reclaim(ledger.segments()[0].id, 5, Action.SWAP) == Reclaimed(5, 0, Action.DISCARD)


def test_a_failed_move_down_leaves_the_copy_in_memory() -> None:
    ledger = swapped(5, 6)
    ledger.sink()
    [move] = ledger.transfers
    ledger.acknowledge(move, failed=True)
    check(ledger)
    assert (ledger.free_host_pages, ledger.free_disk_pages) == (0, 6)
    assert ledger.sink() == 0
    ledger.acquire(A, TEN, 9)
    assert ledger.load(A, TEN, 10) == 10


# -- the file -----------------------------------------------------------------------------------------------------


def page(number: int) -> bytes:
    return bytes((number + at) % 251 for at in range(PAGE))


def read(file: PageFile, first: int, count: int) -> bytes:
    data = bytearray(count * PAGE)
    file.read(first, memoryview(data))
    return bytes(data)


def test_the_file_is_private_nameless_and_as_large_as_it_gets(tmp_path: Path) -> None:
    file = PageFile(tmp_path, 10, PAGE)
    status = os.fstat(file._file.fileno())
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert (status.st_nlink, status.st_size) == (0, 10 * PAGE)
    assert not list(tmp_path.iterdir())
    file.close()
    file.close()


def test_pages_come_back_as_they_were_written(tmp_path: Path) -> None:
    file = PageFile(tmp_path, 10, PAGE)
    file.write(3, memoryview(page(1) + page(2)))
    file.write(9, memoryview(page(3)))
    assert read(file, 3, 2) == page(1) + page(2)
    assert read(file, 9, 1) == page(3)
    file.write(3, memoryview(page(4)))
    assert read(file, 3, 2) == page(4) + page(2)
    file.close()


def test_a_page_that_changed_is_never_given_out(tmp_path: Path) -> None:
    file = PageFile(tmp_path, 4, PAGE)
    file.write(0, memoryview(page(1) + page(2) + page(3)))
    os.pwrite(file._file.fileno(), b"\xff", PAGE + 5)
    assert read(file, 0, 1) == page(1)
    for first, count in ((0, 2), (1, 1), (3, 1)):  # the last was never written
        with pytest.raises(BadPage, match="has changed"):
            read(file, first, count)
    os.ftruncate(file._file.fileno(), 2 * PAGE)
    with pytest.raises(BadPage, match="the file ends"):
        read(file, 2, 1)
    file.close()


def test_a_write_that_breaks_off_leaves_no_page_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = PageFile(tmp_path, 4, PAGE)
    file.write(0, memoryview(page(1)))

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(pagefile.os, "pwrite", full)
        with pytest.raises(OSError, match="No space"):
            file.write(0, memoryview(page(2)))
    with pytest.raises(BadPage):
        read(file, 0, 1)
    file.close()


def test_short_reads_and_writes_are_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(pagefile.os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    monkeypatch.setattr(pagefile.os, "preadv", lambda fd, into, at: preadv(fd, [into[0][:11]], at))
    file = PageFile(tmp_path, 4, PAGE)
    file.write(1, memoryview(page(1) + page(2)))
    assert read(file, 1, 2) == page(1) + page(2)
    file.close()


def test_a_folder_that_cannot_hold_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="must be a writable folder"):
        PageFile(tmp_path / "nowhere", 4, PAGE)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pagefile.os, "posix_fallocate", full)
    with pytest.raises(InvalidRequest, match=r"no room for 256 bytes.*lower kv_disk_tokens"):
        PageFile(tmp_path, 4, PAGE)
    assert not list(tmp_path.iterdir())
