"""Measure the cost profile of an executor: what an iteration and a copy cost here. Under 3 seconds, then cached."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from caesura.runtime.executors.base import Executor, SliceInput
from caesura.runtime.sampling import SamplerState, SamplingParams
from caesura.scheduler.profile import CostProfile
from caesura.scheduler.types import ContextId, Move, MoveId, MoveKind, PageId

BUDGET_S = 2.0
ROWS = (1, 4, 16, 64, 256)
WIDE_ROWS = (*ROWS, 1024, 2048, 4096, 8192)
WIDE_DEPTH = 16_384
COPIED_BYTES = 64 << 20  # more than a last-level cache, or copies look cheaper than they are
FORMAT = 4

Timer = Callable[[], float]


def measure(executor: Executor, *, wide: bool = False, clock: Timer = time.perf_counter) -> CostProfile:
    """Fit the affine cost model to a few timed iterations and copies. The pools must be idle: pages are written.

    ``wide``: the device computes many rows in the time of one, as GPUs do. Then the point from which on it does not is
    looked for with more rows, and single rows sample, as they do in decode steps.
    """
    size = executor.page_size
    room = min(executor.num_device_pages * size, executor.max_context_tokens)
    rows = [count for count in (WIDE_ROWS if wide else ROWS) if count <= room] or [room]
    times: dict[int, float] = {}
    begun = clock()
    for count in rows:
        if len(times) > 1 and clock() - begun > BUDGET_S / 2:
            break  # a model so slow that the smaller steps tell enough
        times[count] = _timed(partial(_run, executor, 0, count, samples=wide), BUDGET_S / 2 / len(rows), clock)
    step_s, token_s = _line(times)
    depth = min(room - 1, WIDE_DEPTH if wide else 1024)
    attention_s = 0.0
    if depth >= 64:
        deep = _timed(partial(_run, executor, depth, 1, samples=wide), BUDGET_S / 8, clock)
        attention_s = max(0.0, (deep - times[rows[0]]) / depth)
    swap_base_s, swap_token_s = _copy_line(executor, 0, executor.num_host_pages)
    if wide:
        saturation = _knee(times)
    else:
        saturation = next((n for n in times if n * token_s >= step_s), max(times))
    profile = CostProfile(step_s, token_s, attention_s, swap_base_s, swap_token_s, max(16, saturation), "measured")
    return with_disk(executor, profile)


def _knee(times: dict[int, float]) -> int:
    """Rows at which the line through the two largest steps meets the time of the smallest one: from there on a row
    costs its full price."""
    if len(times) < 3:
        return max(times)
    *_, before, last = sorted(times)
    slope = (times[last] - times[before]) / (last - before)
    if slope <= 0:
        return last
    return max(1, min(last, round(last - (times[last] - times[min(times)]) / slope)))


def with_disk(executor: Executor, profile: CostProfile) -> CostProfile:
    """The profile with the rate of the executor's disk tier: the mean of writing pages and reading them back.

    As the disk tier itself does, this goes through the system's file cache, which serves what was written lately.
    A disk that fails gets no rate, and so no use.
    """
    try:
        base_s, token_s = _copy_line(executor, executor.num_host_pages, executor.num_disk_pages)
    except OSError:
        base_s = token_s = 0.0
    return replace(profile, disk_base_s=base_s, disk_token_s=token_s)


def measured(executor: Executor, key: str, *, wide: bool = False) -> CostProfile:
    """``measure``, or what an earlier process measured for the same machine, model and settings."""
    path = _cache_dir() / f"{hashlib.sha256(f'{FORMAT}|{_machine()}|{key}'.encode()).hexdigest()[:24]}.json"
    try:
        return CostProfile(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        pass
    profile = measure(executor, wide=wide)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps(asdict(profile)))
        partial.replace(path)
    except OSError:
        pass  # a read-only home only costs the next start two seconds
    return profile


def _run(executor: Executor, start: int, rows: int, *, samples: bool) -> None:
    pages = [PageId(page) for page in range(-(-(start + rows) // executor.page_size))]
    sampler = SamplerState(SamplingParams(temperature=0.0), seed=0) if samples else None
    executor.execute([SliceInput(ContextId(-1), [0] * rows, start, pages, sampler)], ())


def _timed(action: Callable[[], None], budget_s: float, clock: Timer = time.perf_counter) -> float:
    """Least seconds of one call, from as many as fit the budget; the first only warms up, unless it took all of it."""
    begun = clock()
    action()
    samples = [clock() - begun]
    if samples[0] > budget_s:
        return samples[0]
    samples.clear()
    begun = clock()
    while len(samples) < 2 or (clock() - begun < budget_s and len(samples) < 20):
        before = clock()
        action()
        samples.append(clock() - before)
    return min(samples)  # other processes only ever add


def _line(times: dict[int, float]) -> tuple[float, float]:
    """Base and slope through the smallest and the largest point; never negative."""
    low, high = min(times), max(times)
    slope = (times[high] - times[low]) / (high - low) if high > low else times[low] / low
    slope = max(slope, 1e-9)
    return max(times[low] - low * slope, 1e-6), slope


def _copy_line(executor: Executor, first: int, num_pages: int) -> tuple[float, float]:
    """Base and slope, in tokens, of copying to and from the ``num_pages`` rows below the device that begin at
    ``first``: the mean of both directions."""
    beyond_caches = -(-COPIED_BYTES // executor.page_bytes)
    most = min(executor.num_device_pages, num_pages, beyond_caches)
    if most < 2:
        return 0.0, 0.0

    def copy(kind: MoveKind, count: int) -> None:
        device = tuple(PageId(page) for page in range(count))
        below = tuple(PageId(first + page) for page in range(count))
        source, target = (device, below) if kind is MoveKind.OUT else (below, device)
        executor.begin([Move(MoveId(-1), kind, source, target)])
        while not executor.acknowledged(wait_s=1.0):
            pass
        if executor.take_failed():
            raise OSError("the disk tier does not take its pages or does not give them back")

    times = {
        count * executor.page_size: sum(
            _timed(partial(copy, kind, count), BUDGET_S / 32) / 2 for kind in (MoveKind.OUT, MoveKind.IN)
        )
        for count in (1, most)
    }
    return _line(times)


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        model = platform.processor()
    return f"{model}|{os.cpu_count()}"


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "caesura" / "profiles"
