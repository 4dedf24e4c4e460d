"""The load a policy carries: the rate at which normalized latency reaches twice that of an unloaded machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.pause.runs import RunSpec

LATENCY_FACTOR = 2.0
LEAST_RPS, MOST_RPS = 1e-3, 1e3
UNLOADED_GAP_S = 3000.0  # between arrivals, in the mean: longer than a program lives
UNLOADED_REQUESTS = 120
REAL_GAP_S = 6.0  # the same in real time, with tools that take none
REAL_REQUESTS = 40

Runner = Callable[[RunSpec], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Capacity:
    """``low_rps`` is carried, ``high_rps`` is not; ``rps`` lies between, where the latencies say the limit is met."""

    rps: float
    low_rps: float
    high_rps: float
    runs: tuple[dict[str, Any], ...]


def unloaded(spec: RunSpec, run: Runner) -> float:
    """Normalized latency of programs that have the machine to themselves (mean).

    ``spec.policy`` decides what happens to their KV all the same; "preserve" keeps it.
    """
    if spec.engine == "simulated":
        gap_s, requests, tool_scale = UNLOADED_GAP_S, UNLOADED_REQUESTS, spec.tool_scale
    else:  # how long the tools take does not count anyway
        gap_s, requests, tool_scale = REAL_GAP_S, REAL_REQUESTS, 0.0
    alone = replace(spec, rate_rps=1 / gap_s, minutes=requests * gap_s / 60, limit_s=None)
    alone = replace(alone, tool_scale=tool_scale)
    return float(run(alone)["normalized_latency_s"])


def capacity(
    spec: RunSpec, limit_s: float, guess_rps: float, tolerance: float, run: Runner, *, stretch: float = 1.4
) -> Capacity:
    """Bracket the limit from ``guess_rps`` in steps of ``stretch``, then bisect until high/low <= ``tolerance``.

    The programs are the same at every rate (only the gaps stretch), so neighbours differ by load and not by luck.
    """
    runs: list[dict[str, Any]] = []

    def latency(rate: float) -> float:
        result = run(replace(spec, rate_rps=rate, limit_s=limit_s))
        runs.append(result)
        return math.inf if result["decided_early"] else float(result["normalized_latency_s"])

    low, high = 0.0, math.inf
    at_low, at_high = 0.0, math.inf
    rate = _round(guess_rps)
    while not (low and high < math.inf and high / low <= tolerance):
        found = latency(rate)
        if found <= limit_s:
            low, at_low = rate, found
        else:
            high, at_high = rate, found
        if not low:
            rate = _round(high / stretch)
        elif high == math.inf:
            rate = _round(low * stretch)
        else:
            rate = _round(math.sqrt(low * high))
        if rate < LEAST_RPS or rate > MOST_RPS or rate in (low, high):
            break
    if not low or high == math.inf:
        return Capacity(low or high, low, high, tuple(runs))
    if math.isinf(at_high):
        return Capacity(math.sqrt(low * high), low, high, tuple(runs))
    share = (limit_s - at_low) / (at_high - at_low)
    return Capacity(low + share * (high - low), low, high, tuple(runs))


def _round(rate: float) -> float:
    """Four digits, so that the same rates are tried again when the guess is the same."""
    return float(f"{rate:.4g}")
