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
from caesura.scheduler.profile import CostProfile
from caesura.scheduler.types import ContextId, Move, MoveId, MoveKind, PageId

BUDGET_S = 2.0
ROWS = (1, 4, 16, 64, 256)
COPIED_BYTES = 64 << 20  # more than a last-level cache, or copies look cheaper than they are
FORMAT = 4


def measure(executor: Executor) -> CostProfile:
    """Fit the affine cost model to a few timed iterations and copies. The pools must be idle: pages are written."""
    size = executor.page_size
    room = min(executor.num_device_pages * size, executor.max_context_tokens)
    rows = [count for count in ROWS if count <= room] or [room]
    times: dict[int, float] = {}
    begun = time.perf_counter()
    for count in rows:
        if len(times) > 1 and time.perf_counter() - begun > BUDGET_S / 2:
            break  # a model so slow that the smaller steps tell enough
        times[count] = _timed(partial(_run, executor, 0, count), BUDGET_S / 2 / len(rows))
    step_s, token_s = _line(times)
    depth = min(room - 1, 1024)
    attention_s = 0.0
    if depth >= 64:
        deep = _timed(partial(_run, executor, depth, 1), BUDGET_S / 8)
        attention_s = max(0.0, (deep - times[rows[0]]) / depth)
    swap_base_s, swap_token_s = _copy_line(executor, 0, executor.num_host_pages)
    saturation = next((n for n in times if n * token_s >= step_s), max(times))
    profile = CostProfile(step_s, token_s, attention_s, swap_base_s, swap_token_s, max(16, saturation), "measured")
    return with_disk(executor, profile)


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


def measured(executor: Executor, key: str) -> CostProfile:
    """``measure``, or what an earlier process measured for the same machine, model and settings."""
    path = _cache_dir() / f"{hashlib.sha256(f'{FORMAT}|{_machine()}|{key}'.encode()).hexdigest()[:24]}.json"
    try:
        return CostProfile(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        pass
    profile = measure(executor)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps(asdict(profile)))
        partial.replace(path)
    except OSError:
        pass  # a read-only home only costs the next start two seconds
    return profile


def _run(executor: Executor, start: int, rows: int) -> None:
    pages = range(-(-(start + rows) // executor.page_size))
    executor.execute([SliceInput(ContextId(-1), [0] * rows, start, list(pages), None)], ())


def _timed(action: Callable[[], None], budget_s: float) -> float:
    """Least seconds of one call, from as many as fit the budget; the first only warms up, unless it took all of it."""
    begun = time.perf_counter()
    action()
    samples = [time.perf_counter() - begun]
    if samples[0] > budget_s:
        return samples[0]
    samples.clear()
    begun = time.perf_counter()
    while len(samples) < 2 or (time.perf_counter() - begun < budget_s and len(samples) < 20):
        before = time.perf_counter()
        action()
        samples.append(time.perf_counter() - before)
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
