"""A context: tokens that outlive requests, and the life they lead. The thing that pauses."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from caesura.scheduler.types import Action, ContextId, Phase

TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.QUEUED: frozenset({Phase.RUNNING, Phase.PAUSED, Phase.FINISHED}),
    Phase.RUNNING: frozenset({Phase.QUEUED, Phase.PAUSED, Phase.FINISHED}),
    Phase.PAUSED: frozenset({Phase.QUEUED, Phase.FINISHED}),
    Phase.FINISHED: frozenset(),
}

NO_PROGRAM = ContextId(-1)


class IllegalTransition(AssertionError):
    """A phase change that the table does not have: a bug of the caller."""


@dataclass(frozen=True, slots=True)
class Call:
    """One tool call a context waits for. ``expected_s`` is the program's hint, None when it gave none.

    ``true_s`` is what it will really take: known to a simulation, and read by the oracle alone.
    """

    tool: str
    expected_s: float | None = None
    true_s: float | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """A tool's word at the moment ``at`` (engine's clock) that ``fraction`` of its work is done, 0 to 1."""

    at: float
    fraction: float


@dataclass(frozen=True, slots=True)
class Pause:
    """Why a context waits, since when (seconds on the engine's clock), and for how long at most.

    No calls at all means the program itself is thinking: an idle moment between two requests. ``progress`` holds the
    latest report of each call, None without one, and is empty when there is none at all.
    """

    since: float
    calls: tuple[Call, ...] = ()
    wait_any: bool = False
    deadline_at: float | None = None
    progress: tuple[Progress | None, ...] = ()

    @property
    def tool(self) -> str:
        return "+".join(call.tool for call in self.calls)

    def reported(self, call: int, progress: Progress) -> Pause:
        """The same pause with a newer report of one call."""
        reports = list(self.progress or (None,) * len(self.calls))
        reports[call] = progress
        return replace(self, progress=tuple(reports))


@dataclass(slots=True, eq=False)
class Context:
    """Bookkeeping of one context. Its KV is the ledger's business alone.

    The catch-up rule: a step lets the computed tokens catch up with ``tokens``; prefill, prefix hits, recompute after a
    discard and resume after a tool are all that one thing.
    """

    id: ContextId
    arrival: float
    tokens: list[int] = field(default_factory=list)
    phase: Phase = Phase.PAUSED
    pause: Pause = field(default_factory=lambda: Pause(0.0))
    submitted: float = 0.0  # when its request was made; `arrival` never changes
    waiting_since: float = 0.0  # the same, or when it was preempted after it had caught up
    samples: bool = False  # a token is to be sampled on catching up
    recompute_from: int | None = None  # rows from here on are wanted again although their KV exists (scoring)
    high_water_tokens: int = 0  # most tokens ever computed: below it, computing is recomputing
    cached_tokens: int = 0  # found computed at the last admission
    deadline_at: float | None = None
    decided: Action | None = None  # the last decision of this pause
    pending: bool = False  # the last token is TOKEN_TO_COME
    ending: bool = False  # and the one that comes is the last of this generation
    namespace: str = ""  # contexts of one namespace share prefixes
    program: ContextId = NO_PROGRAM  # the context it was forked from, at the root; its own id without a fork

    def __post_init__(self) -> None:
        """A context is its own program until a fork says otherwise."""
        if self.program == NO_PROGRAM:
            self.program = self.id

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def reuse_limit(self) -> int:
        """Tokens whose KV may come from elsewhere. A step computes at least one row; scoring needs more of them."""
        limit = self.num_tokens - 1
        return limit if self.recompute_from is None else min(limit, self.recompute_from)

    @property
    def due_at(self) -> float | None:
        """When it has to be closed: its own deadline or, while it is paused, the pause's, whichever is earlier."""
        own, pause = self.deadline_at, self.pause.deadline_at
        if pause is None or self.phase is not Phase.PAUSED:
            return own
        return pause if own is None else min(own, pause)

    def become(self, phase: Phase) -> None:
        """The one place where a phase changes."""
        if phase not in TRANSITIONS[self.phase]:
            raise IllegalTransition(f"context {self.id}: {self.phase} -> {phase}")
        self.phase = phase


class ContextTable(dict[ContextId, Context]):
    """All open contexts, and those of each phase, so that a step never looks at contexts it has nothing to do with."""

    def __init__(self) -> None:
        super().__init__()
        self._of_phase: dict[Phase, dict[ContextId, Context]] = {phase: {} for phase in Phase}
        self.with_deadline: dict[ContextId, Context] = {}  # an own one or, while paused, the pause's

    def add(self, context: Context) -> None:
        """A new context, in the phase it says."""
        self[context.id] = context
        self._of_phase[context.phase][context.id] = context
        self.note_deadline(context)

    def remove(self, context: ContextId) -> None:
        """Finish a context and forget it."""
        state = self.pop(context)
        del self._of_phase[state.phase][context]
        self.with_deadline.pop(context, None)
        state.become(Phase.FINISHED)

    def become(self, state: Context, phase: Phase) -> None:
        """Change a context's phase."""
        before = state.phase
        state.become(phase)
        del self._of_phase[before][state.id]
        self._of_phase[phase][state.id] = state

    def note_deadline(self, state: Context) -> None:
        """To be called after a deadline was set or a pause replaced."""
        if state.deadline_at is None and state.pause.deadline_at is None:
            self.with_deadline.pop(state.id, None)
        else:
            self.with_deadline[state.id] = state

    def in_phase(self, phase: Phase) -> Collection[Context]:
        """The contexts of one phase; do not change phases while iterating."""
        return self._of_phase[phase].values()
