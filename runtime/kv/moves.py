"""What every arena asks of a move: that its pages exist, and which of them are neighbours on both sides."""

from __future__ import annotations

import errno
import logging

from caesura.runtime.errors import BrokenInvariant
from caesura.runtime.kv.pagefile import BadPage
from caesura.runtime.logs import note
from caesura.scheduler.types import Move, MoveKind

Run = tuple[int, int, int]  # first source row, first target row, number of rows

_log = logging.getLogger("caesura.kv")


def check_sizes(page_size: int, num_device_pages: int, num_host_pages: int) -> None:
    """Raise BrokenInvariant for pools that no arena can have."""
    if not 1 <= page_size <= 64 or num_device_pages < 1 or num_host_pages < 0:
        raise BrokenInvariant(
            f"page_size {page_size} must lie in 1..64, num_device_pages {num_device_pages} be at least 1, "
            f"num_host_pages {num_host_pages} not negative"
        )


def check_move(move: Move, device: int, host: int, disk: int) -> None:
    """Raise BrokenInvariant unless all rows lie within pools of these sizes (in pages)."""
    source_pages = {MoveKind.IN: host + disk, MoveKind.DOWN: host}.get(move.kind, device)
    target_pages = host + disk if move.kind in (MoveKind.OUT, MoveKind.DOWN) else device
    if len(move.source) != len(move.target):
        raise BrokenInvariant(f"move {move.id}: {len(move.source)} sources, {len(move.target)} targets")
    for ids, limit, end in ((move.source, source_pages, "source"), (move.target, target_pages, "target")):
        if ids and not (min(ids) >= 0 and max(ids) < limit):
            raise BrokenInvariant(f"move {move.id}: a {end} page lies outside [0, {limit}): {min(ids)}..{max(ids)}")


def runs_of(move: Move, most: int, num_host: int) -> list[Run]:
    """Neighbours on both sides, ``most`` at a time; host rows end before ``num_host``, where the file's begin."""
    runs: list[Run] = []
    for source, target in zip(move.source, move.target, strict=True):
        if runs:
            first, to, count = runs[-1]
            below = source if move.kind is MoveKind.IN else target
            if count < most and (source, target) == (first + count, to + count) and below != num_host:
                runs[-1] = first, to, count + 1
                continue
        runs.append((source, target, 1))
    return runs


def note_fault(move: Move, error: OSError) -> None:
    """Log that the disk failed a copy."""
    kind = "bad page" if isinstance(error, BadPage) else errno.errorcode.get(error.errno or 0, "unknown")
    note(_log, logging.WARNING, "kv_disk_fault", pages=len(move.source), copy=move.kind.value, fault=kind)
