"""The one interface of all pause policies, and what they are shown."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from caesura.scheduler.context import Context
from caesura.scheduler.estimate import Conditional, Estimator
from caesura.scheduler.ledger import Segment
from caesura.scheduler.profile import CostProfile
from caesura.scheduler.types import Action, ActionCosts, ContextId
from caesura.scheduler.waste import action_costs


@dataclass(frozen=True, slots=True)
class PausedContext:
    """A paused context as a policy sees it."""

    id: ContextId
    arrival: float
    tool: str  # "" while the program itself is thinking
    since: float
    elapsed_s: float
    remaining_s: float
    held_tokens: int
    exclusive_tokens: int  # what would be freed: the part no other context holds
    decided: Action | None


@dataclass(frozen=True, slots=True)
class View:
    """Everything a decision may depend on. Built per step, on demand; tuples in order of arrival."""

    now: float
    paused: tuple[PausedContext, ...]
    segments: Callable[[], Sequence[Segment]]  # runs held by paused contexts alone
    profile: CostProfile
    batch_tokens: int  # KV tokens of running contexts (C_other)
    query_tokens: int  # rows of the coming iteration (B)
    free_pages: int
    num_pages: int
    page_size: int
    copying_pages: int
    free_host_pages: int
    has_host: bool

    def costs(self, context: PausedContext) -> ActionCosts:
        """Waste of the three actions for the part of ``context`` that nobody else holds."""
        start = context.held_tokens - context.exclusive_tokens
        return action_costs(self.profile, context.remaining_s, start, context.exclusive_tokens, self.batch_tokens)


@dataclass(frozen=True, slots=True)
class Choice:
    """An action on one paused context, with its price and the sentence that explains it."""

    context: ContextId
    action: Action
    costs: ActionCosts
    reason: str


@dataclass(frozen=True, slots=True)
class Take:
    """Take the last ``num_pages`` of a segment. ``remaining_s`` is when its next holder is expected back."""

    segment: Segment
    num_pages: int
    action: Action
    costs: ActionCosts
    remaining_s: float
    reason: str


class PausePolicy:
    """Defaults: hold everything, and give way from the latest arrival backwards when nothing else is left.

    ``on_demand``: paused contexts give way before a running one is preempted or a queued one has to wait.
    """

    name: ClassVar[str]
    uses_host: ClassVar[bool] = False
    on_demand: ClassVar[bool] = False
    releases_idle: ClassVar[bool] = False  # lets go of the KV at every end of a generation, tool or not
    copies_ahead_below: ClassVar[float] = 0.0  # free share of the pool below which `copy_ahead` is asked
    writes_through: ClassVar[bool] = False  # copies to the host what a pause leaves behind

    def __init__(self) -> None:
        self.estimator: Estimator = Conditional()

    def order_key(self, context: Context) -> tuple[float, int]:
        """Sorts the queue; original arrival by default, so a resumed context keeps its place."""
        return (context.arrival, context.id)

    def review(self, view: View) -> list[Choice]:
        """Called each step with the contexts paused on a tool: what is to be done with them now."""
        return []

    def reclaim(self, view: View, wanted_pages: int) -> Iterator[Take]:
        """Segments to take, best first, until the caller has enough. Leaves come before their parents."""
        action = Action.SWAP if self.uses_host and view.has_host else Action.DISCARD
        arrival = {context.id: context.arrival for context in view.paused}
        remaining = {context.id: context.remaining_s for context in view.paused}
        for segment in leaf_first(view.segments(), lambda run: -min(arrival[holder] for holder in run.holders)):
            left = min(remaining[holder] for holder in segment.holders)
            costs = segment_costs(view, segment, left)
            pages = min(segment.num_pages, max(1, wanted_pages))
            yield Take(segment, pages, action, costs, left, "memory is wanted; latest arrival gives way first")

    def copy_ahead(self, view: View) -> list[Segment]:
        """Segments to write to the host ahead of need while the link is idle."""
        return []


def segment_costs(view: View, segment: Segment, remaining_s: float) -> ActionCosts:
    """Waste of keeping, swapping or dropping one run."""
    return action_costs(
        view.profile, remaining_s, segment.start, segment.num_tokens, view.batch_tokens, on_host=segment.on_host
    )


def leaf_first(segments: Sequence[Segment], key: Callable[[Segment], float]) -> Iterator[Segment]:
    """Smallest ``key`` first among the segments that no other one hangs from; a parent follows its last child."""
    by_id = {segment.id: segment for segment in segments}
    below = dict.fromkeys(by_id, 0)
    for segment in segments:
        if segment.parent in below:
            below[segment.parent] += 1
    ready = [(key(segment), segment.id) for segment in segments if not below[segment.id]]
    heapq.heapify(ready)
    while ready:
        segment = by_id[heapq.heappop(ready)[1]]
        yield segment
        parent = by_id.get(segment.parent) if segment.parent is not None else None
        if parent is not None:
            below[parent.id] -= 1
            if not below[parent.id]:
                heapq.heappush(ready, (key(parent), parent.id))
