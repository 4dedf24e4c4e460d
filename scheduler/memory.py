"""Where memory comes from: what the policy gives up, what a queued context holds, whom to preempt."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import replace

from caesura.scheduler.context import Context, ContextTable
from caesura.scheduler.ledger import Ledger, Segment
from caesura.scheduler.policies.base import Choice, PausedContext, PausePolicy, Room, Take, View, leaf_first
from caesura.scheduler.profile import CostProfile
from caesura.scheduler.types import Action, ActionCosts, ContextId, PauseDecision, Phase

FAIR_PART = 8  # of host memory is free: else what is copied is priced as if it went to the disk
COPY_AHEAD_EVERY = 8  # steps after which paused contexts that were not worth a copy are looked at again
COPY_AHEAD_S = 0.1  # of the link's time at once: a copy in has to wait for it
AHEAD_SHARE = 64  # of the device pool: at most so much is taken beyond what is wanted


class MemoryDesk:
    """Carries out the policy's decisions on the ledger and writes each down. One instance, begun anew per step."""

    def __init__(
        self,
        ledger: Ledger,
        policy: PausePolicy,
        profile: CostProfile,
        contexts: ContextTable,
        max_step_tokens: int,
    ) -> None:
        self._ledger = ledger
        self._max_step_tokens = max_step_tokens
        self._policy = policy
        self._profile = profile
        self._contexts = contexts
        self._reviews = type(policy).review is not PausePolicy.review
        self.paused = 0  # pauses begun so far
        self._ahead: deque[tuple[int, int]] = deque()  # segments to copy ahead, and how many pages of each
        self._review_at = 0.0  # when kept contexts are looked at again
        self._fruitless = (-1, 0)  # `paused` when there was last nothing to copy ahead, and steps since
        self.begin(0.0)

    def begin(self, now: float) -> None:
        """Start a step."""
        self.now = now
        self.decisions: list[PauseDecision] = []
        self.preempted: list[ContextId] = []
        self.contended = False  # someone wants memory and has to wait for it
        self._ranked: Iterator[Take] | None = None  # what paused contexts hold, for all who ask in this step
        self._left: Take | None = None  # of the last one taken

    # -- what the policy decides ------------------------------------------------------------------------------

    def review(self) -> None:
        """Let the policy look at the paused contexts it may want to act on now."""
        if not self._reviews:
            return
        paused = self._contexts.in_phase(Phase.PAUSED)
        every_s = self._policy.review_every_s
        again = every_s is not None and self.now >= self._review_at
        if again and every_s is not None:
            self._review_at = self.now + every_s
        open_cases = (None, Action.PRESERVE) if again else (None,)
        waiting = [state for state in paused if state.decided in open_cases]
        if not waiting:
            return
        for choice in self._policy.review(self._view(waiting)):
            self._carry_out(choice)

    def _carry_out(self, choice: Choice) -> None:
        state = self._contexts[choice.context]
        first_time = state.decided is not choice.action
        held = self._ledger.exclusive_tokens(choice.context)
        partly = choice.num_tokens is not None and choice.num_tokens < held
        action = choice.action
        if action is Action.DISCARD:
            self._ledger.discard(choice.context)
        elif action is Action.RELEASE:
            self._ledger.release(choice.context)
        elif action is Action.SWAP:
            action = self._swap(choice.context, choice.num_tokens if partly else None)
        state.decided = Action.PRESERVE if partly else action
        held = held if choice.num_tokens is None else min(held, choice.num_tokens)
        if first_time and (state.pause.calls or action is not Action.RELEASE):
            self._write_down(choice.context, action, choice.costs, choice.reason, held)

    def _swap(self, context: ContextId, num_tokens: int | None) -> Action:
        """Copy out and drop ``num_tokens`` of what only this context holds, from the end.

        None: all of that, and what it shares with contexts that are swapped out already, since the last one takes it
        along. What the host has no room for is discarded.
        """
        alone = {context}
        if num_tokens is None:
            alone.update(state.id for state in self._contexts.in_phase(Phase.PAUSED) if state.decided is Action.SWAP)
        runs = self._ledger.segments()
        mine = [segment for segment in runs if context in segment.holders and alone.issuperset(segment.holders)]
        left = 1 << 60 if num_tokens is None else -(-num_tokens // self._ledger.page_size)
        done = Action.SWAP
        for segment in leaf_first(mine, lambda run: -run.start):
            if left <= 0:
                break
            pages = min(segment.num_pages, left) if segment.id >= 0 else segment.num_pages
            left -= pages if not segment.leaving else 0
            reclaimed = self._ledger.reclaim(segment.id, pages, Action.SWAP)
            if segment.id >= 0 and reclaimed.action is Action.DISCARD:
                done = Action.DISCARD
        return done

    def copy_ahead(self) -> None:
        """Write likely victims to the host while the link is idle, and what nobody wants there to the disk."""
        ledger = self._ledger
        ledger.sink()
        free = ledger.free_pages + ledger.evictable_pages
        if free >= self._policy.copies_ahead_below * ledger.num_device_pages:
            return
        if not self._room_below or ledger.copying_pages:
            return
        if self._begin_batch():
            return
        paused, steps = self._fruitless
        if paused == self.paused and steps < COPY_AHEAD_EVERY:  # the same contexts: look again later
            self._fruitless = paused, steps + 1
            return
        chosen = self._policy.copy_ahead(self._view())
        self._ahead.extend((segment.id, num_pages) for segment, num_pages in chosen)
        self._begin_batch()
        self._fruitless = (-1, 0) if chosen else (self.paused, 0)

    @property
    def _batch_pages(self) -> int:
        """Pages that take the link ``COPY_AHEAD_S``."""
        return max(1, int(COPY_AHEAD_S / max(1e-9, self._profile.swap_token_s)) // self._ledger.page_size)

    def _begin_batch(self) -> bool:
        """Copy the next of what the policy has listed. What has gone or is copied by now is passed over."""
        left = self._batch_pages * self._ledger.page_size
        before = left
        while self._ahead and left > 0:
            left -= self._ledger.copy_out(*self._ahead.popleft())
        return left < before

    # -- where pages come from --------------------------------------------------------------------------------

    def secure(self, context: ContextId, num_tokens: int) -> bool:
        """Make room for a queued context; False: not now (no room, or the copies that make it are in flight)."""
        lacking = self._ledger.shortfall(context, num_tokens)
        if lacking:
            busy = bool(self._contexts.in_phase(Phase.RUNNING))
            must = not (busy or self._ledger.copying_pages)
            if self._policy.on_demand or must:
                lacking -= self._reclaim(lacking)
            if lacking > 0 and (must or not self._policy.lets_pass(self._contexts[context], self.now)):
                lacking -= self._reclaim_queued(context, lacking, must=must)
        secured = lacking <= 0 and self._ledger.lacking_now(context, num_tokens) <= 0
        self.contended = self.contended or not secured
        return secured

    def is_coming(self, context: ContextId, num_tokens: int) -> bool:
        """For a running context: enough is on its way out, so that waiting for the copies is all there is to do."""
        coming = not self._ledger.shortfall(context, num_tokens)
        self.contended = self.contended or coming
        return coming

    def make_room(self, context: ContextId, num_tokens: int, *, before_preempting: bool) -> bool:
        """For a running context: did anything become free (or begin to leave)?"""
        lacking = self._ledger.shortfall(context, num_tokens)
        if self._policy.on_demand or not before_preempting:
            taken = self._reclaim(lacking)
            if taken:
                return True
        return self._reclaim_queued(context, lacking + self._soon * self._policy.on_demand) > 0

    def preempt(self, state: Context) -> None:
        """Back to the queue. What it holds stays, revocably, so memory is taken only as far as it is needed."""
        self.contended = True
        self._contexts.become(state, Phase.QUEUED)
        if self._ledger.computed(state.id) >= state.num_tokens - 1:  # else it has waited in vain until now
            state.waiting_since = self.now
        self._ledger.pause(state.id)
        self.preempted.append(state.id)

    def _reclaim(self, wanted: int) -> int:
        """Take pages from paused contexts as the policy orders; returns pages freed or on their way.

        Ranking all of them for a page at every step would take longer than the pages are worth: what is taken
        lasts each running context for a page. Nor does everybody who asks in a step have them ranked anew.
        """
        got = 0
        if self._policy.on_demand:
            wanted += self._soon
        if self._ranked is None:
            self._ranked = iter(self._policy.reclaim(self._view(wanted=wanted), wanted))
        while got < wanted and (take := self._left or next(self._ranked, None)) is not None:
            self._left = None
            got += self._take(take, wanted - got)
        return got

    @property
    def _soon(self) -> int:
        """Pages that running contexts will want next, one each."""
        running = len(self._contexts.in_phase(Phase.RUNNING))
        return min(running, self._ledger.num_device_pages // AHEAD_SHARE)

    def _take(self, take: Take, wanted: int) -> int:
        pages = min(take.num_pages, wanted) if take.segment.id >= 0 else take.num_pages
        done = self._ledger.reclaim(take.segment.id, pages, take.action)
        got = done.freed + done.pending
        if got and take.segment.id >= 0:
            rest = take.segment.num_pages - pages
            if rest and done.rest is not None:
                segment = take.segment._replace(id=done.rest, num_pages=rest, num_tokens=rest * self._ledger.page_size)
                self._left = replace(take, segment=segment, num_pages=rest)
            goes_on = self._policy.review_every_s is not None and (rest > 0 or take.segment.parent is not None)
            for holder in take.segment.holders:
                state = self._contexts[holder]
                if state.decided is not done.action:
                    state.decided = Action.PRESERVE if goes_on else done.action  # to be reviewed: it holds more
                    tokens = min(take.segment.num_tokens, pages * self._ledger.page_size)
                    self._write_down(holder, done.action, take.costs, take.reason, tokens, take.remaining_s)
        return got

    def _reclaim_queued(self, context: ContextId, wanted: int, *, must: bool = False) -> int:
        """Take from contexts that queue behind ``context`` (preempted ones among them), the last one first.

        ``must``: from those ahead of it as well, which the policy holds back.
        """
        key = self._policy.order_key
        mine = key(self._contexts[context])
        behind = {
            state.id: key(state)
            for state in self._contexts.in_phase(Phase.QUEUED)
            if state.id != context and (must or key(state) > mine) and self._ledger.held_tokens(state.id)
        }
        if not behind:  # as a rule, and this is asked at every step while the first of the queue waits
            return 0
        action = Action.SWAP if self._policy.uses_host and self._has_below else Action.DISCARD
        segments = [s for s in self._ledger.segments() if any(holder in behind for holder in s.holders)]
        segments = [s for s in segments if all(h in behind or self._is_paused(h) for h in s.holders)]
        got = 0
        for segment in leaf_first(segments, lambda run: -min(behind.get(h, mine)[0] for h in run.holders)):
            if got >= wanted:
                break
            done = self._ledger.reclaim(segment.id, min(segment.num_pages, wanted - got), action)
            got += done.freed + done.pending
        return got

    def _is_paused(self, context: ContextId) -> bool:
        return self._contexts[context].phase is Phase.PAUSED

    # -- what the policy sees ---------------------------------------------------------------------------------

    def room(self, step: int) -> Room:
        """What a policy may look at to admit queued contexts."""
        ledger, contexts = self._ledger, self._contexts

        def host_tokens(context: ContextId) -> int:
            state = contexts[context]
            return ledger.host_tokens(context, state.tokens, state.reuse_limit)

        return Room(
            now=self.now,
            step=step,
            contexts=contexts,
            free_tokens=(ledger.free_pages + ledger.evictable_pages) * ledger.page_size,
            capacity_tokens=ledger.num_device_pages * ledger.page_size,
            held_tokens=ledger.held_tokens,
            host_tokens=host_tokens,
            profile=self._profile,
        )

    @property
    def _has_below(self) -> bool:
        return self._ledger.num_host_pages > 0 or self._ledger.disk_writable

    @property
    def _room_in_host(self) -> int:
        return self._ledger.free_host_pages + self._ledger.spare_host_pages

    @property
    def _room_below(self) -> int:
        """Pages below the device that are free or may be taken."""
        ledger = self._ledger
        return self._room_in_host + (ledger.free_disk_pages + ledger.spare_disk_pages) * ledger.disk_writable

    def _view(self, states: list[Context] | None = None, *, wanted: int | None = None) -> View:
        """``wanted`` pages (None: a fair part) that host memory has no room for would go to the disk, at its price."""
        ledger = self._ledger
        if wanted is None:
            wanted = max(1, ledger.num_host_pages // FAIR_PART)
        to_disk = ledger.disk_writable and self._room_in_host < wanted
        paused = self._contexts.in_phase(Phase.PAUSED)
        running, queued = (self._contexts.in_phase(phase) for phase in (Phase.RUNNING, Phase.QUEUED))
        free = ledger.free_pages + ledger.evictable_pages
        ids = {state.id for state in paused}
        shown = paused if states is None else states
        return View(
            now=self.now,
            show_paused=lambda: tuple(self._show(state) for state in sorted(shown, key=_arrival)),
            hold_s=lambda context: self._policy.estimator.hold_s(self._contexts[context].pause, self.now),
            held_tokens=ledger.held_tokens,
            segments=lambda: _closed_downwards(ledger.segments(), ids),
            profile=self._profile.at_disk_rate() if to_disk else self._profile,
            batch_tokens=sum(ledger.computed(state.id) for state in running),
            running_rows=(rows := self._rows(running, self._max_step_tokens)),
            query_tokens=rows + self._rows(queued, min(self._max_step_tokens - rows, free * ledger.page_size)),
            free_pages=free,
            num_pages=ledger.num_device_pages,
            page_size=ledger.page_size,
            copying_pages=ledger.copying_pages,
            free_host_pages=self._room_below if to_disk else self._room_in_host,
            has_host=self._has_below,
            batch_pages=self._batch_pages,
        )

    def _rows(self, states: Collection[Context], limit: int) -> int:
        """Rows that these contexts want of the coming step, ``limit`` at most."""
        rows = 0
        for state in states:
            if rows >= limit:
                break
            rows += max(1, state.num_tokens - self._ledger.computed(state.id))
        return min(rows, limit)

    def _show(self, state: Context) -> PausedContext:
        return PausedContext(
            id=state.id,
            arrival=state.arrival,
            tool=state.pause.tool,
            since=state.pause.since,
            elapsed_s=max(0.0, self.now - state.pause.since),
            remaining_s=self._policy.estimator.remaining_s(state.pause, self.now),
            held_tokens=self._ledger.held_tokens(state.id),
            exclusive_tokens=self._ledger.exclusive_tokens(state.id),
            decided=state.decided,
            hold_s=self._policy.estimator.hold_s(state.pause, self.now),
            program=state.program,
        )

    def _write_down(
        self,
        context: ContextId,
        action: Action,
        costs: ActionCosts,
        reason: str,
        tokens: int,
        remaining_s: float | None = None,
    ) -> None:
        state = self._contexts[context]
        running = self._contexts.in_phase(Phase.RUNNING)
        if remaining_s is None:
            remaining_s = self._policy.estimator.remaining_s(state.pause, self.now)
        self.decisions.append(
            PauseDecision(
                context_id=context,
                now=self.now,
                policy=self._policy.name,
                action=action,
                tool=state.pause.tool,
                reason=reason,
                costs=costs,
                context_tokens=state.num_tokens,
                affected_tokens=tokens,
                elapsed_s=max(0.0, self.now - state.pause.since),
                expected_remaining_s=remaining_s,
                batch_tokens=sum(self._ledger.computed(other.id) for other in running),
                free_pages=self._ledger.free_pages,
            )
        )


def _arrival(state: Context) -> tuple[float, ContextId]:
    return (state.arrival, state.id)


def _closed_downwards(segments: list[Segment], ids: set[ContextId]) -> list[Segment]:
    """Segments held by these contexts alone: a run above somebody else's is never among them."""
    return [segment for segment in segments if ids.issuperset(segment.holders)]
