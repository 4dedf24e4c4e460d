"""A pause ends the request; its pages stay in the tree and go by LRU: SGLang and vLLM as they are today."""

from __future__ import annotations

from caesura.scheduler.context import Context
from caesura.scheduler.policies.base import Choice, PausePolicy, View
from caesura.scheduler.types import Action


class Lru(PausePolicy):
    """Let go at every pause, with or without a tool; come back as a new request, at the back of the queue."""

    name = "lru"
    releases_idle = True

    def order_key(self, context: Context) -> tuple[float, ...]:
        return (context.submitted, context.id)

    def review(self, view: View) -> list[Choice]:
        return [
            Choice(paused.id, Action.RELEASE, view.costs(paused), "left to the cache, least recently used goes first")
            for paused in view.paused
            if paused.decided is None
        ]


class LruHost(Lru):
    """The same with a host tier below, written through at the pause (HiCache, vLLM's offload)."""

    name = "lru_host"
    uses_host = True
    writes_through = True
