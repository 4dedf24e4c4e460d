"""One thing always: keep, or swap."""

from __future__ import annotations

from caesura.scheduler.policies.base import Choice, PausePolicy, View
from caesura.scheduler.types import Action


class Preserve(PausePolicy):
    """Keep the KV on the device for the whole pause; given up only when nothing else can run."""

    name = "preserve"

    def review(self, view: View) -> list[Choice]:
        return [
            Choice(paused.id, Action.PRESERVE, view.costs(paused), "always preserve")
            for paused in view.paused
            if paused.tool and paused.decided is None
        ]


class Swap(PausePolicy):
    """Copy to the host at every pause, beside compute; discard what the host has no room for."""

    name = "swap"
    uses_host = True

    def review(self, view: View) -> list[Choice]:
        return [
            Choice(paused.id, Action.SWAP, view.costs(paused), "always swap")
            for paused in view.paused
            if paused.tool and paused.decided is None
        ]
