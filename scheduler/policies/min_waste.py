"""Ours: waste over a shared tree, paid only when memory is wanted, with durations conditional on elapsed time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from caesura.scheduler.context import Context
from caesura.scheduler.estimate import Estimator
from caesura.scheduler.ledger import Segment
from caesura.scheduler.policies.base import PausePolicy, Room, Take, View, leaf_first
from caesura.scheduler.types import Action, ActionCosts, ContextId
from caesura.scheduler.waste import discard_contended_token_s, preserve_token_s, swap_exposed_token_s

PATIENCE_S = 1.0  # how long others that lack nothing may go ahead of one who waits for memory
STARVING_S = 30.0  # in the queue, after which one context goes before all others
AHEAD_S = 1e9  # earlier than any arrival
LISTED_BATCHES = 4  # of copies ahead, so that ranking is not done for each


class MinWaste(PausePolicy):
    """Take the memory whose absence costs least for each token-second that it is free.

    For the last m tokens of a run v, with P(v) the paused contexts that hold it::

        T(v)   = min over P(v) of min over t of E[min(R, t)] / P(R <= t)     R: the rest of the pause
        W_keep = T(v) * m
        W_drop = T_fwd(m at its depth) * (tokens in memory)
        W_swap = T_swap(m) * (tokens of the holder) + T_swap(m) * m unless a host copy is there

    The run with the smallest min(W_drop, W_swap) / W_keep goes first, leaves before what they hang from. Where
    a copy has no place there is W_drop alone.

    1. *Sharing*: a run with a running sharer is never a candidate (keeping it is free, dropping it frees nothing);
       else it is kept for the first of its paused holders to return, and recomputed once. So sharers protect a parent.
    2. *On demand*: nothing is given up while nobody wants the memory. While the link is idle, likely victims are
       copied to the host, once in a pause, so that taking their device pages later is free.
    3. *Conditional durations*: from each tool's history, the program's hint, the tool's reports. T is the price of
       holding for one return: a tool that usually answers at once is not judged by its rare long calls.
    4. *Queueing and starvation*: W_drop charges everybody who stays in memory longer, W_swap the one who waits. Service
       is by original arrival, so whoever comes later cannot hold one up; those who lack nothing go ahead of one who
       waits for memory for a second and no longer. Programs that are never done would keep newcomers out for ever:
       who has queued for longest, and for half a minute, goes before everybody until its next pause.
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

    def __init__(self, estimator: Estimator | None = None) -> None:
        super().__init__(estimator)
        self._copied: dict[ContextId, int] = {}  # from where on it was copied ahead in the present pause
        self._starved: ContextId | None = None  # one at a time: more would take each other's memory

    def saw_paused(self, context: Context, now: float) -> None:
        self.saw_closed(context)

    def saw_closed(self, context: Context) -> None:
        self._copied.pop(context.id, None)
        if self._starved == context.id:
            self._starved = None

    def order_key(self, context: Context) -> tuple[float, ...]:
        return (context.arrival - AHEAD_S * (context.id == self._starved), context.id)

    def admit(self, queued: Sequence[Context], room: Room) -> Sequence[Context]:
        if self._starved is None:
            longest = min(queued, key=lambda context: context.waiting_since)
            if room.now - longest.waiting_since > STARVING_S:
                self._starved = longest.id
                return sorted(queued, key=self.order_key)
        return queued

    def lets_pass(self, context: Context, now: float) -> bool:
        return now - context.waiting_since < PATIENCE_S

    def reclaim(self, view: View, wanted_pages: int) -> Iterator[Take]:
        segments = list(view.segments())
        prices = _Prices(view, segments, max(1, wanted_pages))
        for segment in leaf_first(segments, prices.rate_on_the_way):
            costs, hold_s = prices.costs(segment), prices.hold_s(segment)
            swaps = prices.can_copy(segment) and costs.swap_token_s < costs.discard_token_s
            why = "copying costs less than recomputing" if swaps else "recomputing costs less than copying"
            reason = f"memory is wanted: next holder expected back in {hold_s:.3g} s, {why}"
            pages = min(segment.num_pages, prices.pages)
            yield Take(segment, pages, Action.SWAP if swaps else Action.DISCARD, costs, hold_s, reason)

    def copy_ahead(self, view: View) -> list[tuple[Segment, int]]:
        room = min(LISTED_BATCHES * view.batch_pages, view.free_host_pages)
        segments = list(view.segments())
        prices = _Prices(view, segments, view.batch_pages)
        chosen = []
        for segment in leaf_first(segments, lambda run: -prices.hold_s(run)):  # longest absent first
            if room <= 0:
                break
            if segment.id < 0 or segment.on_host or segment.leaving:
                continue
            end = segment.start + segment.num_tokens
            if all(end > self._copied.get(holder, end) for holder in segment.holders):
                continue  # its copy was given up for another one: both again and again would keep the link busy
            costs = prices.costs(segment)
            if costs.swap_token_s < costs.discard_token_s:
                pages = min(segment.num_pages, view.batch_pages, room)
                room -= pages
                chosen.append((segment, pages))
                begin = end - pages * view.page_size
                for holder in segment.holders:
                    self._copied[holder] = min(begin, self._copied.get(holder, begin))
        return chosen


class _Prices:
    """What it costs to take up to ``pages`` from the end of a segment. Asked of hundreds in a step, so kept lean."""

    def __init__(self, view: View, segments: list[Segment], pages: int) -> None:
        self.pages = pages
        self._view = view
        self._used_tokens = (view.num_pages - view.free_pages) * view.page_size
        holders = {holder for segment in segments for holder in segment.holders}
        self._hold_s = {holder: view.hold_s(holder) for holder in holders}
        self._held_tokens = {holder: view.held_tokens(holder) for holder in holders}
        self._runs = {segment.id: segment for segment in segments}

    def hold_s(self, segment: Segment) -> float:
        """T(v): of the first of its holders to return."""
        holders = segment.holders
        if len(holders) == 1:
            return self._hold_s[holders[0]]
        return min(map(self._hold_s.__getitem__, holders))

    def can_copy(self, segment: Segment) -> bool:
        """There is a host with room for it, or with a copy already."""
        view = self._view
        return view.has_host and (segment.on_host or view.free_host_pages >= min(segment.num_pages, self.pages))

    def _losses(self, segment: Segment) -> tuple[int, float, float]:
        """m, W_swap and W_drop."""
        tokens = min(segment.num_tokens, self.pages * self._view.page_size)
        waiting = max(map(self._held_tokens.__getitem__, segment.holders))
        profile, start = self._view.profile, segment.start + segment.num_tokens - tokens
        swap = swap_exposed_token_s(profile, tokens, waiting, on_host=segment.on_host)
        return tokens, swap, discard_contended_token_s(profile, start, tokens, self._used_tokens)

    def rate(self, segment: Segment) -> float:
        """Waste of taking it for each token-second of memory that this gives."""
        tokens, swap, drop = self._losses(segment)
        loss = min(swap, drop) if self.can_copy(segment) else drop
        return loss / max(1e-9, self.hold_s(segment) * tokens)

    def rate_on_the_way(self, segment: Segment) -> float:
        """The same, but an unfinished page counts as the run that only comes free after it: few tokens are dear for
        the memory they give, and how few they are says nothing about who is to be taken."""
        run = self._runs.get(segment.parent) if segment.id < 0 and segment.parent is not None else None
        return self.rate(segment if run is None else run)

    def costs(self, segment: Segment) -> ActionCosts:
        """All three wastes."""
        tokens, swap, drop = self._losses(segment)
        return ActionCosts(preserve_token_s(self.hold_s(segment), tokens), swap, drop)
