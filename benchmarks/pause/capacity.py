"""The load a policy carries: the rate at which normalized latency reaches twice that of an unloaded machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from benchmarks.pause.runs import MEASURED_SHARE, WARM_SHARE, RunRefused, RunSpec

LATENCY_FACTOR = 2.0
LEAST_RPS, MOST_RPS = 1e-3, 1e3
LEAST_REQUESTS = 10  # expected in the window of a run: fewer say nothing about a mean
UNLOADED_GAP_S = 3000.0  # between arrivals, in the mean: longer than a program lives
UNLOADED_REQUESTS = 120
REAL_RPS, REAL_MINUTES = 100.0, 4.0  # in real time the next one always waits for the one before to end

T = TypeVar("T")
Search = Generator[RunSpec, dict[str, Any], T]  # says what to run next, is sent the result, and returns what it found


@dataclass(frozen=True, slots=True)
class Capacity:
    """``low_rps`` is carried, ``high_rps`` is not; ``rps`` lies between, where the latencies say the limit is met.

    All but ``high_rps`` are 0 where nothing is carried that a run of this length can tell.
    """

    rps: float
    low_rps: float
    high_rps: float
    runs: tuple[dict[str, Any], ...]


def carry_out(search: Search[T], run: Callable[[RunSpec], dict[str, Any]]) -> T:
    """Make the runs of a search, one after the other."""
    result = None
    while True:
        try:
            spec = search.send(result)  # type: ignore[arg-type]  # None begins it
        except StopIteration as end:
            found: T = end.value
            return found
        result = run(spec)


def unloaded(spec: RunSpec) -> Search[float]:
    """Normalized latency of programs that have the machine to themselves, one after the other (mean).

    ``spec.policy`` decides what happens to their KV all the same; "preserve" keeps it.
    """
    spec = replace(spec, limit_s=None, alone=True)
    if spec.engine == "simulated":
        minutes = UNLOADED_REQUESTS * UNLOADED_GAP_S / 60
        result = yield replace(spec, rate_rps=1 / UNLOADED_GAP_S, minutes=minutes)
    else:  # how long the tools take does not count anyway
        result = yield replace(spec, rate_rps=REAL_RPS, minutes=REAL_MINUTES, tool_scale=0.0)
    if result["normalized_latency_s"] is None:
        raise RunRefused(
            f"{spec.workload} on an empty machine leaves nothing to measure: "
            "deadlines close all programs, or one takes the whole run"
        )
    return float(result["normalized_latency_s"])


def least_rps(minutes: float) -> float:
    """The lowest rate of which a run of this length can tell whether it is carried."""
    window_s = minutes * 60 * (MEASURED_SHARE - WARM_SHARE)
    return max(LEAST_RPS, _round(1.001 * LEAST_REQUESTS / window_s))  # a little more, whichever way it is rounded


def capacity(
    spec: RunSpec, limit_s: float, guess_rps: float, tolerance: float, *, stretch: float = 1.4
) -> Search[Capacity]:
    """Bracket the limit from ``guess_rps`` in steps of ``stretch``, then bisect until high/low <= ``tolerance``.

    The programs are the same at every rate (only the gaps stretch), so neighbours differ by load and not by luck.
    """
    runs: list[dict[str, Any]] = []

    low, high = 0.0, math.inf
    at_low, at_high = 0.0, math.inf
    least = least_rps(spec.minutes)
    rate = max(least, _round(guess_rps))
    while not (low and high < math.inf and high / low <= tolerance):
        result = yield replace(spec, rate_rps=rate, limit_s=limit_s)
        runs.append(result)
        unknown = result["decided_early"] or result["normalized_latency_s"] is None
        found = math.inf if unknown else result["normalized_latency_s"]
        if found <= limit_s:
            low, at_low = rate, found
        else:
            high, at_high = rate, found
        if not low:
            rate = max(least, _round(high / stretch))
        elif high == math.inf:
            rate = _round(low * stretch)
        else:
            rate = _round(math.sqrt(low * high))
        if rate > MOST_RPS or rate in (low, high):
            break
    if not low or high == math.inf:
        return Capacity(low, low, high, tuple(runs))
    if math.isinf(at_high):
        return Capacity(math.sqrt(low * high), low, high, tuple(runs))
    share = (limit_s - at_low) / (at_high - at_low)
    return Capacity(low + share * (high - low), low, high, tuple(runs))


def _round(rate: float) -> float:
    """Four digits, so that the same rates are tried again when the guess is the same."""
    return float(f"{rate:.4g}")
