"""The two KV arenas, the file below them, and the copies of pages between them.

Both arenas have one layout, [layers, 2, pages, page_size, kv_heads, head_dim], and are allocated once: a fresh
allocation costs five times what copying into it costs. Copies between the tiers run on a background thread, beside
compute (torch releases the interpreter lock), a chunk of each in turn, so that a long one does not hold up a short
one; those of the file on a second thread, for a disk may make it wait. They are acknowledged by id; until then both
ends belong to the copy, which the ledger enforces. Copies within the device tier are done at once, at the start of
the step that needs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from caesura.runtime.errors import BrokenInvariant
from caesura.runtime.kv.copier import Copier, Ended
from caesura.runtime.kv.moves import Run, check_move, check_sizes, note_fault, runs_of
from caesura.runtime.kv.pagefile import PageFile
from caesura.runtime.model.memory import require_memory
from caesura.scheduler.types import Move, MoveId, MoveKind
from torch import Tensor

CHUNK_BYTES = 4 << 20  # of one copy, before the next one has its turn


class KvArena:
    """Device and host pages of one model, and pages in a file in ``disk_folder``.

    The rows below the device are host pages first, then the file's. ``begin``, ``acknowledged``, ``take_failed`` and
    ``close`` belong to the engine thread.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        kv_heads: int,
        head_dim: int,
        page_size: int,
        num_device_pages: int,
        num_host_pages: int,
        dtype: torch.dtype,
        disk_folder: Path | None = None,
        num_disk_pages: int = 0,
    ) -> None:
        """Raises BrokenInvariant for sizes out of range, NotEnoughMemory when the pools do not fit, InvalidRequest
        when the file does not."""
        check_sizes(page_size, num_device_pages, num_host_pages)
        self.page_size = page_size
        self.page_bytes = 2 * num_layers * page_size * kv_heads * head_dim * dtype.itemsize
        self._chunk_pages = max(1, CHUNK_BYTES // self.page_bytes)
        self.num_disk_pages = num_disk_pages if disk_folder is not None else 0
        staged_pages = min(self._chunk_pages, self.num_disk_pages)
        require_memory(
            (num_device_pages + num_host_pages + staged_pages) * self.page_bytes,
            f"a KV pool of {num_device_pages} device and {num_host_pages} host pages",
            "ask for fewer pages",
        )
        self.device = torch.zeros(num_layers, 2, num_device_pages, page_size, kv_heads, head_dim, dtype=dtype)
        self.host = torch.zeros(num_layers, 2, num_host_pages, page_size, kv_heads, head_dim, dtype=dtype)
        self.layers: tuple[Tensor, ...] = self.device.unbind(0)
        self._file: PageFile | None = None
        if disk_folder is not None and num_disk_pages:
            self._file = PageFile(disk_folder, num_disk_pages, self.page_bytes)
        # pages on their way from or to the file, each in one piece: [pages, layers, 2, page_size, kv_heads, head_dim]
        bytes_ = torch.zeros(staged_pages * self.page_bytes, dtype=torch.uint8)
        self._staged = bytes_.view(dtype).view(staged_pages, num_layers, 2, page_size, kv_heads, head_dim)
        self._staged_bytes = bytes_.numpy().data
        self._ended = Ended()
        self._copier = Copier("caesura-kv-copy", self._chunks, self._ended, torch.inference_mode)
        self._disk_copier = Copier("caesura-kv-disk", self._chunks, self._ended, torch.inference_mode, note_fault)

    def begin(self, moves: Sequence[Move]) -> None:
        """Queue copies between the tiers. Page ids are checked here, in the caller's thread."""
        for move in moves:
            if move.kind is MoveKind.COPY:
                raise BrokenInvariant(f"move {move.id} stays on the device; it belongs into copy_within")
            check_move(move, self.device.shape[2], self.host.shape[2], self.num_disk_pages)
        num_host = self.host.shape[2]
        for move in moves:
            below = move.source if move.kind is MoveKind.IN else move.target
            (self._disk_copier if max(below, default=0) >= num_host else self._copier).begin(move)

    def acknowledged(self, *, wait_s: float = 0.0) -> list[MoveId]:
        """Moves finished since the last call, oldest first; waits up to ``wait_s`` for the first one."""
        return self._ended.take(wait_s)

    def take_failed(self) -> frozenset[MoveId]:
        """Those of the moves acknowledged since the last call that met a fault of the disk."""
        return self._ended.take_faulty()

    def copy_within(self, copies: Sequence[Move]) -> None:
        """Copy device pages to device pages, now."""
        for move in copies:
            check_move(move, self.device.shape[2], self.host.shape[2], self.num_disk_pages)
            for run in runs_of(move, len(move.source), 0):
                _copy_pages(self.device, self.device, run)

    def close(self) -> None:
        """Finish the copies in flight, stop the threads and free the arenas. May be called twice."""
        self._copier.close()
        self._disk_copier.close()
        if self._file is not None:
            self._file.close()
        self.device = self.host = self._staged = self.device.new_empty(0)
        self._staged_bytes = self._staged_bytes[:0]
        self.layers = ()

    def _chunks(self, move: Move) -> Iterator[None]:
        """Copy a move, a chunk at each ``next`` but the last, which only ends it."""
        source = self.device if move.kind is MoveKind.OUT else self.host
        target = self.device if move.kind is MoveKind.IN else self.host
        num_host = self.host.shape[2]
        runs = runs_of(move, self._chunk_pages, num_host)
        for number, run in enumerate(runs):
            first, to, count = run
            if move.kind is MoveKind.IN and first >= num_host:
                self._read(first - num_host, target[:, :, to : to + count])
            elif move.kind is not MoveKind.IN and to >= num_host:
                self._write(to - num_host, source[:, :, first : first + count])
            else:
                _copy_pages(source, target, run)
            if number + 1 < len(runs):
                yield

    def _write(self, page: int, source: Tensor) -> None:
        """``source``: [layers, 2, pages, page_size, kv_heads, head_dim]."""
        count = source.shape[2]
        self._staged[:count].copy_(source.permute(2, 0, 1, 3, 4, 5))
        self._disk.write(page, self._staged_bytes[: count * self.page_bytes])

    def _read(self, page: int, target: Tensor) -> None:
        count = target.shape[2]
        self._disk.read(page, self._staged_bytes[: count * self.page_bytes])
        target.copy_(self._staged[:count].permute(1, 2, 0, 3, 4, 5))

    @property
    def _disk(self) -> PageFile:
        if self._file is None:
            raise BrokenInvariant("a copy from or to the disk, and there is no file")
        return self._file


def _copy_pages(source: Tensor, target: Tensor, run: Run) -> None:
    """Copy one run of pages in one call; nothing is allocated."""
    first, to, count = run
    target[:, :, to : to + count].copy_(source[:, :, first : first + count])
