"""InferCept's rule (arXiv 2402.01869, section 4.3)."""

from __future__ import annotations

from caesura.scheduler.policies.base import Choice, PausePolicy, View
from caesura.scheduler.types import Action


class InferCept(PausePolicy):
    """Each iteration the free swap budget goes to the largest min(W_P, W_CD); the rest take the smaller of the two.

    T_int is the elapsed time, re-read each iteration, so a context is preserved at first and discarded once it has
    waited longer than recomputing it would cost. The budget is N with T_swap(N) = T_fwd(B). C is the part that no
    other context holds; without shared prefixes that is the paper's C.
    """

    name = "infercept"
    estimator_name = "elapsed"
    uses_host = True

    def review(self, view: View) -> list[Choice]:
        open_cases = [p for p in view.paused if p.tool and p.exclusive_tokens and p.decided in (None, Action.PRESERVE)]
        priced = [(paused, view.costs(paused)) for paused in open_cases]
        priced.sort(key=lambda case: (-min(case[1].preserve_token_s, case[1].discard_token_s), case[0].id))
        budget = view.profile.hidden_tokens(view.query_tokens) if view.has_host else 0
        budget -= view.copying_pages * view.page_size
        choices = []
        for paused, costs in priced:
            if min(costs.preserve_token_s, costs.discard_token_s) > 0 and paused.exclusive_tokens <= budget:
                budget -= paused.exclusive_tokens
                choices.append(Choice(paused.id, Action.SWAP, costs, "largest waste, and the copy hides in this step"))
            elif costs.preserve_token_s > costs.discard_token_s:
                choices.append(Choice(paused.id, Action.DISCARD, costs, "has waited longer than recomputing costs"))
            elif paused.decided is None:
                choices.append(Choice(paused.id, Action.PRESERVE, costs, "keeping costs less than recomputing"))
        return choices
