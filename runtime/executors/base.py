"""The seam between the engine loop and whatever computes: torch on a CPU, a GPU, or a cost model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from caesura.runtime.sampling import SamplerState
from caesura.scheduler.types import ContextId, Move, MoveId


@dataclass(frozen=True, slots=True)
class SliceInput:
    """One context's rows in a step, with the tokens filled in.

    ``token_ids`` are computed at positions ``start, start + 1, ...``; ``pages`` is the device page table for
    ``[0, start + len(token_ids))``. ``sampler`` is set when the last row yields the next token.
    ``score_targets`` are ``(row, token_id)`` pairs: the logprob of ``token_id`` as successor of that row; with
    ``score_top``, the most likely successors of each of these rows as well.

    For an executor that overlaps, the last token id may be ``TOKEN_TO_COME``: the one that the step launched before
    this one samples for the same context.
    """

    context_id: ContextId
    token_ids: Sequence[int]
    start: int
    pages: Sequence[int]
    sampler: SamplerState | None
    score_targets: Sequence[tuple[int, int]] = ()
    score_top: int = 0


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A sampled token; logprobs are log-softmax after temperature, before truncation (None unless asked for)."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SliceOutput:
    """What one slice yielded. ``failure`` is set instead of a token when only this context is at fault.
    ``score_tops`` are ``(token_id, logprob)`` pairs by score target, most likely first; empty unless asked for."""

    context_id: ContextId
    sampled: SampledToken | None
    scores: tuple[float, ...] = ()
    failure: str | None = None
    score_tops: tuple[tuple[tuple[int, float], ...], ...] = ()


@dataclass(frozen=True, slots=True)
class ExecOutput:
    """What one step yielded; ``duration_s`` is wall time, or virtual time in simulation."""

    duration_s: float
    outputs: tuple[SliceOutput, ...]


class Executor(Protocol):
    """Computes slices and copies pages. Owns the arenas; knows no request, no tree and no policy.

    The engine thread alone calls it. ``execute`` advances neither samplers nor contexts.
    """

    page_size: int
    page_bytes: int
    num_device_pages: int
    num_host_pages: int
    num_disk_pages: int  # rows below the device: host memory first, then these
    max_context_tokens: int

    def begin(self, moves: Sequence[Move]) -> None:
        """Start copies between the tiers; returns at once. Both ends stay pinned until acknowledged."""

    def acknowledged(self, *, wait_s: float = 0.0) -> list[MoveId]:
        """Moves completed since the last call; waits up to ``wait_s`` for the first one."""

    def take_failed(self) -> frozenset[MoveId]:
        """Those of the moves acknowledged since the last call that brought nothing (only the disk tier's can)."""

    def execute(self, slices: Sequence[SliceInput], copies: Sequence[Move]) -> ExecOutput:
        """Run ``copies`` (device to device), then every slice as one batch."""

    def close(self) -> None:
        """Wait for copies in flight and free the arenas."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """A launched step."""

    number: int


class OverlappingExecutor(Executor, Protocol):
    """An executor whose steps run while the next one is planned.

    All it is given takes effect in the order of the calls, whenever it is carried out: a page may be given to a later
    step or copy while an earlier one is still at it. ``execute`` is ``collect(launch())``.
    """

    def launch(self, slices: Sequence[SliceInput], copies: Sequence[Move]) -> Ticket:
        """Begin a step and return at once. At most two are under way: the one before must be collected first."""

    def collect(self, ticket: Ticket) -> ExecOutput:
        """Wait for a step. Steps are collected in the order of their launch, each once."""
