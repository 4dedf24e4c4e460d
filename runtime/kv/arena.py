"""The two KV arenas and the thread that copies pages between them.

Both have one layout, [layers, 2, pages, page_size, kv_heads, head_dim], and are allocated once: a fresh allocation
costs five times what copying into it costs. Copies between the tiers run on one background thread, beside compute
(torch releases the interpreter lock), and are acknowledged by id; until then both ends belong to the copy, which
the ledger enforces. Copies within the device tier are done at once, at the start of the step that needs them.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence

import torch
from caesura.runtime.errors import BrokenInvariant
from caesura.runtime.model.memory import require_memory
from caesura.scheduler.types import Move, MoveId, MoveKind
from torch import Tensor


class KvArena:
    """Device and host pages of one model. ``begin``, ``acknowledged`` and ``close`` belong to the engine thread."""

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
    ) -> None:
        """Raises BrokenInvariant for sizes out of range, NotEnoughMemory when the pools do not fit."""
        if not 1 <= page_size <= 64 or num_device_pages < 1 or num_host_pages < 0:
            raise BrokenInvariant(
                f"page_size {page_size} must lie in 1..64, num_device_pages {num_device_pages} be at least 1, "
                f"num_host_pages {num_host_pages} not negative"
            )
        self.page_size = page_size
        self.page_bytes = 2 * num_layers * page_size * kv_heads * head_dim * dtype.itemsize
        require_memory(
            (num_device_pages + num_host_pages) * self.page_bytes,
            f"a KV pool of {num_device_pages} device and {num_host_pages} host pages",
            "ask for fewer pages",
        )
        self.device = torch.zeros(num_layers, 2, num_device_pages, page_size, kv_heads, head_dim, dtype=dtype)
        self.host = torch.zeros(num_layers, 2, num_host_pages, page_size, kv_heads, head_dim, dtype=dtype)
        self.layers: tuple[Tensor, ...] = self.device.unbind(0)
        self._jobs: queue.SimpleQueue[Move | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._done: list[MoveId] = []
        self._failure: BaseException | None = None
        self._pending = 0
        self._thread: threading.Thread | None = None

    def begin(self, moves: Sequence[Move]) -> None:
        """Queue copies between the tiers. Page ids are checked here, in the caller's thread."""
        for move in moves:
            if move.kind is MoveKind.COPY:
                raise BrokenInvariant(f"move {move.id} stays on the device; it belongs into copy_within")
            self._check(move)
        if moves and self._thread is None:
            self._thread = threading.Thread(target=self._work, name="caesura-kv-copy", daemon=True)
            self._thread.start()
        self._pending += len(moves)
        for move in moves:
            self._jobs.put(move)

    def acknowledged(self, *, wait_s: float = 0.0) -> list[MoveId]:
        """Moves finished since the last call, oldest first; waits up to ``wait_s`` for the first one."""
        deadline = time.monotonic() + wait_s
        with self._changed:
            while not self._done and self._failure is None and self._pending:
                remaining_s = deadline - time.monotonic()
                if remaining_s <= 0 or not self._changed.wait(remaining_s):
                    break
            if self._failure is not None:
                raise BrokenInvariant(f"the page copy thread failed: {self._failure!r}") from self._failure
            done, self._done = self._done, []
        self._pending -= len(done)
        return done

    def copy_within(self, copies: Sequence[Move]) -> None:
        """Copy device pages to device pages, now."""
        for move in copies:
            self._check(move)
            _copy_pages(self.device, self.device, move)

    def close(self) -> None:
        """Finish the copies in flight, stop the thread and free the arenas. May be called twice."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None
        self.device = self.host = self.device.new_empty(0)
        self.layers = ()

    def _check(self, move: Move) -> None:
        device, host = self.device.shape[2], self.host.shape[2]
        source_pages = host if move.kind is MoveKind.IN else device
        target_pages = host if move.kind is MoveKind.OUT else device
        if len(move.source) != len(move.target):
            raise BrokenInvariant(f"move {move.id}: {len(move.source)} sources, {len(move.target)} targets")
        for ids, limit, end in ((move.source, source_pages, "source"), (move.target, target_pages, "target")):
            if ids and not (min(ids) >= 0 and max(ids) < limit):
                raise BrokenInvariant(f"move {move.id}: a {end} page lies outside [0, {limit}): {min(ids)}..{max(ids)}")

    def _work(self) -> None:
        with torch.inference_mode():
            while (move := self._jobs.get()) is not None:
                try:
                    if move.kind is MoveKind.OUT:
                        _copy_pages(self.device, self.host, move)
                    else:
                        _copy_pages(self.host, self.device, move)
                except BaseException as error:  # reported to the engine thread, which must not wait for ever
                    with self._changed:
                        self._failure = error
                        self._changed.notify_all()
                    return
                with self._changed:
                    self._done.append(move.id)
                    self._changed.notify_all()


def _copy_pages(source: Tensor, target: Tensor, move: Move) -> None:
    """Copy pages run by run: neighbours on both sides go in one call, and nothing is allocated."""
    start = 0
    pairs = list(zip(move.source, move.target, strict=True))
    for index in range(1, len(pairs) + 1):
        joined = index < len(pairs) and pairs[index] == (pairs[index - 1][0] + 1, pairs[index - 1][1] + 1)
        if joined:
            continue
        (first, to), count = pairs[start], index - start
        target[:, :, to : to + count].copy_(source[:, :, first : first + count])
        start = index
