"""Free the KV at every pause."""

from __future__ import annotations

from caesura.scheduler.context import Context
from caesura.scheduler.policies.base import Choice, PausePolicy, View
from caesura.scheduler.types import Action


class ImprovedDiscard(PausePolicy):
    """Discard at the pause; the resumed context keeps its original place (InferCept's ImprovedDiscard).

    W_D = T_fwd(C) * C + T_fwd(C) * C_other (equation 1 of arXiv 2402.01869) is paid at every return. What another
    context holds as well stays for that one: the engines of the paper's time shared no prefixes, ours does.
    """

    name = "improved_discard"

    def review(self, view: View) -> list[Choice]:
        return [
            Choice(paused.id, Action.DISCARD, view.costs(paused), "always discard")
            for paused in view.paused
            if paused.tool and paused.decided is None
        ]


class Discard(ImprovedDiscard):
    """Discard, and to the back of the queue on return: vLLM of the paper's time, where a pause ended the request."""

    name = "discard"

    def order_key(self, context: Context) -> tuple[float, ...]:
        return (context.submitted, context.id)
