"""The engine: commands in, steps, events out. One thread; everything it needs is passed in.

``step`` is: plan, begin the copies, execute, read, commit, emit. The same loop runs on torch and in simulation. With an
executor that overlaps, a step is launched, the one before it is read and emitted, and it is committed under way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from caesura.runtime.clock import Clock
from caesura.runtime.errors import BrokenInvariant, ContextClosed, ContextTooLong, DeadlineExceeded, InvalidRequest
from caesura.runtime.executors.base import ExecOutput, Executor, OverlappingExecutor, SliceInput
from caesura.runtime.failed import fail_step, spoil
from caesura.runtime.generation import Ending, Generation
from caesura.runtime.kv.ledger import KVLedger
from caesura.runtime.record import NO_OUTPUT, Flight, Record, Records, Scoring
from caesura.scheduler.context import Call
from caesura.scheduler.policies import PausePolicy
from caesura.scheduler.profile import CostProfile
from caesura.scheduler.scheduler import Scheduler, SchedulerConfig
from caesura.scheduler.types import ContextId, MoveId, PauseDecision, Phase, StepPlan, StepResult

COPY_WAIT_S = 0.05
INBOX_EVERY_S = 0.002  # how often a wait for copies looks whether somebody has a command
BLOCKING_WAITS = 200  # of COPY_WAIT_S at most, for a policy that lets everything wait for its copies


class Observer(Protocol):
    """Sees every step after it was committed: traces, live views, tests."""

    def on_step(self, engine: Engine, plan: StepPlan, result: StepResult) -> None: ...


class Engine:
    """Runs contexts. Not thread-safe: one thread calls it, ``service.py`` is the door for everyone else."""

    def __init__(
        self,
        executor: Executor,
        policy: PausePolicy,
        profile: CostProfile,
        clock: Clock,
        config: SchedulerConfig | None = None,
        *,
        share_prefixes: bool = True,
        overlapping: OverlappingExecutor | None = None,
    ) -> None:
        """``overlapping`` is the executor again, when a step is to be planned while the one before it runs."""
        self.executor = executor
        self._overlapping = overlapping
        self._flight: Flight | None = None
        self._failure: Exception | None = None  # of a step that was waited for outside of one
        self.clock = clock
        below = (executor.num_host_pages, executor.num_disk_pages) if policy.uses_host else (0, 0)
        self.ledger = KVLedger(executor.page_size, executor.num_device_pages, *below, disk_pays=profile.disk_pays)
        self.scheduler = Scheduler(self.ledger, policy, profile, config or SchedulerConfig())
        self.observers: list[Observer] = []
        self._share_prefixes = share_prefixes
        self._records = Records(self.scheduler, clock)
        self._ids = itertools.count(1)
        self.held = False  # no steps for now
        self.inbox: Callable[[], bool] | None = None  # whether somebody on another thread has a command

    # -- contexts ---------------------------------------------------------------------------------------------

    def open(
        self,
        namespace: str = "",
        deadline_at: float | None = None,
        on_closed: Callable[[Exception], None] = lambda _: None,
    ) -> ContextId:
        """A new context. ``on_closed`` hears of an end the caller did not ask for. Namespaces share no KV."""
        context = ContextId(next(self._ids))
        space = namespace if self._share_prefixes else f"{namespace}/{context}"
        self.scheduler.open(context, space, self.clock.now(), deadline_at)
        self._records[context] = Record(space, on_closed)
        return context

    def append(self, context: ContextId, tokens: Sequence[int]) -> int:
        """Add tokens; returns the context's length. Nothing is computed yet."""
        self._records.idle(context)
        self._check_length(self.num_tokens(context) + len(tokens))
        self.scheduler.append(context, tokens)
        return self.num_tokens(context)

    def num_tokens(self, context: ContextId) -> int:
        self._records.of(context)
        state = self.scheduler.contexts[context]
        return state.num_tokens - state.pending

    def tokens(self, context: ContextId) -> list[int]:
        """The context's tokens; one that is still being sampled is none yet."""
        return self.scheduler.contexts[context].tokens[: self.num_tokens(context)]

    def generate(self, context: ContextId, generation: Generation) -> None:
        """Generate from the end of the context; chunks go to the generation's sink."""
        record = self._records.idle(context)
        num_tokens = self.num_tokens(context)
        if num_tokens == 0:
            raise InvalidRequest("the context is empty; append at least one token (for example BOS) before generating")
        self._check_length(num_tokens + generation.params.max_new_tokens)
        record.generation = generation
        if generation.params.max_new_tokens == 0:
            self._prefill(
                context, record, lambda _: self._records.finish(context, record, Ending("length", None, keep=True))
            )
            return
        self.scheduler.submit(context, self.clock.now(), samples=True)

    def prefill(self, context: ContextId, done: Callable[[int | Exception], None]) -> None:
        """Compute everything appended so far; ``done`` gets the number of tokens."""
        self._prefill(context, self._records.idle(context), done)

    def _prefill(self, context: ContextId, record: Record, done: Callable[[int | Exception], None]) -> None:
        state = self.scheduler.contexts[context]
        if self.ledger.computed(context) >= state.num_tokens:
            self.scheduler.resume(context, self.clock.now())
            done(state.num_tokens)
            return
        record.prefilled = done
        self.scheduler.submit(context, self.clock.now(), samples=False)

    def score(
        self, context: ContextId, start: int, done: Callable[[list[Any] | Exception], None], *, top: int = 0
    ) -> None:
        """Logprobs of the context's tokens from ``start`` on, each given all before it. With ``top``, ``done`` gets
        SampledTokens, which tell the likeliest tokens in each place as well; else floats."""
        record = self._records.idle(context)
        num_tokens = self.num_tokens(context)
        if not 1 <= start <= num_tokens:
            raise InvalidRequest(f"start is {start}; it must lie between 1 and the context's {num_tokens} tokens")
        if start == num_tokens:
            done([])
            return
        record.scoring = Scoring(start, done, top)
        self.scheduler.submit(context, self.clock.now(), samples=False, recompute_from=start - 1)

    def pause(
        self,
        context: ContextId,
        calls: Sequence[Call],
        *,
        wait_any: bool = False,
        deadline_at: float | None = None,
        lives_until: float | None = None,
    ) -> None:
        """The context waits for these tools from now on, until ``deadline_at`` at most. ``lives_until`` replaces the
        context's own deadline, which counts as well."""
        self._records.idle(context)
        self.scheduler.pause(
            context, self.clock.now(), calls, wait_any=wait_any, deadline_at=deadline_at, lives_until=lives_until
        )
        self._records.has_new_pause = True

    def report(self, context: ContextId, fraction: float, call: int = 0) -> None:
        """A tool has done this share of its work. Ignored when the context is gone, or waits for no such call."""
        if context in self._records:
            self.scheduler.report(context, self.clock.now(), fraction, call)

    def resume(self, context: ContextId, deadline_at: float | None = None) -> None:
        """The tools have answered. Idempotent; generating resumes by itself. ``deadline_at`` replaces the context's."""
        self._records.of(context)
        self.scheduler.resume(context, self.clock.now(), deadline_at)

    def fork(self, parent: ContextId, on_closed: Callable[[Exception], None] = lambda _: None) -> ContextId:
        """A copy that shares the parent's KV."""
        record = self._records.idle(parent)
        if self._flight is not None and self._flight.computes(parent, self.ledger.computed(parent)):
            try:
                self._land()  # it was stopped: whether its last rows came about is to be known before they are shared
            except Exception as error:
                self._failure = error
        child = ContextId(next(self._ids))
        self.scheduler.fork(parent, child, self.clock.now())
        self._records[child] = Record(record.namespace, on_closed)
        return child

    def truncate(self, context: ContextId, num_tokens: int) -> None:
        """Roll back to the first ``num_tokens`` tokens."""
        self._records.idle(context)
        have = self.num_tokens(context)
        if not 0 <= num_tokens <= have:
            raise InvalidRequest(f"num_tokens is {num_tokens}; it must lie between 0 and the context's {have}")
        self.scheduler.truncate(context, num_tokens, self.clock.now())

    def stop(self, context: ContextId) -> None:
        """Abort what the context is doing; it stays open."""
        record = self._records.get(context)
        if record is not None:
            self._not_live(context)
            self.scheduler.stop(context, self.clock.now())
            record.fail(ContextClosed("the request was aborted"))

    def close(self, context: ContextId, reason: Exception | None = None) -> None:
        """Close a context in whatever state it is. Idempotent."""
        record = self._records.pop(context, None)
        if record is None:
            return
        self._not_live(context)
        try:
            self.scheduler.close(context)
        finally:  # whatever is broken there, whoever waits is told
            if reason is not None:  # first, so that whoever waits for a request finds the reason
                record.on_closed(reason)
            record.fail(reason or ContextClosed("the context was closed"))

    def flush_cache(self) -> None:
        """Forget every cached prefix that no context holds."""
        self.ledger.flush()

    def decisions(self, context: ContextId) -> list[PauseDecision]:
        """The latest pause decisions of a context, oldest first."""
        return list(self._records.of(context).decisions)

    @property
    def _pool_tokens(self) -> int:
        return (self.executor.num_device_pages - 1) * self.executor.page_size

    @property
    def max_context_tokens(self) -> int:
        """The longest context that fits both the model's window and the device pool."""
        return min(self.executor.max_context_tokens, self._pool_tokens)

    # -- the loop ---------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """A step would do something: contexts to run, copies or output to take in, a pause to decide about."""
        wanted = self._records.has_new_pause or self.scheduler.has_work or bool(self.ledger.transfers)
        return (wanted or self._flight is not None) and not self.held

    def step(self) -> StepPlan:
        """One iteration."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        self._records.has_new_pause = False
        plan = self.scheduler.plan(self.clock.now())
        for context in plan.expired:
            self._close_expired(context)
        for decision in plan.decisions:
            self._records.remember(decision)
        self.executor.begin(plan.moves)
        inputs = [self._records.input(piece) for piece in plan.slices if piece.context_id in self._records]
        if self._overlapping is not None:
            self._step_ahead(self._overlapping, plan, inputs)
            return plan
        try:
            output = self.executor.execute(inputs, plan.copies) if inputs or plan.copies else NO_OUTPUT
        except Exception as error:
            fail_step(self, plan, error)
            raise
        moves_done = self._acknowledged(computed=bool(inputs))
        endings: dict[ContextId, Ending] = {}
        tokens = self._records.read(output, endings)
        duration_s = self.clock.now() - plan.now
        result = StepResult(
            plan.number,
            duration_s,
            tokens,
            finished=frozenset(endings),
            broken=_broken(output),
            moves_done=moves_done,
            moves_failed=self.executor.take_failed(),
        )
        self.scheduler.commit(plan, result)
        self._records.emit(plan, output, endings)
        self._show(plan, result)
        return plan

    def _step_ahead(self, executor: OverlappingExecutor, plan: StepPlan, inputs: Sequence[SliceInput]) -> None:
        """Launch a step, take in the one before it, and commit this one with its tokens to come."""
        ticket = None
        try:
            if inputs or plan.copies:
                ticket = executor.launch(inputs, plan.copies)
            self._land()
        except Exception as error:
            fail_step(self, plan, error)
            raise
        moves_done = self._acknowledged(computed=bool(inputs))
        contexts = self.scheduler.contexts
        chosen = [contexts[piece.context_id] for piece in plan.slices if piece.context_id in contexts]
        live = {state.id for state in chosen if state.phase is Phase.RUNNING}  # the others ended with the step before
        pending = frozenset(piece.context_id for piece in plan.slices if piece.samples and piece.context_id in live)
        result = StepResult(
            plan.number,
            self.clock.now() - plan.now,
            moves_done=moves_done,
            moves_failed=self.executor.take_failed(),
            pending=pending,
            last=frozenset(context for context in pending if self._records.needs_one_more(context)),
        )
        self.scheduler.commit(plan, result)
        if ticket is None:
            self._show(plan, result)
            return
        self._flight = Flight(plan, ticket, result, live)
        if any(piece.sampler is not None and piece.sampler.needs_history for piece in inputs):
            self._land()  # the next step's inputs are worked out on the host

    def _land(self) -> None:
        """Wait for the step under way, if there is one, and tell everyone what came of it."""
        flight, self._flight = self._flight, None
        if flight is None or self._overlapping is None:
            return
        try:
            output = self._overlapping.collect(flight.ticket)
        except Exception as error:
            fail_step(self, flight.plan, error, flight.live)
            raise
        broken = _broken(output)
        if broken:
            spoil(self, flight.plan, broken, flight.live)
            flight.live.intersection_update(self._records)  # who shared it may be closed now
        output = replace(output, outputs=tuple(out for out in output.outputs if out.context_id in flight.live))
        endings: dict[ContextId, Ending] = {}
        tokens = self._records.read(output, endings)
        now = self.clock.now()
        result = replace(
            flight.result,
            duration_s=now - flight.plan.now,
            tokens=tokens,
            finished=frozenset(endings),
            broken=broken & flight.live,
            pending=frozenset(),
            last=frozenset(),
        )
        self.scheduler.settle(flight.live, result, now)
        self._records.emit(flight.plan, output, endings)
        self._show(flight.plan, result)

    def _not_live(self, context: ContextId) -> None:
        """What the step under way yields for this context is nobody's any more."""
        if self._flight is not None:
            self._flight.live.discard(context)

    def _acknowledged(self, *, computed: bool) -> tuple[MoveId, ...]:
        idle = self.has_work and not computed  # nothing to compute before a copy ends
        moves_done = self._await_copy() if idle else self.executor.acknowledged()
        for _ in range(BLOCKING_WAITS if self.scheduler.policy.waits_for_copies else 0):
            if len(moves_done) == len(self.ledger.transfers):
                break
            moves_done += self.executor.acknowledged(wait_s=COPY_WAIT_S)
        return tuple(moves_done)

    def _await_copy(self) -> list[MoveId]:
        """The copies that end next; none, after a while or as soon as there is a command."""
        if self.inbox is None:
            return self.executor.acknowledged(wait_s=COPY_WAIT_S)
        for _ in range(round(COPY_WAIT_S / INBOX_EVERY_S)):
            moves_done = self.executor.acknowledged(wait_s=INBOX_EVERY_S)
            if moves_done or self.inbox():
                return moves_done
        return []

    def _show(self, plan: StepPlan, result: StepResult) -> None:
        for observer in self.observers:
            observer.on_step(self, plan, result)

    def hold(self, *, retract: bool) -> None:
        """No more steps until ``go_on``. ``retract`` gives up all KV besides, to be computed again."""
        self._land()
        self.held = True
        if retract:
            self.scheduler.retract()
            self.ledger.flush()

    def go_on(self) -> None:
        """Take steps again. Idempotent."""
        self.held = False

    def expire(self) -> None:
        """Close contexts past their deadline, which a step does as well."""
        now = self.clock.now()
        for state in list(self.scheduler.contexts.with_deadline.values()):
            if (due := state.due_at) is not None and now >= due:
                self._close_expired(state.id)

    def _close_expired(self, context: ContextId) -> None:
        self.close(context, DeadlineExceeded(f"context {context} outlasted its deadline and was closed"))

    def next_deadline(self) -> float | None:
        """The earliest moment at which a step would have to act by itself."""
        moments = (state.due_at for state in self.scheduler.contexts.with_deadline.values())
        return min((moment for moment in moments if moment is not None), default=None)

    def check(self) -> None:
        """Raise BrokenInvariant unless all accounting adds up."""
        from caesura.runtime.kv.check import check

        check(self.ledger)
        if set(self._records) != set(self.scheduler.contexts) or set(self._records) != set(self.ledger.holdings):
            raise BrokenInvariant("engine, scheduler and ledger know different contexts")

    # -- checks -----------------------------------------------------------------------------------------------

    def _check_length(self, num_tokens: int) -> None:
        limit = self.max_context_tokens
        if num_tokens > limit:
            raise ContextTooLong(
                f"the context needs {num_tokens} tokens; the limit is {limit} (model window "
                f"{self.executor.max_context_tokens}, KV pool {self._pool_tokens}): shorten it, "
                "lower max_new_tokens or enlarge the pool"
            )


def _broken(output: ExecOutput) -> frozenset[ContextId]:
    return frozenset(out.context_id for out in output.outputs if out.failure is not None)
