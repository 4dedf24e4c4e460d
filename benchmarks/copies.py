"""Copies between the KV tiers beside a plain memory copy: out, in, down to a file, and a short one behind a long one.

A context of 960 tokens of a 135M model is copied page by page as swaps copy it, once with all its pages in a row and
once with them scattered. The disk's figures go through the system's file cache, as the disk tier does.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from caesura.runtime.kv.arena import KvArena
from caesura.runtime.model.config import parse_config
from caesura.scheduler.types import Move, MoveId, MoveKind, PageId

from benchmarks.common import Bench
from benchmarks.dummy import llama_config

PAGE_TOKENS = 16
TOKENS = 960
OTHERS = 4  # pages of each tier per page that is copied: more than caches hold
KINDS = {
    "out": (MoveKind.OUT, "device", "host"),
    "in": (MoveKind.IN, "host", "device"),
    "out to disk": (MoveKind.OUT, "device", "disk"),
    "in from disk": (MoveKind.IN, "disk", "device"),
    "down to disk": (MoveKind.DOWN, "host", "disk"),
}


def run(bench: Bench, *, quick: bool) -> None:
    """Rates of every kind of copy and their share of a plain copy's; how long one page waits behind a context."""
    with tempfile.TemporaryDirectory() as folder:
        pages = -(-TOKENS // PAGE_TOKENS) // (6 if quick else 1)
        arena = _arena(Path(folder), pages * OTHERS)
        bench.configure(tokens=pages * PAGE_TOKENS, page_bytes=arena.page_bytes, threads=torch.get_num_threads())
        try:
            _rates(bench, arena, pages, 3 if quick else 9)
            _turns(bench, arena, pages, 3 if quick else 9)
        finally:
            arena.close()


def _arena(folder: Path, num_pages: int) -> KvArena:
    config = parse_config(llama_config("135M"))
    arena = KvArena(
        num_layers=config.num_layers,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=PAGE_TOKENS,
        num_device_pages=num_pages,
        num_host_pages=num_pages,
        dtype=torch.float32,
        disk_folder=folder,
        num_disk_pages=num_pages,
    )
    for tensor in (arena.device, arena.host):
        tensor.uniform_(-1.0, 1.0)  # pages never written all lie in one page of zeros, in the cache
    return arena


def _rates(bench: Bench, arena: KvArena, pages: int, repeats: int) -> None:
    plain = torch.rand(pages * arena.page_bytes // 4)
    kept = torch.zeros_like(plain)
    places = {
        "in a row": list(range(pages)),
        "scattered": random.Random(bench.seed).sample(range(pages * OTHERS), pages),
    }
    first = {"device": 0, "host": 0, "disk": arena.host.shape[2]}
    work: dict[str, Callable[[], object]] = {"plain copy": lambda: kept.copy_(plain)}
    for where, rows in places.items():
        for name, (kind, source, target) in KINDS.items():
            ends = [tuple(PageId(first[tier] + row) for row in rows) for tier in (source, target)]
            work[f"{name}, {where}"] = partial(_copy, arena, [Move(MoveId(0), kind, ends[0], ends[1])])
    rates: dict[str, list[float]] = {name: [] for name in work}
    for number in range(repeats + 1):  # in turns: what disturbs the machine disturbs all alike
        for name, step in work.items():
            begun = time.perf_counter()
            step()
            if number:
                rates[name].append(pages * arena.page_bytes / (time.perf_counter() - begun) / 1e9)
    for name, values in rates.items():
        bench.record(name, values, unit="GB/s", baseline="plain copy")


def _turns(bench: Bench, arena: KvArena, pages: int, repeats: int) -> None:
    """Seconds until one page is acknowledged: alone, and begun right after a whole context."""
    whole = Move(MoveId(1), MoveKind.OUT, _ids(0, pages), _ids(0, pages))
    short = Move(MoveId(2), MoveKind.OUT, _ids(pages, 1), _ids(pages, 1))
    for name, moves in (("one page alone", [short]), ("one page behind a context", [whole, short])):
        waits = [_wait(arena, moves, short) for _ in range(repeats)]
        bench.record(name, waits, unit="s", baseline="one page alone")


def _wait(arena: KvArena, moves: list[Move], short: Move) -> float:
    begun = time.perf_counter()
    waited_s = 0.0
    arena.begin(moves)
    left = {move.id for move in moves}
    while left:
        done = set(arena.acknowledged(wait_s=1.0))
        if short.id in done:
            waited_s = time.perf_counter() - begun
        left -= done
    return waited_s


def _ids(first: int, count: int) -> tuple[PageId, ...]:
    return tuple(PageId(page) for page in range(first, first + count))


def _copy(arena: KvArena, moves: list[Move]) -> None:
    arena.begin(moves)
    while not arena.acknowledged(wait_s=1.0):
        pass
    if arena.take_failed():
        raise OSError("the disk did not take the pages or did not give them back")
