"""Pause policies by name: the default, InferCept's baselines, today's engines, the papers, the upper bound."""

from __future__ import annotations

from caesura.scheduler.estimate import make_estimator
from caesura.scheduler.policies.admission_only import AdmissionOnly
from caesura.scheduler.policies.augserve import AugServe
from caesura.scheduler.policies.base import Choice, PausedContext, PausePolicy, Room, Take, View
from caesura.scheduler.policies.continuum import Continuum
from caesura.scheduler.policies.discard import Discard, ImprovedDiscard
from caesura.scheduler.policies.infercept import InferCept, InferCeptOracle, InferCeptProfiled
from caesura.scheduler.policies.lamps import Lamps
from caesura.scheduler.policies.lru import Lru, LruHost
from caesura.scheduler.policies.min_waste import MinWaste
from caesura.scheduler.policies.oracle import Oracle
from caesura.scheduler.policies.preserve import Preserve
from caesura.scheduler.policies.session_refs import SessionRefs
from caesura.scheduler.policies.swap import Swap, SwapBlocking
from caesura.scheduler.policies.thunderagent import ThunderAgent

POLICIES: dict[str, type[PausePolicy]] = {
    policy.name: policy
    for policy in (
        MinWaste,
        Discard,
        ImprovedDiscard,
        Preserve,
        Swap,
        SwapBlocking,
        Lru,
        LruHost,
        SessionRefs,
        AdmissionOnly,
        InferCept,
        InferCeptOracle,
        InferCeptProfiled,
        Lamps,
        AugServe,
        Continuum,
        ThunderAgent,
        Oracle,
    )
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
