"""The values that cross the scheduler's border: ids, enums, plans, results, decisions.

Everything here is frozen and made of ints, floats and strings, so a recorded plan compares equal to a
replayed one and can be written to JSON as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

ContextId = NewType("ContextId", int)
PageId = NewType("PageId", int)
MoveId = NewType("MoveId", int)

TOKEN_TO_COME = -1  # stands in a context for the token that a step under way will sample


class Phase(StrEnum):
    """Where a context is in its life. Where its KV lies is the ledger's fact, not a phase."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    FINISHED = "finished"


class Action(StrEnum):
    """What becomes of a paused context's KV."""

    PRESERVE = "preserve"  # stays on the device, held by the context, revocable
    SWAP = "swap"  # copied to the host tier, then its device pages are free
    DISCARD = "discard"  # freed now, recomputed on return
    RELEASE = "release"  # the context lets go; the cache keeps the pages until LRU takes them


class MoveKind(StrEnum):
    """Direction of a page copy."""

    OUT = "out"  # device -> host
    IN = "in"  # host -> device
    DOWN = "down"  # host memory -> disk, both of them below the device
    COPY = "copy"  # device -> device, copy-on-write; runs at the start of the step that needs it


@dataclass(frozen=True, slots=True)
class Move:
    """Copy ``source[i]`` to ``target[i]`` for every i; ids are rows of the two arenas.

    The rows below the device are one range: host memory first, then the disk.
    """

    id: MoveId
    kind: MoveKind
    source: tuple[PageId, ...]
    target: tuple[PageId, ...]


@dataclass(frozen=True, slots=True)
class Slice:
    """One context's share of a step: compute tokens ``[start, start + num_tokens)``.

    ``pages`` is the device page table covering ``[0, start + num_tokens)``. ``samples`` says that the slice
    reaches the context's end, so the last row yields the next token.
    """

    context_id: ContextId
    start: int
    num_tokens: int
    pages: tuple[PageId, ...]
    samples: bool
    num_recomputed_tokens: int


@dataclass(frozen=True, slots=True)
class ActionCosts:
    """Waste of the three actions in token-seconds (bytes per token drop out)."""

    preserve_token_s: float
    swap_token_s: float
    discard_token_s: float


@dataclass(frozen=True, slots=True)
class PauseDecision:
    """One decision with everything it was made from, so that a person can check the arithmetic."""

    context_id: ContextId
    now: float
    policy: str
    action: Action
    tool: str
    reason: str
    costs: ActionCosts
    context_tokens: int
    affected_tokens: int  # what the action frees or keeps: the part this context does not share with running ones
    elapsed_s: float
    expected_remaining_s: float
    batch_tokens: int  # KV tokens of running contexts (C_other)
    free_pages: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything one step does. Frozen: the executor only carries it out."""

    number: int
    now: float
    slices: tuple[Slice, ...] = ()
    copies: tuple[Move, ...] = ()
    moves: tuple[Move, ...] = ()
    decisions: tuple[PauseDecision, ...] = ()
    preempted: tuple[ContextId, ...] = ()
    expired: tuple[ContextId, ...] = ()
    evicted_pages: int = 0

    @property
    def num_query_tokens(self) -> int:
        return sum(piece.num_tokens for piece in self.slices)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the executor reports: sampled tokens, acknowledged moves, the time it took.

    Of a step that is still under way when it is committed the tokens are ``pending``: ``settle`` brings them.
    """

    number: int
    duration_s: float
    tokens: dict[ContextId, int] = field(default_factory=dict)
    finished: frozenset[ContextId] = frozenset()  # contexts whose generation ended with this token
    broken: frozenset[ContextId] = frozenset()  # those of them whose slice could not be computed: nobody may find it
    moves_done: tuple[MoveId, ...] = ()
    moves_failed: frozenset[MoveId] = frozenset()  # those of them that brought nothing
    pending: frozenset[ContextId] = frozenset()  # contexts whose token is still to come
    last: frozenset[ContextId] = frozenset()  # those of them that will need no further one
