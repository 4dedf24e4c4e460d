"""An executor that does everything late and in order, as a GPU's stream does: for tests of the overlapped engine."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from caesura.runtime.executors.base import ExecOutput, Executor, SliceInput, Ticket
from caesura.scheduler.types import TOKEN_TO_COME, ContextId, Move, MoveId


class LateExecutor:
    """Implements ``OverlappingExecutor`` over an executor that does not overlap.

    Steps and copies wait in one queue. Now and then, as ``seed`` draws it, the next one is carried out; what is
    collected is carried out at the latest then, with all before it.
    """

    def __init__(self, inner: Executor, seed: int = 0) -> None:
        self.inner = inner
        self.page_size = inner.page_size
        self.page_bytes = inner.page_bytes
        self.num_device_pages = inner.num_device_pages
        self.num_host_pages = inner.num_host_pages
        self.num_disk_pages = inner.num_disk_pages
        self.max_context_tokens = inner.max_context_tokens
        self.most_under_way = 0
        self.placeholders = 0
        self._random = random.Random(seed)
        self._queue: deque[Callable[[], None]] = deque()
        self._waiting: deque[int] = deque()
        self._outputs: dict[int, ExecOutput] = {}
        self._latest: dict[ContextId, int] = {}
        self._number = 0

    def begin(self, moves: Sequence[Move]) -> None:
        if moves:
            self._queue.append(lambda: self.inner.begin(moves))

    def acknowledged(self, *, wait_s: float = 0.0) -> list[MoveId]:
        self._some()
        if wait_s and not self._waiting:
            self._run_until(lambda: not self._queue)
        return self.inner.acknowledged(wait_s=wait_s)

    def take_failed(self) -> frozenset[MoveId]:
        return self.inner.take_failed()

    def execute(self, slices: Sequence[SliceInput], copies: Sequence[Move]) -> ExecOutput:
        return self.collect(self.launch(slices, copies))

    def launch(self, slices: Sequence[SliceInput], copies: Sequence[Move]) -> Ticket:
        self._number += 1
        number = self._number
        assert len(self._waiting) < 2, "a third step is launched before the first is collected"
        self._waiting.append(number)
        self.most_under_way = max(self.most_under_way, len(self._waiting))
        self._queue.append(lambda: self._carry_out(number, slices, copies))
        self._some()
        return Ticket(number)

    def collect(self, ticket: Ticket) -> ExecOutput:
        assert self._waiting.popleft() == ticket.number, "collected out of order"
        self._run_until(lambda: ticket.number in self._outputs)
        return self._outputs.pop(ticket.number)

    def close(self) -> None:
        self._run_until(lambda: not self._queue)
        self.inner.close()

    def _carry_out(self, number: int, slices: Sequence[SliceInput], copies: Sequence[Move]) -> None:
        filled = []
        for piece in slices:
            tokens = list(piece.token_ids)
            assert TOKEN_TO_COME not in tokens[:-1]
            if tokens[-1] == TOKEN_TO_COME:
                tokens[-1] = self._latest[piece.context_id]
                self.placeholders += 1
            filled.append(replace(piece, token_ids=tokens))
        output = self.inner.execute(filled, copies)
        self._latest = {
            ContextId(out.context_id): out.sampled.token_id for out in output.outputs if out.sampled is not None
        }
        self._outputs[number] = output

    def _some(self) -> None:
        while self._queue and self._random.random() < 0.3:
            self._queue.popleft()()

    def _run_until(self, done: Callable[[], bool]) -> None:
        while not done():
            self._queue.popleft()()
