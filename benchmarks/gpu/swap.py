"""Pages out and in beside the link's rate, and what that does to those who decode meanwhile."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import torch
from caesura.runtime.executors.torch_cuda import CudaExecutor
from caesura.scheduler.types import Move, MoveId, MoveKind, PageId

from benchmarks.gpu.common import PAGE_TOKENS, decode_slices, llama_8b, make_executor, measure_limits, report

TOKENS = 4096
PAGES = TOKENS // PAGE_TOKENS
DEPTH = 1024
CONTEXTS = 64
FIRST = 6000  # pages from here on are swapped; the ones before decode


def main() -> None:
    """Rates with neighbouring and with scattered pages, contents, and the slowdown."""
    limits = measure_limits()
    report("link out / in", f"{limits.out_bytes_s / 1e9:.1f} / {limits.in_bytes_s / 1e9:.1f}", "GB/s")
    executor = make_executor(llama_8b(), kv_tokens=160_000, host_tokens=4 * TOKENS)
    arena = executor.runner.arena
    near = list(range(PAGES))
    scattered = random.Random(0).sample(range(2 * PAGES), PAGES)
    arena.pages[FIRST : FIRST + 2 * PAGES].uniform_(-1, 1)
    for name, device, host in (("neighbours", near, near), ("scattered", scattered, scattered[::-1])):
        rows = [FIRST + page for page in device]
        kept = arena.pages[rows].clone()
        for kind, rate in ((MoveKind.OUT, limits.out_bytes_s), (MoveKind.IN, limits.in_bytes_s)):
            seconds = statistics.median(_copy(executor, kind, rows, host) for _ in range(5))
            done = PAGES * arena.page_bytes / seconds
            what = f"swap {kind.value} of {TOKENS} tokens, {name}"
            report(what, done / 1e9, "GB/s", share=done / rate, target=0.8)
            if kind is MoveKind.OUT:
                arena.pages[rows] = 0
        if not torch.equal(arena.pages[rows], kept):
            report(f"swap, {name}: contents", "DIFFER")
    _slowdown(executor, near)
    executor.close()


def _moves(kind: MoveKind, device: list[int], host: list[int]) -> Move:
    source, target = (device, host) if kind is MoveKind.OUT else (host, device)
    return Move(MoveId(1), kind, tuple(map(PageId, source)), tuple(map(PageId, target)))


def _copy(executor: CudaExecutor, kind: MoveKind, device: list[int], host: list[int]) -> float:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    executor.begin([_moves(kind, device, host)])
    while not executor.acknowledged(wait_s=1.0):
        pass
    return time.perf_counter() - begun


def _slowdown(executor: CudaExecutor, near: list[int]) -> None:
    """Decode steps with the link idle, and with a swap always under way in both directions."""
    rows = [FIRST + page for page in near]
    others = [FIRST + PAGES + page for page in near]
    flying = 0

    def keep_busy() -> None:
        nonlocal flying
        flying -= len(executor.acknowledged())
        if flying < 2:
            executor.begin([_moves(MoveKind.OUT, rows, near), _moves(MoveKind.IN, others, [PAGES + p for p in near])])
            flying += 2

    idle = [_steps(executor, lambda: None)]
    busy = _steps(executor, keep_busy)
    while flying:
        flying -= len(executor.acknowledged(wait_s=1.0))
    idle.append(_steps(executor, lambda: None))
    slower = busy / statistics.mean(idle) - 1
    report(f"decode of {CONTEXTS} beside swaps", busy * 1e3, "ms", share=slower, target=0.03, below=True)


def _steps(executor: CudaExecutor, beside: Callable[[], None], count: int = 60) -> float:
    slices = decode_slices(CONTEXTS, DEPTH)
    times = []
    ticket = executor.launch(slices, ())
    for _ in range(count):
        begun = time.perf_counter()
        beside()
        following = executor.launch(slices, ())
        executor.collect(ticket)
        ticket = following
        times.append(time.perf_counter() - begun)
    executor.collect(ticket)
    return statistics.median(times[5:])


if __name__ == "__main__":
    main()
