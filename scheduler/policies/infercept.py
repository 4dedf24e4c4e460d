"""InferCept's rule (arXiv 2402.01869, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

from caesura.scheduler.policies.base import Choice, PausedContext, PausePolicy, View
from caesura.scheduler.types import Action, ActionCosts


class InferCept(PausePolicy):
    """Each iteration the free swap budget goes to the largest min(W_P, W_CD); the rest take the smaller of the two.

    ::

        W_P  = T_int * C                                                   (2)
        W_CD = T_fwd(C) * C / 2 + n * T_fwd(C / n) * C_other               (4)
        swap limit N: T_swap(N) = T_fwd(B);  out + in <= N;  out <= free host pages

    T_int is the elapsed time, re-read each iteration, so a context is preserved at first and discarded once it has
    waited longer than recomputing it would cost. Contexts may be swapped in parts, from the end. Copies in flight, in
    or out, count against N; copies in are not held back beyond that (one link carries them one after the other). Order:
    original arrival. C is what no other context holds: without shared prefixes, the paper's C. The published code
    differs (true durations, swaps on demand alone): that is ``infercept_oracle``, apart from its constants.
    """

    name = "infercept"
    estimator_name = "elapsed"
    uses_host = True
    review_every_s = 0.0  # each iteration

    def review(self, view: View) -> list[Choice]:
        budget = 0
        if view.has_host:
            budget = view.profile.hidden_tokens(view.query_tokens) - view.copying_pages * view.page_size
            budget = min(budget, view.free_host_pages * view.page_size)
        choices = []
        for paused, costs in self._by_waste(view):
            wasted = min(costs.preserve_token_s, costs.discard_token_s)
            if wasted > 0 and budget >= view.page_size:
                share = min(budget, paused.exclusive_tokens)
                budget -= share
                why = "largest waste, and the copy hides behind this step"
                choices.append(Choice(paused.id, Action.SWAP, costs, why, num_tokens=share))
            elif costs.preserve_token_s > costs.discard_token_s:
                choices.append(Choice(paused.id, Action.DISCARD, costs, "has waited longer than recomputing costs"))
            elif paused.decided is None:
                choices.append(Choice(paused.id, Action.PRESERVE, costs, "keeping costs less than recomputing"))
        return choices

    @staticmethod
    def _by_waste(view: View) -> Sequence[tuple[PausedContext, ActionCosts]]:
        """The contexts still to be decided about, the most wasteful first."""
        priced = [(paused, view.costs(paused)) for paused in view.paused if paused.tool and paused.exclusive_tokens]
        priced.sort(key=lambda case: (-min(case[1].preserve_token_s, case[1].discard_token_s), case[0].id))
        return priced


class InferCeptOracle(InferCept):
    """The same with true durations, as the paper's published code has them (an upper bound of its estimate)."""

    name = "infercept_oracle"
    estimator_name = "oracle"


class InferCeptProfiled(InferCept):
    """The same with the mean duration of the tool: the rule that the paper describes and does not use."""

    name = "infercept_profiled"
    estimator_name = "profiled"
