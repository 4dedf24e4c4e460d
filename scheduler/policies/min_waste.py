"""Ours: waste over a shared tree, paid only when memory is wanted, with durations conditional on elapsed time."""

from __future__ import annotations

from collections.abc import Iterator

from caesura.scheduler.ledger import Segment
from caesura.scheduler.policies.base import PausePolicy, Take, View, leaf_first, segment_costs
from caesura.scheduler.types import Action, ActionCosts


class MinWaste(PausePolicy):
    """Take the runs whose absence costs least per token kept free.

    1. *Sharing*: a run with a running sharer is never a candidate (keeping it is free, dropping it frees nothing); else
       it is kept for the first of its paused holders to return, T(v) = min E[remaining], and recomputed once.
    2. *On demand*: nothing is given up while nobody wants the memory. While the link is idle, likely victims are
       copied to the host, so that taking their device pages later is free.
    3. *Conditional durations*: E[remaining | elapsed] per tool, with the program's hint until there are samples.

    For a run v: W_keep = T(v) |v|; W_drop = equation 4 of InferCept at v's depth; W_swap = the exposed copies. The
    run with the largest (W_keep - min(W_drop, W_swap)) per token goes first. Without sharing, and with memory always
    wanted, this is InferCept's comparison.
    """

    name = "min_waste"
    uses_host = True
    on_demand = True
    copies_ahead_below = 0.25

    def _priced(self, view: View) -> tuple[list[Segment], dict[int, tuple[ActionCosts, float]]]:
        remaining = {paused.id: paused.remaining_s for paused in view.paused}
        segments = list(view.segments())
        prices = {}
        for segment in segments:
            left = min(remaining[holder] for holder in segment.holders)
            prices[segment.id] = (segment_costs(view, segment, left), left)
        return segments, prices

    @staticmethod
    def _loss(view: View, costs: ActionCosts) -> float:
        return min(costs.swap_token_s, costs.discard_token_s) if view.has_host else costs.discard_token_s

    def reclaim(self, view: View, wanted_pages: int) -> Iterator[Take]:
        segments, prices = self._priced(view)

        def saved_per_token(segment: Segment) -> float:
            costs, _ = prices[segment.id]
            return (costs.preserve_token_s - self._loss(view, costs)) / max(1, segment.num_tokens)

        for segment in leaf_first(segments, lambda run: -saved_per_token(run)):
            costs, left = prices[segment.id]
            swaps = view.has_host and costs.swap_token_s < costs.discard_token_s
            pages = min(segment.num_pages, max(1, wanted_pages))
            reason = f"memory is wanted: next holder expected back in {left:.3g} s, " + (
                "copying costs less than recomputing" if swaps else "recomputing costs less than copying"
            )
            yield Take(segment, pages, Action.SWAP if swaps else Action.DISCARD, costs, left, reason)

    def copy_ahead(self, view: View) -> list[Segment]:
        segments, prices = self._priced(view)
        budget = min(view.profile.hidden_tokens(view.query_tokens), view.free_host_pages * view.page_size)
        chosen = []
        for segment in leaf_first(segments, lambda run: -prices[run.id][1]):  # longest absent first
            costs, _ = prices[segment.id]
            if segment.id < 0 or segment.on_host or segment.leaving or costs.swap_token_s >= costs.discard_token_s:
                continue
            if segment.num_tokens > budget:
                break
            budget -= segment.num_tokens
            chosen.append(segment)
        return chosen
