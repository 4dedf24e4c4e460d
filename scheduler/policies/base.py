"""The one interface of all pause policies, and what they are shown."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from caesura.scheduler.context import Context, ContextTable
from caesura.scheduler.estimate import Estimator, make_estimator
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
    hold_s: float  # what holding costs per return, by the estimator
    program: ContextId  # the context it was forked from, or itself


@dataclass(frozen=True, slots=True)
class View:
    """Everything a decision may depend on. What costs time to find out is asked for, and asked once."""

    now: float
    show_paused: Callable[[], tuple[PausedContext, ...]]  # in order of arrival
    hold_s: Callable[[ContextId], float]  # of a paused context, see PausedContext
    held_tokens: Callable[[ContextId], int]  # of any context, on the device
    segments: Callable[[], Sequence[Segment]]  # runs held by paused contexts alone
    profile: CostProfile
    batch_tokens: int  # KV tokens of running contexts (C_other)
    running_rows: int  # of the coming iteration: what running contexts want, as far as a step goes
    query_tokens: int  # all of them (B): with those of queued contexts for which there is room
    free_pages: int
    num_pages: int
    page_size: int
    copying_pages: int
    free_host_pages: int  # free, or holding what is on the device as well
    has_host: bool
    batch_pages: int  # what is copied ahead at once

    @property
    def paused(self) -> tuple[PausedContext, ...]:
        """The paused contexts in order of arrival: all, or in a review those to be looked at."""
        return self.show_paused()

    def costs(self, context: PausedContext) -> ActionCosts:
        """Waste of the three actions for the part of ``context`` that nobody else holds."""
        start = context.held_tokens - context.exclusive_tokens
        return action_costs(self.profile, context.remaining_s, start, context.exclusive_tokens, self.batch_tokens)


@dataclass(frozen=True, slots=True)
class Room:
    """What admission may depend on. Counters are of the moment; callables ask the ledger."""

    now: float
    step: int  # number of the step being planned
    contexts: ContextTable
    free_tokens: int  # free, or held by nobody
    capacity_tokens: int
    held_tokens: Callable[[ContextId], int]  # on the device
    host_tokens: Callable[[ContextId], int]  # would come back by a copy
    profile: CostProfile


@dataclass(frozen=True, slots=True)
class Choice:
    """An action on one paused context, with its price and the sentence that explains it.

    ``num_tokens`` swaps only that much, from the end; the rest stays and is looked at again.
    """

    context: ContextId
    action: Action
    costs: ActionCosts
    reason: str
    num_tokens: int | None = None


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
    estimator_name: ClassVar[str] = "progress"  # when none is asked for
    uses_host: ClassVar[bool] = False
    on_demand: ClassVar[bool] = False
    review_every_s: ClassVar[float | None] = None  # contexts it keeps are reviewed again so often; None: not at all
    releases_idle: ClassVar[bool] = False  # lets go of the KV at every end of a generation, tool or not
    copies_ahead_below: ClassVar[float] = 0.0  # free share of the pool below which `copy_ahead` is asked
    writes_through: ClassVar[bool] = False  # copies to the host what a pause leaves behind
    waits_for_copies: ClassVar[bool] = False  # no step begins before the copies of the last one have ended

    def __init__(self, estimator: Estimator | None = None) -> None:
        self.estimator: Estimator = estimator or make_estimator(self.estimator_name)

    # -- what happens to contexts: for policies that learn or keep books ---------------------------------------

    def saw_queued(self, context: Context, now: float) -> None:
        """A context asks for service; ``context.num_tokens`` are to be there before it can go on."""

    def saw_running(self, context: Context, now: float) -> None:
        """It is admitted; ``context.cached_tokens`` were found."""

    def saw_paused(self, context: Context, now: float) -> None:
        """It rests, on tools or (no calls) on the program itself; tools may follow at the same moment."""

    def saw_closed(self, context: Context) -> None:
        """It is gone."""

    # -- who is served ----------------------------------------------------------------------------------------

    def order_key(self, context: Context) -> tuple[float, ...]:
        """Sorts the queue; original arrival by default, so a resumed context keeps its place."""
        return (context.arrival, context.id)

    def admit(self, queued: Sequence[Context], room: Room) -> Sequence[Context]:
        """Queued contexts in the order in which they may be admitted now; those left out wait.

        Not binding when nothing runs: then the first of the queue is served, whatever a policy thinks of it.
        """
        return queued

    def lets_pass(self, context: Context, now: float) -> bool:
        """May queued contexts that lack nothing go ahead of this one while it waits for memory, and keep theirs?"""
        return False

    def step_tokens(self, limit: int, room: Room) -> int:
        """Query tokens the coming step may have, ``limit`` at most."""
        return limit

    # -- what becomes of memory -------------------------------------------------------------------------------

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

    def copy_ahead(self, view: View) -> list[tuple[Segment, int]]:
        """Segments to write to the host ahead of need, and how many pages of their ends, ``batch_pages`` at most.

        They are copied in batches, the next one when the link is idle; asked again when all have been.
        """
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
