"""Distributions that workloads are made of, each from a ``random.Random`` of its own."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping


def normal(source: random.Random, mean: float, std: float, low: float, high: float = math.inf) -> float:
    """Normal, clipped to ``[low, high]``."""
    return min(high, max(low, source.gauss(mean, std)))


def tokens(source: random.Random, mean: float, std: float, low: int = 1, high: int = 1 << 30) -> int:
    """A length: log-normal of this mean and standard deviation, clipped."""
    return min(high, max(low, round(lognormal(source, mean, std))))


def lognormal(source: random.Random, mean: float, std: float) -> float:
    """Log-normal of this mean and standard deviation (of the variable, not of its logarithm)."""
    if std == 0:
        return mean
    variance = math.log1p((std / mean) ** 2)
    return source.lognormvariate(math.log(mean) - variance / 2, math.sqrt(variance))


def choice(source: random.Random, shares: Mapping[int, float]) -> int:
    """One of the keys, by share."""
    return source.choices(tuple(shares), tuple(shares.values()))[0]
