"""References of sessions on the radix tree: SGLang's session radix cache."""

from __future__ import annotations

from collections.abc import Iterator

from caesura.scheduler.context import Context
from caesura.scheduler.policies.base import PausePolicy, Take, View, leaf_first, segment_costs
from caesura.scheduler.types import Action


class SessionRefs(PausePolicy):
    """LRU in two classes: what no open session refers to goes first, then what one does, each by last use.

    A context is a session: what it has computed stays referenced until it is closed. Requests queue in order of
    arrival, a resumed one at the back, as in ``lru_host``, whose write-through host tier this has as well. Known from
    the pull requests alone (SGLang 29173 and its neighbours): how ties and splits are ordered is our choice.
    """

    name = "session_refs"
    uses_host = True
    on_demand = True
    writes_through = True

    def order_key(self, context: Context) -> tuple[float, ...]:
        return (context.submitted, context.id)

    def reclaim(self, view: View, wanted_pages: int) -> Iterator[Take]:
        used = {paused.id: paused.since for paused in view.paused}
        remaining = {paused.id: paused.remaining_s for paused in view.paused}
        action = Action.SWAP if view.has_host else Action.DISCARD
        for segment in leaf_first(view.segments(), lambda run: max(used[holder] for holder in run.holders)):
            left = min(remaining[holder] for holder in segment.holders)
            pages = min(segment.num_pages, max(1, wanted_pages))
            costs = segment_costs(view, segment, left)
            yield Take(segment, pages, action, costs, left, "memory is wanted; least recently used goes first")
