"""Copy the KV to the host at every pause."""

from __future__ import annotations

from dataclasses import replace

from caesura.scheduler.policies.base import Choice, PausedContext, PausePolicy, View
from caesura.scheduler.types import Action, ActionCosts
from caesura.scheduler.waste import swap_blocking_token_s


class Swap(PausePolicy):
    """Swap out at every pause and in on return, beside compute; what the host has no room for is discarded.

    Waste: what is being copied idles for as long as the copy takes, 2 * T_swap(C) * C.
    """

    name = "swap"
    uses_host = True

    def review(self, view: View) -> list[Choice]:
        return [
            Choice(paused.id, Action.SWAP, self._price(view, paused), "always swap")
            for paused in view.paused
            if paused.tool and paused.decided is None
        ]

    def _price(self, view: View, paused: PausedContext) -> ActionCosts:
        return view.costs(paused)


class SwapBlocking(Swap):
    """The same, but every step waits for the copies of the one before, as InferCept's baseline Swap does.

    Waste: W_S = 2 * T_swap(C) * C_batch (equation 3 of arXiv 2402.01869), the whole batch idling.
    """

    name = "swap_blocking"
    waits_for_copies = True

    def _price(self, view: View, paused: PausedContext) -> ActionCosts:
        blocking = swap_blocking_token_s(view.profile, paused.exclusive_tokens, view.batch_tokens)
        return replace(view.costs(paused), swap_token_s=blocking)
