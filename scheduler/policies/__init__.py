"""Pause policies by name."""

from __future__ import annotations

from caesura.scheduler.policies.base import Choice, PausedContext, PausePolicy, Take, View
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
    """A fresh policy; ValueError names the ones there are."""
    try:
        return POLICIES[name]()
    except KeyError:
        raise ValueError(f"policy is {name!r}; it must be one of {', '.join(POLICIES)}") from None


__all__ = ["DEFAULT_POLICY", "POLICIES", "Choice", "PausePolicy", "PausedContext", "Take", "View", "make_policy"]
