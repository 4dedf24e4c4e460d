"""Plan and commit. What runs in this step, and what becomes of paused contexts' KV.

``plan(now)`` moves pages through the ledger's verbs as it goes and returns a frozen record for the executor;
``commit(plan, result)`` takes in what came of it. No I/O, clock, random number, torch or thread.

A step may be committed while it is still under way: then its tokens are placeholders, which the next plan reckons
with and ``settle`` replaces before the next commit. So everything is known one step late, but never guessed.

Order: running, then queued; each by the policy's key (original arrival unless it says otherwise). Liveness: the
first context in order can always take what it needs, since everything but running contexts ahead of it is revocable.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from caesura.scheduler.context import Call, Context, ContextTable, Pause, Progress
from caesura.scheduler.ledger import Ledger
from caesura.scheduler.memory import MemoryDesk
from caesura.scheduler.meter import WasteMeter
from caesura.scheduler.policies.base import PausePolicy
from caesura.scheduler.profile import CostProfile
from caesura.scheduler.types import TOKEN_TO_COME, ContextId, Phase, Slice, StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one step: query tokens, and contexts running at once."""

    max_step_tokens: int = 512
    max_running: int = 64


class Scheduler:
    """Owns the contexts. The ledger owns where their KV lies; the policy owns what a pause means for it."""

    def __init__(self, ledger: Ledger, policy: PausePolicy, profile: CostProfile, config: SchedulerConfig) -> None:
        self.ledger = ledger
        self.policy = policy
        self.profile = profile
        self.config = config
        self.contexts = ContextTable()
        self.meter = WasteMeter(ledger.page_size)
        self._memory = MemoryDesk(ledger, policy, profile, self.contexts, config.max_step_tokens)
        self.on_resumed: Callable[[Pause, float], None] = lambda *_: None  # hears how long a pause has lasted (s)
        self._loading: set[ContextId] = set()  # queued ones for which copies in were begun
        self._number = 0

    # -- what callers ask -------------------------------------------------------------------------------------

    def open(self, context: ContextId, namespace: str, now: float, deadline_at: float | None = None) -> None:
        """A new context, empty and idle."""
        self.ledger.open(context, namespace)
        self.contexts.add(Context(context, now, pause=Pause(now), deadline_at=deadline_at, namespace=namespace))

    def append(self, context: ContextId, tokens: Sequence[int]) -> None:
        """Tokens to catch up with; nothing is computed before a ``submit``."""
        self.contexts[context].tokens.extend(tokens)

    def submit(self, context: ContextId, now: float, *, samples: bool, recompute_from: int | None = None) -> None:
        """Queue a context: compute what is missing and, if ``samples``, go on generating."""
        state = self.contexts[context]
        self.resume(context, now)
        state.samples, state.recompute_from = samples, recompute_from
        state.submitted = state.waiting_since = now
        self.ledger.truncate(context, state.reuse_limit)  # also what lies on the host now: another may bring it back
        self.contexts.become(state, Phase.QUEUED)
        state.cached_tokens = -1
        self.policy.saw_queued(state, now)

    def pause(
        self,
        context: ContextId,
        now: float,
        calls: Sequence[Call],
        *,
        wait_any: bool = False,
        deadline_at: float | None = None,
        lives_until: float | None = None,
    ) -> None:
        """An idle context waits for tools from now on. Said again of the same tools (now with a hint or a deadline),
        it is the same pause. ``deadline_at`` is the pause's; ``lives_until`` replaces the context's own."""
        state = self.contexts[context]
        if lives_until is not None:
            state.deadline_at = lives_until  # noted with the pause's, below
        if state.phase is not Phase.PAUSED:
            self.stop(context, now)
        tools = [call.tool for call in calls]
        known = bool(tools) and tools == [call.tool for call in state.pause.calls]
        since, decided = (state.pause.since, state.decided) if known else (now, None)
        reports = state.pause.progress if known else ()
        self._begin_pause(state, Pause(since, tuple(calls), wait_any, deadline_at, reports))
        state.decided = decided

    def resume(self, context: ContextId, now: float, deadline_at: float | None = None) -> None:
        """The tools have answered (or the program goes on): the pause becomes a known duration. Idempotent."""
        state = self.contexts[context]
        if deadline_at is not None:
            state.deadline_at = deadline_at
            self.contexts.note_deadline(state)
        if state.phase is not Phase.PAUSED:
            return
        elapsed = now - state.pause.since
        self.on_resumed(state.pause, elapsed)
        self.policy.estimator.observe(state.pause, elapsed)
        self._set_pause(state, Pause(now))

    def report(self, context: ContextId, now: float, fraction: float, call: int = 0) -> None:
        """A tool says how much of its work is done (0 to 1). Ignored when the context waits for no such call."""
        state = self.contexts[context]
        if state.phase is Phase.PAUSED and 0 <= call < len(state.pause.calls):
            state.pause = state.pause.reported(call, Progress(now, fraction))

    def stop(self, context: ContextId, now: float) -> None:
        """End a generation where it is; the context is idle again."""
        state = self.contexts[context]
        if state.phase in (Phase.QUEUED, Phase.RUNNING):
            self._rest(state, now)

    def fork(self, parent: ContextId, child: ContextId, now: float) -> None:
        """A child with the parent's tokens, sharing its KV (an unfinished page by copy-on-write)."""
        source = self.contexts[parent]
        self.open(child, source.namespace, now, source.deadline_at)
        self.ledger.fork(parent, child)
        state = self.contexts[child]
        state.arrival, state.program = source.arrival, source.program  # a branch keeps the program's place
        state.tokens = list(source.tokens)
        state.high_water_tokens = self.ledger.computed(child)

    def truncate(self, context: ContextId, num_tokens: int, now: float) -> None:
        """Roll a context back to its first ``num_tokens`` tokens."""
        self.stop(context, now)
        state = self.contexts[context]
        del state.tokens[num_tokens:]
        self.ledger.truncate(context, num_tokens)
        state.high_water_tokens = min(state.high_water_tokens, num_tokens)

    def close(self, context: ContextId, *, keep_cached: bool = True) -> None:
        """Forget a context in whatever state it is; its cached prefix may serve others."""
        self.policy.saw_closed(self.contexts[context])
        self._loading.discard(context)
        self.contexts.remove(context)
        self.ledger.close(context, keep_cached=keep_cached)

    def retract(self) -> None:
        """Every running context goes back to the queue, and all let go of their KV: it is computed again."""
        for state in self.contexts.values():
            if state.phase is Phase.RUNNING:
                self.contexts.become(state, Phase.QUEUED)
            self.ledger.pause(state.id)
            self.ledger.release(state.id)

    # -- the step ---------------------------------------------------------------------------------------------

    def plan(self, now: float) -> StepPlan:
        """Decide one step."""
        self._number += 1
        self.ledger.advance(self._number)
        expired = self._expired(now)
        self._memory.begin(now)
        self._memory.review()
        draft = self._draft()
        self._memory.copy_ahead()
        return StepPlan(
            number=self._number,
            now=now,
            slices=tuple(draft.values()),
            copies=self.ledger.take_copies(),
            moves=self.ledger.take_moves(),
            decisions=tuple(self._memory.decisions),
            preempted=tuple(self._memory.preempted),
            expired=expired,
            evicted_pages=self.ledger.take_evicted(),
        )

    def commit(self, plan: StepPlan, result: StepResult) -> None:
        """Take in computed tokens, sampled tokens and acknowledged copies of a step."""
        end = plan.now + result.duration_s
        self.meter.record(plan, result, self.ledger, self._memory.contended, self.contexts)
        for move in result.moves_done:
            self.ledger.acknowledge(move, failed=move in result.moves_failed)
        for piece in plan.slices:
            state = self.contexts.get(piece.context_id)
            if state is None or state.phase is not Phase.RUNNING:  # ended by the step before, which was under way
                continue
            if piece.context_id in result.broken:
                self._rest(state, end)
                continue
            computed = piece.start + piece.num_tokens
            self.ledger.commit(piece.context_id, state.tokens, computed)
            state.high_water_tokens = max(state.high_water_tokens, computed)
            if state.recompute_from is not None:
                state.recompute_from = max(state.recompute_from, computed)
            if piece.samples:
                state.pending = piece.context_id in result.pending
                state.ending = piece.context_id in result.last
                token = TOKEN_TO_COME if state.pending else result.tokens.get(piece.context_id)
                if token is not None:
                    state.tokens.append(token)
            if piece.context_id in result.finished or (not state.samples and computed == state.num_tokens):
                self._rest(state, end)

    def settle(self, live: Collection[ContextId], result: StepResult, now: float) -> None:
        """What a step committed under way has sampled. ``live``: its contexts, but for those stopped meanwhile."""
        for context in live:
            state = self.contexts.get(context)
            if state is None:
                continue
            if state.pending:
                token = result.tokens.get(context)
                if token is None:
                    state.tokens.pop()
                else:
                    state.tokens[-1] = token
                state.pending = state.ending = False
            if context in result.finished and state.phase is not Phase.PAUSED:
                self._rest(state, now)
            if context in result.broken:  # committed under way
                self.ledger.discard(context)

    @property
    def has_work(self) -> bool:
        """Some context is queued or running."""
        return bool(self.contexts.in_phase(Phase.RUNNING) or self.contexts.in_phase(Phase.QUEUED))

    # -- parts ------------------------------------------------------------------------------------------------

    def _rest(self, state: Context, now: float) -> None:
        if state.pending:  # whatever comes is nobody's any more
            state.tokens.pop()
            state.pending = state.ending = False
        self.contexts.become(state, Phase.PAUSED)
        state.samples, state.recompute_from = False, None
        self._begin_pause(state, Pause(now))

    def _begin_pause(self, state: Context, pause: Pause) -> None:
        self._set_pause(state, pause)
        self.ledger.pause(state.id)
        self.policy.saw_paused(state, pause.since)
        self._memory.paused += 1
        if self.policy.writes_through and (pause.calls or self.policy.releases_idle):
            self.ledger.write_back(state.id)

    def _set_pause(self, state: Context, pause: Pause) -> None:
        state.pause, state.decided = pause, None
        self.contexts.note_deadline(state)

    def _expired(self, now: float) -> tuple[ContextId, ...]:
        """Contexts past their own or their pause's deadline. The engine closes them and tells their owner."""
        return tuple(
            state.id
            for state in self.contexts.with_deadline.values()
            if (due := state.due_at) is not None and now >= due
        )

    def _in_order(self, phase: Phase) -> list[Context]:
        return sorted(self.contexts.in_phase(phase), key=self.policy.order_key)

    def _draft(self) -> dict[ContextId, Slice]:
        """Running contexts first: single tokens, then chunks; then queued ones until memory or budget ends."""
        draft: dict[ContextId, Slice] = {}
        running = self._in_order(Phase.RUNNING)
        starts = [self.ledger.computed(state.id) for state in running]
        queued: Sequence[Context] = self._in_order(Phase.QUEUED)
        self._unpin_loaded()
        budget = self.config.max_step_tokens
        if queued:
            room = self._memory.room(self._number)
            allowed = self.policy.admit(queued, room)
            queued = allowed if running or allowed else queued[:1]
            budget = self.policy.step_tokens(budget, room)
        single: list[tuple[Context, int]] = []
        chunks: list[tuple[Context, int]] = []
        for state, start in zip(running, starts, strict=True):
            (single if len(state.tokens) - start <= 1 else chunks).append((state, start))
        for state, start in [*single, *chunks]:
            if budget <= 0:
                break
            if state.phase is Phase.RUNNING and not state.ending:
                budget -= self._grant(state, start, budget, running, draft)
        count = sum(state.phase is Phase.RUNNING for state in running)
        residents_only = False
        for state in queued:
            if budget <= 0 or count >= self.config.max_running or self._memory.preempted:
                break
            if residents_only and not self._is_resident(state):
                continue
            if self._is_under_way(state, draft):
                count += 1  # it will run with the others, and there is no use in looking at more than can
                continue
            admitted = self._admit(state)
            if admitted is None:
                if not self.policy.lets_pass(state, self._memory.now):
                    break
                residents_only = True
                continue
            count += 1
            if admitted:
                budget -= self._grant(state, self.ledger.computed(state.id), budget, [], draft)
        return draft

    def _is_resident(self, state: Context) -> bool:
        """Nothing that it has computed before would have to be computed or copied again."""
        kept = self.ledger.computed(state.id)
        return kept > 0 and kept + self.ledger.page_size > state.high_water_tokens

    def _is_under_way(self, state: Context, draft: dict[ContextId, Slice]) -> bool:
        """This very step computes, for another context, whole pages that this one would compute first: a step later
        it has them for nothing. The other one is ahead of it and gets on with every step that it is waited for."""
        size = self.ledger.page_size
        for piece in draft.values():
            if piece.num_tokens < size:
                continue
            end = min(piece.start + piece.num_tokens, state.reuse_limit) // size * size
            other = self.contexts[piece.context_id]
            if end < piece.start + size or other.namespace != state.namespace or other.recompute_from is not None:
                continue
            page = slice(piece.start, piece.start + size)
            if state.tokens[page] != other.tokens[page]:  # most differ here
                continue
            if (
                self.ledger.computed(state.id) <= piece.start
                and state.tokens[: piece.start] == other.tokens[: piece.start]
            ):
                return True
        return False

    def _unpin_loaded(self) -> None:
        """What was copied in for a queued context stays revocable until it is admitted: it may be behind others."""
        for context in [context for context in self._loading if not self.ledger.is_loading(context)]:
            self._loading.discard(context)
            if self.contexts[context].phase is Phase.QUEUED:
                self.ledger.pause(context)

    def _admit(self, state: Context) -> bool | None:
        """True: running now. False: its KV is on the way in. None: no memory."""
        ledger, tokens = self.ledger, state.tokens
        if ledger.is_loading(state.id):
            return False
        computed = ledger.acquire(state.id, tokens, state.reuse_limit)
        wanted = ledger.host_tokens(state.id, tokens, state.reuse_limit)
        if wanted and self._fetch_s(state, wanted) < self.profile.recompute_s(computed, wanted):
            if not self._memory.secure(state.id, state.num_tokens):
                self.ledger.pause(state.id)  # what it holds stays revocable while it queues
                return None
            if ledger.load(state.id, tokens, state.reuse_limit):
                self._loading.add(state.id)
                return False
        if not self._memory.secure(state.id, state.num_tokens):
            self.ledger.pause(state.id)
            return None
        self._note_cached(state, computed)
        self.contexts.become(state, Phase.RUNNING)
        self.policy.saw_running(state, self._memory.now)
        return True

    def _fetch_s(self, state: Context, num_tokens: int) -> float:
        """Seconds to copy in what follows a context's computed tokens."""
        ledger = self.ledger
        on_disk = ledger.disk_tokens(state.id, state.tokens, state.reuse_limit) if ledger.num_disk_pages else 0
        return self.profile.copy_s(num_tokens - on_disk) + self.profile.copy_s(on_disk, on_disk=True)

    @staticmethod
    def _note_cached(state: Context, computed: int) -> None:
        if state.cached_tokens < 0:
            state.cached_tokens = computed

    def _grant(
        self, state: Context, start: int, budget: int, running: list[Context], draft: dict[ContextId, Slice]
    ) -> int:
        """Give a running context up to ``budget`` rows from ``start``, taking memory as needed.

        Returns the rows granted, less those taken back from contexts preempted for it.
        """
        taken_back = 0
        rows = min(budget, len(state.tokens) - start)
        while not self.ledger.extend(state.id, start + rows):
            if self._memory.is_coming(state.id, start + rows):
                return -taken_back
            victims = [other for other in running if other.phase is Phase.RUNNING and other is not state]
            later = [other for other in victims if self.policy.order_key(other) > self.policy.order_key(state)]
            if self._memory.make_room(state.id, start + rows, before_preempting=bool(later)):
                continue
            if later:
                self._memory.preempt(later[-1])
                undone = draft.pop(later[-1].id, None)
                taken_back += undone.num_tokens if undone is not None else 0
                continue
            if not self.ledger.copying_pages:
                self._memory.preempt(state)
            return -taken_back
        end = start + rows
        draft[state.id] = Slice(
            context_id=state.id,
            start=start,
            num_tokens=rows,
            pages=self.ledger.table(state.id),
            samples=state.samples and end == len(state.tokens),
            num_recomputed_tokens=max(0, min(end, state.high_water_tokens) - start),
        )
        return rows - taken_back
