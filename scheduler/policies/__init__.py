"""Pause policies by name."""

from __future__ import annotations

from caesura.scheduler.estimate import make_estimator
from caesura.scheduler.policies.base import Choice, PausedContext, PausePolicy, Room, Take, View
from caesura.scheduler.policies.discard import Discard, ImprovedDiscard
from caesura.scheduler.policies.infercept import InferCept
from caesura.scheduler.policies.lru import Lru, LruHost
from caesura.scheduler.policies.min_waste import MinWaste
from caesura.scheduler.policies.preserve import Preserve, Swap

POLICIES: dict[str, type[PausePolicy]] = {
    policy.name: policy for policy in (Discard, ImprovedDiscard, Lru, LruHost, Preserve, Swap, InferCept, MinWaste)
}
DEFAULT_POLICY = MinWaste.name


def make_policy(name: str) -> PausePolicy:
    """A fresh policy by name, or by ``name+estimator``; ValueError names the ones there are."""
    policy, _, estimator = name.partition("+")
    if policy not in POLICIES:
        raise ValueError(f"policy is {policy!r}; it must be one of {', '.join(POLICIES)}")
    return POLICIES[policy](make_estimator(estimator) if estimator else None)


__all__ = [
    "DEFAULT_POLICY",
    "POLICIES",
    "Choice",
    "PausePolicy",
    "PausedContext",
    "Room",
    "Take",
    "View",
    "make_policy",
]
