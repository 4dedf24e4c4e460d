"""KV pages on a GPU, pages of pinned host memory and of a file below them, and the copies between them.

A page is one piece of memory on every tier, [layers, 2, page_size, kv_heads, head_dim], 2 MB for an 8B Llama in
bfloat16 with pages of 16 tokens. So a copy is one transfer per run of neighbouring pages at the link's full rate,
whatever is scattered how, and takes nothing from the units that compute: no gather, no staging.

Copies out and in have a stream each, so both directions of the link run at once. A copy begins behind what was given
to the compute stream before it, and is acknowledged when its event has passed: whoever gets a page by then, or gave it
away before, is in order. Copies within the device go to the compute stream.

The device has one page more than the ledger knows: the last one, where rows that only fill a batch write to.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from caesura.runtime.errors import BrokenInvariant
from caesura.runtime.kv.copier import Copier, Ended
from caesura.runtime.kv.moves import check_move, check_sizes, note_fault, runs_of
from caesura.runtime.kv.pagefile import PageFile
from caesura.runtime.model.cuda.device import Device, Event, PinnedPool
from caesura.runtime.model.memory import require_memory
from caesura.scheduler.types import Move, MoveId, MoveKind
from torch import Tensor

_POLL_S = 1e-4
_DISK_CHUNK_BYTES = 4 << 20

_log = logging.getLogger("caesura.kv")


class PagedCache:
    """What a decoder sees of the device's pages."""

    def __init__(self, pages: Tensor) -> None:
        """``pages``: [num_pages, layers, 2, page_size, kv_heads, head_dim]."""
        self.pages = pages
        num_pages, layers, _, self.page_size, kv_heads, head_dim = pages.shape
        self.scratch_page = num_pages - 1
        self.page_slots = layers * 2 * self.page_size  # a page's first slot is its number times this
        self._slots = pages.view(num_pages * self.page_slots, kv_heads, head_dim)
        sides = torch.arange(layers * 2, dtype=torch.int64, device=pages.device)
        self._sides = sides * self.page_size  # from a slot to its place in every layer's keys and values

    def keys(self, layer: int) -> Tensor:
        """[num_pages, page_size, kv_heads, head_dim], not contiguous between pages."""
        return self.pages[:, layer, 0]

    def values(self, layer: int) -> Tensor:
        """The same of the values."""
        return self.pages[:, layer, 1]

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store rows [n, kv_heads, head_dim] at ``slots`` [n] int64."""
        for side, rows in enumerate((keys, values)):
            self.side(layer, side).index_copy_(0, slots, rows)

    def side(self, layer: int, side: int) -> Tensor:
        """Keys (0) or values (1) of a layer by slot: [slots, kv_heads, head_dim]."""
        return self._slots[(layer * 2 + side) * self.page_size :]

    def keep_finite(self, slots: Tensor, finite: Tensor) -> None:
        """Zero what was written at ``slots`` [n] in all layers where ``finite`` [n] is false, lest a page's next owner
        inherits NaN. Part of the step itself: once it has ended, the pages may be somebody else's. Rows that are
        finite zero the scratch page instead, so that the device does the same work whatever it has found."""
        wrong = torch.where(finite, self.scratch_page * self.page_slots, slots)
        self._slots.index_fill_(0, (wrong[:, None] + self._sides).flatten(), 0.0)


class DeviceArena:
    """All pages of one model on one device. Belongs to the engine thread."""

    def __init__(
        self,
        device: Device,
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
        shape = (num_layers, 2, page_size, kv_heads, head_dim)
        self.page_bytes = 2 * num_layers * page_size * kv_heads * head_dim * dtype.itemsize
        self.num_device_pages, self.num_host_pages = num_device_pages, num_host_pages
        self.num_disk_pages = num_disk_pages if disk_folder is not None else 0
        device.require(
            (num_device_pages + 1) * self.page_bytes, f"a KV pool of {num_device_pages} pages", "lower kv_tokens"
        )
        require_memory(num_host_pages * self.page_bytes, f"{num_host_pages} host pages", "lower host_kv_tokens")
        self._device = device
        self.pages = torch.zeros((num_device_pages + 1, *shape), dtype=dtype, device=device.torch)
        self._pool = PinnedPool(device, num_host_pages, shape, dtype)
        self._streams = {kind: device.side_stream() for kind in (MoveKind.OUT, MoveKind.IN)}
        self._flying: dict[MoveKind, deque[tuple[MoveId, Event]]] = {kind: deque() for kind in self._streams}
        self._ended = Ended()
        self._file: PageFile | None = None
        if self.num_disk_pages and disk_folder is not None:
            self._file = PageFile(disk_folder, num_disk_pages, self.page_bytes)
            chunk = max(1, min(_DISK_CHUNK_BYTES // self.page_bytes, num_disk_pages))
            self._staged = PinnedPool(device, chunk, shape, dtype)
            self._disk_stream = device.side_stream()
            self._disk_copier = Copier("caesura-kv-disk", self._chunks, self._ended, torch.inference_mode, note_fault)
            self._after: dict[MoveId, Event] = {}  # what a copy to or from the file has to come behind

    @property
    def host(self) -> Tensor:
        """[host pages, layers, 2, page_size, kv_heads, head_dim]."""
        return self._pool.pages

    def begin(self, moves: Sequence[Move]) -> None:
        """Start copies between the tiers. Page ids are checked before any begins."""
        for move in moves:
            if move.kind is MoveKind.COPY:
                raise BrokenInvariant(f"move {move.id} stays on the device; it belongs into copy_within")
            check_move(move, self.num_device_pages, self.num_host_pages, self.num_disk_pages)
        if not moves:
            return
        computed = self._device.record()
        for move in moves:
            below = move.source if move.kind is MoveKind.IN else move.target
            if max(below, default=0) >= self.num_host_pages:
                self._after[move.id] = computed
                self._disk_copier.begin(move)
                continue
            with self._device.on(self._streams[move.kind], computed):
                self._transfer(move)
                self._flying[move.kind].append((move.id, self._device.record()))

    def _transfer(self, move: Move) -> None:
        source, target = (self.pages, self.host) if move.kind is MoveKind.OUT else (self.host, self.pages)
        for first, to, count in runs_of(move, len(move.source), self.num_host_pages):
            target[to : to + count].copy_(source[first : first + count], non_blocking=True)

    def acknowledged(self, *, wait_s: float = 0.0) -> list[MoveId]:
        """Moves finished since the last call; waits up to ``wait_s`` for the first one."""
        deadline = time.monotonic() + wait_s
        while True:
            done = self._passed() + self._ended.take(0.0)
            flying = any(self._flying.values()) or self._ended.pending
            if done or not flying or time.monotonic() >= deadline:
                return done
            time.sleep(_POLL_S)

    def _passed(self) -> list[MoveId]:
        done = []
        for queue in self._flying.values():
            while queue and queue[0][1].query():
                done.append(queue.popleft()[0])
        return done

    def wait_behind(self, moves: Sequence[MoveId]) -> None:
        """Let all that is given to this device from now on come behind these copies, which another device has done.

        Of several devices that do the same steps the first one decides when a copy counts as done.
        """
        for kind, queue in self._flying.items():
            for event in [event for move, event in queue if move in moves]:
                self._device.wait_for(event)
                for other, stream in self._streams.items():
                    if other is not kind:
                        with self._device.on(stream, event):
                            pass
            self._flying[kind] = deque((move, event) for move, event in queue if move not in moves)

    def take_failed(self) -> frozenset[MoveId]:
        """Those of the moves acknowledged since the last call that met a fault of the disk."""
        return self._ended.take_faulty()

    def copy_within(self, copies: Sequence[Move]) -> None:
        """Copy device pages to device pages, in the compute stream."""
        for move in copies:
            check_move(move, self.num_device_pages, self.num_host_pages, self.num_disk_pages)
            for first, to, count in runs_of(move, len(move.source), 0):
                self.pages[to : to + count].copy_(self.pages[first : first + count])

    def close(self) -> None:
        """Finish the copies in flight and free the pages. Idempotent."""
        if self._file is not None:
            self._disk_copier.close()
            self._file.close()
            self._file = None
            self._staged.close()
        self._device.synchronize()
        self._pool.close()
        self.pages = self.pages.new_empty(0)

    # -- the file ---------------------------------------------------------------------------------------------

    def _chunks(self, move: Move) -> Iterator[None]:
        """Copy a move from or to the file, a chunk at each ``next`` but the last, which only ends it."""
        self._device.bind()
        after = self._after.pop(move.id)
        runs = runs_of(move, self._staged.pages.shape[0], self.num_host_pages)
        for number, run in enumerate(runs):
            if move.kind is MoveKind.IN:
                self._raise(run, after)
            else:
                self._sink(run, move.kind, after)
            if number + 1 < len(runs):
                yield

    def _raise(self, run: tuple[int, int, int], after: Event) -> None:
        first, to, count = run
        if first < self.num_host_pages:
            source = self.host[first : first + count]
        else:
            source = self._staged.pages[:count]
            self._disk.read(first - self.num_host_pages, _bytes_of(source))
        with self._device.on(self._disk_stream, after):
            self.pages[to : to + count].copy_(source, non_blocking=True)
            self._device.record().synchronize()

    def _sink(self, run: tuple[int, int, int], kind: MoveKind, after: Event) -> None:
        first, to, count = run
        if kind is MoveKind.DOWN:
            self._disk.write(to - self.num_host_pages, _bytes_of(self.host[first : first + count]))
            return
        target = self.host[to : to + count] if to < self.num_host_pages else self._staged.pages[:count]
        with self._device.on(self._disk_stream, after):
            target.copy_(self.pages[first : first + count], non_blocking=True)
            self._device.record().synchronize()
        if to >= self.num_host_pages:
            self._disk.write(to - self.num_host_pages, _bytes_of(target))

    @property
    def _disk(self) -> PageFile:
        if self._file is None:
            raise BrokenInvariant("a copy from or to the disk, and there is no file")
        return self._file


def _bytes_of(pages: Tensor) -> memoryview:
    """The memory of contiguous host pages."""
    return pages.view(-1).view(torch.uint8).numpy().data
