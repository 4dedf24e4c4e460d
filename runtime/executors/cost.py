"""An executor that knows only what things cost: no KV, no model, one link. For simulations of hours with thousands of
contexts. ``executors/sim.py`` is the one that checks the KV."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from caesura.runtime.clock import VirtualClock
from caesura.runtime.executors.base import ExecOutput, SampledToken, SliceInput, SliceOutput
from caesura.scheduler.profile import CostProfile
from caesura.scheduler.types import ContextId, Move, MoveId, MoveKind


@dataclass(frozen=True, slots=True)
class MachineCosts:
    """What an iteration and a copy take on one machine with one model.

    An iteration over rows (query tokens) in slices (contexts) takes ``step_s + rows * row_s + slices * slice_s +
    pairs * pair_s + read * read_s``. *Pairs* counts, for every row, the tokens it attends to: arithmetic of
    attention. *Read* counts the KV tokens of every slice once: its memory traffic. Copying ``x`` tokens one way
    takes ``copy_base_s + x * copy_token_s``.
    """

    step_s: float
    row_s: float
    copy_base_s: float
    copy_token_s: float
    slice_s: float = 0.0
    pair_s: float = 0.0
    read_s: float = 0.0

    def step_time_s(self, rows: int, slices: int, pairs: float, read: int) -> float:
        """Seconds of one iteration."""
        fixed = self.step_s + rows * self.row_s + slices * self.slice_s
        return fixed + pairs * self.pair_s + read * self.read_s

    def profile(self, saturation_tokens: int, source: str) -> CostProfile:
        """The affine profile that policies are given of this machine: what a calibration of it would find."""
        return CostProfile(
            step_s=self.step_s,
            token_s=self.row_s,
            attention_s=self.pair_s,
            swap_base_s=self.copy_base_s,
            swap_token_s=self.copy_token_s,
            saturation_tokens=saturation_tokens,
            source=source,
        )


class CostExecutor:
    """Implements ``Executor`` on a virtual clock.

    One link carries the copies of both directions, one after the other; those in go before those out that have not
    begun. A context always samples the same token, its own, so no two contexts ever share what they generated.
    """

    def __init__(
        self,
        costs: MachineCosts,
        clock: VirtualClock,
        *,
        page_size: int,
        num_device_pages: int,
        num_host_pages: int,
        token_bytes: int,
        max_context_tokens: int = 1 << 30,
    ) -> None:
        self.costs = costs
        self.page_size = page_size
        self.page_bytes = page_size * token_bytes
        self.num_device_pages = num_device_pages
        self.num_host_pages = num_host_pages
        self.num_disk_pages = 0
        self.max_context_tokens = max_context_tokens
        self.link_busy_s = 0.0
        self._clock = clock
        self._sampled: dict[ContextId, SliceOutput] = {}
        self._silent: dict[ContextId, SliceOutput] = {}
        self._waiting_in: deque[Move] = deque()
        self._waiting_out: deque[Move] = deque()
        self._current: tuple[float, Move] | None = None  # when it ends, and what it is
        self._done: list[MoveId] = []

    # -- copies -----------------------------------------------------------------------------------------------

    def begin(self, moves: Sequence[Move]) -> None:
        if not moves:
            return
        now = self._clock.now()
        self._settle(now)
        for move in moves:
            (self._waiting_in if move.kind is MoveKind.IN else self._waiting_out).append(move)
        if self._current is None:
            self._next(now)

    def acknowledged(self, *, wait_s: float = 0.0) -> list[MoveId]:
        if self._current is not None:
            self._settle(self._clock.now())
            if wait_s and not self._done and self._current is not None:
                self._clock.advance_to(min(self._clock.now() + wait_s, self._current[0]))
                self._settle(self._clock.now())
        done, self._done = self._done, []
        return done

    def take_failed(self) -> frozenset[MoveId]:
        return frozenset()

    @property
    def next_copy_at(self) -> float | None:
        """When the copy on the link ends, None when the link is idle."""
        return self._current[0] if self._current is not None else None

    def _settle(self, now: float) -> None:
        """Take in what has ended by now; the next copy begins where the last one ended."""
        while self._current is not None and self._current[0] <= now:
            ended, move = self._current
            self._done.append(move.id)
            self._next(ended)

    def _next(self, begins: float) -> None:
        queue = self._waiting_in or self._waiting_out
        if not queue:
            self._current = None
            return
        move = queue.popleft()
        tokens = len(move.source) * self.page_size
        copy_s = self.costs.copy_base_s + tokens * self.costs.copy_token_s
        self.link_busy_s += copy_s
        self._current = (begins + copy_s, move)

    # -- iterations -------------------------------------------------------------------------------------------

    def execute(self, slices: Sequence[SliceInput], copies: Sequence[Move]) -> ExecOutput:
        rows = read = 0
        pairs = 0.0
        sampled, silent = self._sampled, self._silent
        outputs = []
        for piece in slices:
            count, start = len(piece.token_ids), piece.start
            rows += count
            read += start + count
            pairs += count * (start + count / 2)
            context = piece.context_id
            known = silent if piece.sampler is None or piece.score_targets else sampled
            output = known.get(context)
            if output is None or piece.score_targets:
                token = None if piece.sampler is None else SampledToken(context)
                output = SliceOutput(context, token, tuple(-1.0 for _ in piece.score_targets))
                if not piece.score_targets:
                    known[context] = output
            outputs.append(output)
        if not outputs:
            return ExecOutput(0.0, ())
        duration_s = self.costs.step_time_s(rows, len(outputs), pairs, read)
        self._clock.advance(duration_s)
        return ExecOutput(duration_s, tuple(outputs))

    def close(self) -> None:
        self._current = None
        self._waiting_in.clear()
        self._waiting_out.clear()
