"""An executor without a model: time from a cost profile, tokens from a hash, KV whose content can be checked.

Every slot of the simulated arenas holds a hash of the whole prefix up to its token. A slice reads the slots before it
through its page table as attention would, so a page that was reused, lost or copied at the wrong moment changes the
next token - and the answer then differs from ``expected_token`` of the same prefix.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from caesura.runtime.clock import VirtualClock
from caesura.runtime.errors import BrokenInvariant
from caesura.runtime.executors.base import ExecOutput, SampledToken, SliceInput, SliceOutput
from caesura.scheduler.profile import CostProfile
from caesura.scheduler.types import ContextId, Move, MoveId, MoveKind

_MULTIPLIER = 6364136223846793005
_MASK = (1 << 64) - 1
_POISON = 0xDEAD


def chain(prefix_hash: int, token: int) -> int:
    """Hash of a prefix grown by one token."""
    mixed = ((prefix_hash ^ (token + 0x9E3779B97F4A7C15)) * _MULTIPLIER) & _MASK
    return mixed ^ (mixed >> 29)


class SimExecutor:
    """Implements ``Executor`` on a virtual clock. ``seed`` draws copy delays (up to ``slow`` times the profile's).

    ``check_kv=False`` skips reading the prefix, for large simulations. ``disk_faults`` is the share of the disk tier's
    copies that fail.
    """

    def __init__(
        self,
        profile: CostProfile,
        clock: VirtualClock,
        *,
        page_size: int = 16,
        num_device_pages: int = 256,
        num_host_pages: int = 0,
        vocab_size: int = 64,
        token_bytes: int = 1024,
        max_context_tokens: int = 1 << 20,
        seed: int = 0,
        slow: float = 1.0,
        check_kv: bool = True,
        num_disk_pages: int = 0,
        disk_faults: float = 0.0,
    ) -> None:
        self.profile = profile
        self.page_size = page_size
        self.page_bytes = page_size * token_bytes
        self.num_device_pages = num_device_pages
        self.num_host_pages = num_host_pages
        self.num_disk_pages = num_disk_pages
        self.max_context_tokens = max_context_tokens
        self.vocab_size = vocab_size
        self._clock = clock
        self._check_kv = check_kv
        self._random = random.Random(seed)
        self._slow = slow
        self._device = np.full((num_device_pages, page_size), _POISON, dtype=np.uint64)
        self._host = np.full((num_host_pages + num_disk_pages, page_size), _POISON, dtype=np.uint64)
        self._disk_faults = disk_faults
        self._failed: set[MoveId] = set()
        self._flying: list[tuple[float, Move]] = []

    def begin(self, moves: Sequence[Move]) -> None:
        for move in moves:
            copy_s = self.profile.copy_s(len(move.source) * self.page_size, on_disk=self._uses_disk(move))
            delay_s = copy_s * self._random.uniform(1.0, max(1.0, self._slow))
            self._flying.append((self._clock.now() + delay_s, move))
            if move.kind is MoveKind.IN:
                self._device[list(move.target)] = _POISON

    def acknowledged(self, *, wait_s: float = 0.0) -> list[MoveId]:
        if wait_s and self._flying:
            self._clock.advance_to(min(self._clock.now() + wait_s, min(due for due, _ in self._flying)))
        now = self._clock.now()
        done = [move for due, move in self._flying if due <= now]
        self._flying = [(due, move) for due, move in self._flying if due > now]
        for move in done:  # the content arrives at the last moment: a source reused too early shows
            source = self._device if move.kind is MoveKind.OUT else self._host
            target = self._device if move.kind is MoveKind.IN else self._host
            if self._disk_faults and self._uses_disk(move) and self._random.random() < self._disk_faults:
                self._failed.add(move.id)
                target[list(move.target)] = _POISON
            else:
                target[list(move.target)] = source[list(move.source)]
        return [move.id for move in done]

    def _uses_disk(self, move: Move) -> bool:
        below = move.source if move.kind is MoveKind.IN else move.target
        return bool(below) and max(below) >= self.num_host_pages

    def take_failed(self) -> frozenset[MoveId]:
        failed, self._failed = frozenset(self._failed), set()
        return failed

    @property
    def next_copy_at(self) -> float | None:
        """When the next copy in flight completes, None when there is none."""
        return min((due for due, _ in self._flying), default=None)

    def execute(self, slices: Sequence[SliceInput], copies: Sequence[Move]) -> ExecOutput:
        for copy in copies:
            self._device[list(copy.target)] = self._device[list(copy.source)]
        outputs = tuple(self._compute(piece) for piece in slices)
        rows = sum(len(piece.token_ids) for piece in slices)
        pairs = sum(len(piece.token_ids) * (piece.start + len(piece.token_ids) / 2) for piece in slices)
        duration_s = self.profile.forward_s(rows) + pairs * self.profile.attention_s if rows else 0.0
        self._clock.advance(duration_s)
        return ExecOutput(duration_s, outputs)

    def _compute(self, piece: SliceInput) -> SliceOutput:
        if not piece.token_ids:
            raise BrokenInvariant(f"context {piece.context_id}: a slice without rows")
        size = self.page_size
        pages = np.asarray(piece.pages, dtype=np.int64)
        state = 0
        if piece.start:
            last = piece.start - 1
            if self._check_kv:
                slots = self._device[pages[: last // size + 1]].reshape(-1)[: piece.start]
                state = int(np.bitwise_xor.reduce(slots))
            else:
                state = int(self._device[pages[last // size], last % size])
        for offset, token in enumerate(piece.token_ids):
            position = piece.start + offset
            mixed = chain(state, token)
            self._device[pages[position // size], position % size] = mixed
            state = state ^ mixed if self._check_kv else mixed
        sampled = None
        if piece.sampler is not None:
            sampled = SampledToken(state % self.vocab_size)
        return SliceOutput(ContextId(piece.context_id), sampled, scores=tuple(-1.0 for _ in piece.score_targets))

    def close(self) -> None:
        self._flying = []


def expected_token(tokens: Sequence[int], vocab_size: int, *, check_kv: bool = True) -> int:
    """The token SimExecutor samples after ``tokens``: a pure function of the prefix."""
    state = 0
    for token in tokens:
        mixed = chain(state, token)
        state = state ^ mixed if check_kv else mixed
    return state % vocab_size
