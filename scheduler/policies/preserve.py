"""Keep the KV on the device through every pause."""

from __future__ import annotations

from caesura.scheduler.policies.base import Choice, PausePolicy, View
from caesura.scheduler.types import Action


class Preserve(PausePolicy):
    """Keep for the whole pause: W_P = T_int * C (equation 2 of arXiv 2402.01869).

    Given up only when nothing else can run, from the latest arrival backwards.
    """

    name = "preserve"

    def review(self, view: View) -> list[Choice]:
        return [
            Choice(paused.id, Action.PRESERVE, view.costs(paused), "always preserve")
            for paused in view.paused
            if paused.tool and paused.decided is None
        ]
