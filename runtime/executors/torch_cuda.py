"""The executor on a GPU, or on several that share one model. On a CPU it serves to test the same code.

A step is launched and collected: between the two the engine plans the next one. What the next step needs of this one
(the sampled tokens) stays on the device; what the engine needs arrives with an event.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from caesura.runtime.errors import BrokenInvariant
from caesura.runtime.executors.base import ExecOutput, SampledToken, SliceInput, SliceOutput, Ticket
from caesura.runtime.model.cuda.device import Event
from caesura.runtime.model.cuda.layout import Layout, LayoutBuilder
from caesura.runtime.model.cuda.runner import Rows, Runner
from caesura.runtime.model.cuda.sampling import NOT_FINITE, Draw, draw
from caesura.runtime.model.sampler import SampleFailure, sample
from caesura.runtime.sampling import SamplerState
from caesura.scheduler.types import TOKEN_TO_COME, ContextId, Move, MoveId
from torch import Tensor

_HIDDEN_NOT_FINITE = "the model produced hidden states that are not finite numbers"
_LOGITS_NOT_FINITE = "the model produced logits that are not finite numbers"


class Crew(Protocol):
    """The other processes of a model that is split: told of everything before this process does it."""

    def begin(self, moves: Sequence[Move], done: Sequence[MoveId]) -> None: ...

    def step(self, layout: Layout | None, copies: Sequence[Move], done: Sequence[MoveId]) -> None: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _Launched:
    """A step under way, with what arrives on the host by the time its event has passed."""

    ticket: Ticket
    slices: Sequence[SliceInput]
    begun: float
    arrived: Event
    layout: Layout | None = None
    rows: Rows | None = None
    ids: Tensor | None = None  # [sampled rows] int64
    finite: Tensor | None = None  # [rows] bool
    host_logits: Tensor | None = None  # [rows sampled on the host, vocab]
    scores: Sequence[tuple[Tensor, Tensor | None, Tensor | None]] = ()  # logprobs, top ids, top logprobs


class CudaExecutor:
    """Implements ``OverlappingExecutor``."""

    def __init__(
        self, runner: Runner, *, eos_ids: Iterable[int], vocab_limit: int | None = None, crew: Crew | None = None
    ) -> None:
        """``eos_ids`` are banned until a generation's ``min_new_tokens``; ids from ``vocab_limit`` on are never
        sampled."""
        self.runner = runner
        arena, config = runner.arena, runner.decoder.config
        self.page_size = runner.cache.page_size
        self.page_bytes = arena.page_bytes * runner.group.size
        self.num_device_pages = arena.num_device_pages
        self.num_host_pages = arena.num_host_pages
        self.num_disk_pages = arena.num_disk_pages
        self.max_context_tokens = config.max_context_tokens
        self._crew = crew
        self._device = runner.device
        self._layouts = LayoutBuilder(self.page_size, self.num_device_pages, config.vocab_size)
        self._vocab_limit = min(vocab_limit or config.vocab_size, config.vocab_size)
        self._eos_ids = frozenset(eos_ids)
        ending = [token for token in self._eos_ids if token < self._vocab_limit]
        self._eos = torch.tensor(ending, dtype=torch.int64, device=self._device.torch)
        self._before: dict[ContextId, int] = {}  # places of the tokens that the last launched step samples
        self._launched: deque[_Launched] = deque()
        self._done: list[MoveId] = []  # acknowledged here, and the crew has yet to hear of it
        self._number = 0

    # -- copies -----------------------------------------------------------------------------------------------

    def begin(self, moves: Sequence[Move]) -> None:
        """See the protocol."""
        if not moves:
            return
        self._device.bind()
        if self._crew is not None:
            self._crew.begin(moves, self._take_done())
        self.runner.arena.begin(moves)

    def acknowledged(self, *, wait_s: float = 0.0) -> list[MoveId]:
        """See the protocol."""
        done = self.runner.arena.acknowledged(wait_s=wait_s)
        if self._crew is not None:
            self._done += done
        return done

    def take_failed(self) -> frozenset[MoveId]:
        """See the protocol."""
        return self.runner.arena.take_failed()

    def close(self) -> None:
        """See the protocol."""
        self._launched.clear()
        if self._crew is not None:
            self._device.synchronize()  # sums under way need the others
            self.runner.graphs = None  # a group cannot end while graphs hold its sums
            self._crew.close()
        self.runner.close()

    # -- steps ------------------------------------------------------------------------------------------------

    def execute(self, slices: Sequence[SliceInput], copies: Sequence[Move]) -> ExecOutput:
        """See the protocol. Raises BrokenInvariant for page tables or token ids out of range."""
        return self.collect(self.launch(slices, copies))

    @torch.inference_mode()
    def launch(self, slices: Sequence[SliceInput], copies: Sequence[Move]) -> Ticket:
        """See the protocol. Raises BrokenInvariant for page tables or token ids out of range."""
        begun = time.perf_counter()
        self._device.bind()
        self._number += 1
        ticket = Ticket(self._number)
        layout = self._layouts.build(slices, self._before) if slices else None
        self._check_targets(slices)
        if self._crew is not None:
            self._crew.step(layout, copies, self._take_done())
        if layout is None:
            self.runner.arena.copy_within(copies)
            self._before = {}
            self._launched.append(_Launched(ticket, (), begun, self._device.record()))
            return ticket
        rows = self.runner.run(layout, copies)
        step = _Launched(ticket, slices, begun, self._device.record(), layout, rows)
        self._score(step)
        self._sample(step)
        step.finite = self._device.receive(rows.finite)
        step.arrived = self._device.record()
        self._launched.append(step)
        return ticket

    @torch.inference_mode()
    def collect(self, ticket: Ticket) -> ExecOutput:
        """See the protocol."""
        while self._launched and self._launched[0].ticket.number < ticket.number:
            self._launched.popleft()  # its owner gave up on it
        if not self._launched or self._launched[0].ticket != ticket:
            raise BrokenInvariant(f"step {ticket.number} is collected, but it is not under way")
        self._device.bind()
        step = self._launched.popleft()
        step.arrived.synchronize()
        outputs = self._outputs(step) if step.layout is not None else ()
        return ExecOutput(time.perf_counter() - step.begun, outputs)

    # -- parts ------------------------------------------------------------------------------------------------

    def _take_done(self) -> list[MoveId]:
        done, self._done = self._done, []
        return done

    def _check_targets(self, slices: Sequence[SliceInput]) -> None:
        vocab = self.runner.decoder.config.vocab_size
        for piece in slices:
            if piece.score_targets and not all(0 <= token < vocab for _, token in piece.score_targets):
                raise BrokenInvariant(f"context {piece.context_id}: a score target lies outside the vocabulary")

    def _sample(self, step: _Launched) -> None:
        """Draw on the device what can be drawn there; fetch the logits of the rest."""
        sampling = [piece for piece in step.slices if piece.sampler is not None]
        self._before = {}
        if not sampling or step.rows is None:
            return
        states: list[SamplerState] = [piece.sampler for piece in sampling if piece.sampler is not None]
        logits = step.rows.logits[:, : self._vocab_limit]
        on_host = [index for index, state in enumerate(states) if state.needs_history]
        if on_host:
            step.host_logits = self._device.receive(logits[on_host])
        if len(on_host) < len(states) or self._crew is not None:
            positions = [
                state.num_generated + (piece.token_ids[-1] == TOKEN_TO_COME)
                for piece, state in zip(sampling, states, strict=True)
            ]
            ids = draw(logits, Draw(states, positions), self._eos, self.runner.kernels, self._device)
            self.runner.keep(ids)
            step.ids = self._device.receive(ids)
            self._before = {
                piece.context_id: place for place, piece in enumerate(sampling) if not states[place].needs_history
            }

    def _score(self, step: _Launched) -> None:
        """Logprobs (temperature 1) of the slices' ``score_targets``, in their order, and the likeliest instead."""
        if step.layout is None or step.rows is None or not len(step.layout.scored):
            return
        tokens = [token for piece in step.slices for _, token in piece.score_targets]
        count_top = min(max(piece.score_top for piece in step.slices), self._vocab_limit)
        scores: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
        first = 0
        for logits in self.runner.score_logits(step.layout, step.rows):
            part = torch.tensor(tokens[first : first + len(logits)], device=logits.device)
            first += len(logits)
            norm = logits.logsumexp(dim=-1)
            picked = self._device.receive(logits.gather(1, part[:, None])[:, 0] - norm)
            if count_top:
                top = (logits[:, : self._vocab_limit] - norm[:, None]).topk(count_top, dim=-1)
                scores.append((picked, self._device.receive(top.indices), self._device.receive(top.values)))
            else:
                scores.append((picked, None, None))
        step.scores = scores

    def _outputs(self, step: _Launched) -> tuple[SliceOutput, ...]:
        assert step.layout is not None and step.finite is not None
        broken = self._broken(step.layout, step.finite)
        drawn = self._drawn(step)
        values = [value for picked, _, _ in step.scores for value in picked.tolist()]
        tops = [
            tuple(zip(ids, logprobs, strict=True))
            for _, top_ids, top_values in step.scores
            if top_ids is not None and top_values is not None
            for ids, logprobs in zip(top_ids.tolist(), top_values.tolist(), strict=True)
        ]
        outputs = []
        first = 0
        for index, piece in enumerate(step.slices):
            last = first + len(piece.score_targets)
            outcome = next(drawn) if piece.sampler is not None else None
            scores = tuple(values[first:last])
            best = tuple(row[: piece.score_top] for row in tops[first:last]) if piece.score_top else ()
            first = last
            if index in broken:
                outputs.append(SliceOutput(piece.context_id, None, failure=_HIDDEN_NOT_FINITE))
            elif isinstance(outcome, SampleFailure):
                outputs.append(SliceOutput(piece.context_id, None, scores, outcome.reason, best))
            else:
                outputs.append(SliceOutput(piece.context_id, outcome, scores, score_tops=best))
        return tuple(outputs)

    def _drawn(self, step: _Launched) -> Iterator[SampledToken | SampleFailure]:
        """Outcomes of the slices that sample, in order."""
        states = [piece.sampler for piece in step.slices if piece.sampler is not None]
        on_host = [state for state in states if state.needs_history]
        outcomes = iter(sample(step.host_logits, on_host, self._eos_ids)) if step.host_logits is not None else iter(())
        ids = step.ids.tolist() if step.ids is not None else [NOT_FINITE] * len(states)
        for state, token in zip(states, ids, strict=True):
            if state.needs_history:
                yield next(outcomes)
            else:
                yield SampledToken(token) if token != NOT_FINITE else SampleFailure(_LOGITS_NOT_FINITE)

    def _broken(self, layout: Layout, finite: Tensor) -> frozenset[int]:
        """Slices with NaN or infinity."""
        if bool(finite.all()):
            return frozenset()
        ends = layout.row_ends
        return frozenset(i for i in range(layout.num_pieces) if not bool(finite[ends[i] : ends[i + 1]].all()))
