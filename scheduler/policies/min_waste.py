"""Ours: waste over a shared tree, paid only when memory is wanted, with durations conditional on elapsed time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from caesura.scheduler.context import Context
from caesura.scheduler.ledger import Segment
from caesura.scheduler.policies.base import PausePolicy, Take, View, leaf_first
from caesura.scheduler.types import Action, ActionCosts
from caesura.scheduler.waste import discard_contended_token_s, preserve_token_s, swap_exposed_token_s

PATIENCE_S = 1.0  # how long others that lack nothing may go ahead of one who waits for memory
COPY_AHEAD_S = 0.1  # of the link's time at once: a copy in has to wait for it


@dataclass(frozen=True, slots=True)
class _Price:
    """What it costs to take a part of a run, and when its first holder is expected back."""

    costs: ActionCosts
    hold_s: float
    swaps: bool  # copying is possible, and cheaper than recomputing

    @property
    def rate(self) -> float:
        """Waste of taking it for each token-second of memory that this gives."""
        loss = self.costs.swap_token_s if self.swaps else self.costs.discard_token_s
        return loss / max(1e-9, self.costs.preserve_token_s)


class MinWaste(PausePolicy):
    """Take the memory whose absence costs least for each token-second that it is free.

    For the last m tokens of a run v, with P(v) the paused contexts that hold it::

        T(v)   = min over P(v) of min over t of E[min(R, t)] / P(R <= t)     R: the rest of the pause
        W_keep = T(v) * m
        W_drop = T_fwd(m at its depth) * (tokens in memory)
        W_swap = T_swap(m) * (tokens of the holder) + T_swap(m) * m unless a host copy is there

    The run with the smallest min(W_drop, W_swap) / W_keep goes first, leaves before what they hang from.

    1. *Sharing*: a run with a running sharer is never a candidate (keeping it is free, dropping it frees nothing);
       else it is kept for the first of its paused holders to return, and recomputed once. So sharers protect a parent.
    2. *On demand*: nothing is given up while nobody wants the memory. While the link is idle, likely victims are
       copied to the host, so that taking their device pages later is free.
    3. *Conditional durations*: from each tool's history, the program's hint, the tool's reports. T is the price of
       holding for one return: a tool that usually answers at once is not judged by its rare long calls.
    4. *Queueing and starvation*: W_drop charges everybody who stays in memory longer, W_swap the one who waits. Service
       is by original arrival, so whoever comes later cannot hold one up; those who lack nothing go ahead of one who
       waits for memory for a second and no longer.
    5. *Partial states*: only the wanted part of a run is priced and taken, at its own depth, by what is cheaper for it.
    6. *Forks and parallel calls*: a pause ends with the last or the first of its calls, as the estimator says.

    Tried in simulation, and no better over mixed and long-context loads together: making newcomers wait while keeping
    is cheaper than taking; the order of return instead of arrival; write-through at every pause; the difference of
    the wastes instead of their ratio.
    """

    name = "min_waste"
    uses_host = True
    on_demand = True
    copies_ahead_below = 0.25

    def lets_pass(self, context: Context, now: float) -> bool:
        return now - context.requeued < PATIENCE_S

    def reclaim(self, view: View, wanted_pages: int) -> Iterator[Take]:
        segments = list(view.segments())
        pages = {segment.id: min(segment.num_pages, max(1, wanted_pages)) for segment in segments}
        prices = _prices(view, segments, pages)
        for segment in leaf_first(segments, lambda run: prices[run.id].rate):
            price = prices[segment.id]
            why = "copying costs less than recomputing" if price.swaps else "recomputing costs less than copying"
            reason = f"memory is wanted: next holder expected back in {price.hold_s:.3g} s, {why}"
            action = Action.SWAP if price.swaps else Action.DISCARD
            yield Take(segment, pages[segment.id], action, price.costs, price.hold_s, reason)

    def copy_ahead(self, view: View) -> list[tuple[Segment, int]]:
        segments = list(view.segments())
        token_s = max(1e-9, view.profile.swap_token_s)
        room = min(max(1, int(COPY_AHEAD_S / token_s) // view.page_size), view.free_host_pages)
        prices = _prices(view, segments, {segment.id: min(segment.num_pages, max(1, room)) for segment in segments})
        chosen = []
        for segment in leaf_first(segments, lambda run: -prices[run.id].hold_s):  # longest absent first
            if room <= 0:
                break
            if segment.id < 0 or segment.on_host or segment.leaving or not prices[segment.id].swaps:
                continue
            pages = min(segment.num_pages, room)
            room -= pages
            chosen.append((segment, pages))
        return chosen


def _prices(view: View, segments: list[Segment], pages: dict[int, int]) -> dict[int, _Price]:
    """Prices of the last ``pages`` of every segment."""
    hold = {paused.id: paused.hold_s for paused in view.paused}
    held = {paused.id: paused.held_tokens for paused in view.paused}
    used_tokens = (view.num_pages - view.free_pages) * view.page_size
    found = {}
    for segment in segments:
        tokens = min(segment.num_tokens, pages[segment.id] * view.page_size)
        start = segment.start + segment.num_tokens - tokens
        hold_s = min(hold[holder] for holder in segment.holders)
        waiting = max(held[holder] for holder in segment.holders)
        costs = ActionCosts(
            preserve_token_s=preserve_token_s(hold_s, tokens),
            swap_token_s=swap_exposed_token_s(view.profile, tokens, waiting, on_host=segment.on_host),
            discard_token_s=discard_contended_token_s(view.profile, start, tokens, used_tokens),
        )
        found[segment.id] = _Price(costs, hold_s, view.has_host and costs.swap_token_s < costs.discard_token_s)
    return found
