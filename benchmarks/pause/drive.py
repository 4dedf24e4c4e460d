"""Plays the programs of a workload on an engine: the same code in virtual and in real time.

A program is on its way in one of two states at every moment: *served* (at least one of its branches wants the engine)
or *away* (all that is open waits for tools). Only the first counts in its latency, so for a program without branches
that is InferCept's ``end - arrival - total tool time``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from caesura.runtime.engine import Engine
from caesura.runtime.generation import TokenChunk
from caesura.runtime.sim import Simulation, counted
from caesura.scheduler.context import Call
from caesura.scheduler.types import ContextId

from benchmarks.workloads import MAX_SHARED, Arrival, Branch, Program, Segment, every_segment

MAX_OPEN = 20_000  # programs at once: beyond this the run has left every useful region
SHARED_IDS = 64  # token ids of one shared prompt
FIRST_OWN_ID = 2


@dataclass(slots=True, eq=False)
class Record:
    """What happened to one program. Seconds are of the run's clock."""

    number: int
    arrival_s: float
    program: Program
    first_token_s: float | None = None
    end_s: float | None = None
    lost: bool = False  # closed by a deadline
    away_s: float = 0.0  # spent away until now, the present absence not counted
    away_since: float | None = None
    started_tokens: int = 0  # of all segments begun until now
    returned_tokens: int = 0  # what tools and branches have answered
    resumed_s: list[float] = field(default_factory=list)  # seconds from a tool's answer to the next token
    waiting: dict[ContextId, float] = field(default_factory=dict)  # branches before their next token, and since when
    longest_wait_s: float = 0.0

    def served_s(self, now: float) -> float:
        """Seconds of the program's life until now in which it was not merely waiting for tools."""
        end = self.end_s if self.end_s is not None else now
        away = self.away_s + (max(0.0, end - self.away_since) if self.away_since is not None else 0.0)
        return end - self.arrival_s - away

    def wait_s(self, now: float) -> float:
        """The longest time that a branch has waited for its next token, those still waiting included."""
        return max(self.longest_wait_s, max((now - since for since in self.waiting.values()), default=0.0))


class Load:
    """All programs of a run. ``arrivals`` is endless; they are let in one by one until ``close``.

    ``alone``: each is let in only when the one before has ended, so that it has the machine to itself.
    """

    def __init__(
        self,
        engine: Engine,
        simulation: Simulation,
        arrivals: Iterator[Arrival],
        *,
        tool_scale: float = 1.0,
        vocab_size: int = 1 << 30,
        alone: bool = False,
    ) -> None:
        self.engine = engine
        self.simulation = simulation
        self.records: list[Record] = []
        self.open: dict[int, Record] = {}
        self.generated_tokens = 0  # in segments that have ended
        self.overrun = False  # stopped, for more programs were open than a run can have
        self._arrivals = arrivals
        self._tool_scale = tool_scale
        self._alone = alone
        self._closed = False
        self._begun_s = simulation.clock.now()
        self._shared: dict[tuple[str, int], list[int]] = {}
        self._first_shared_id = vocab_size - MAX_SHARED * SHARED_IDS
        self._ids = itertools.cycle(range(FIRST_OWN_ID, self._first_shared_id))

    def start(self) -> None:
        """Wait for the first arrival."""
        self._await_next()

    def close(self) -> None:
        """Let nobody in any more."""
        self._closed = True

    def _await_next(self) -> None:
        arrival = next(self._arrivals)
        at_s = self._begun_s + arrival.at_s
        if self._alone:  # its moment may have passed while the one before was there
            at_s = max(at_s, self.simulation.clock.now())
        self.simulation.at(at_s, lambda: self._arrive(arrival, at_s))

    def _arrive(self, arrival: Arrival, at_s: float) -> None:
        if self._closed:
            return
        record = Record(arrival.number, at_s, arrival.program)
        self.records.append(record)
        self.open[arrival.number] = record
        if len(self.open) > MAX_OPEN:
            self.overrun = True
            self.simulation.stop()
            return
        _Play(self, record).start()
        if not self._alone:
            self._await_next()

    def own_token(self) -> int:
        """A token id that no other branch of the run has (on a real model: none of the last tens of thousands)."""
        return next(self._ids)

    def shared_prompt(self, name: str, num_tokens: int) -> list[int]:
        """The system prompt of this name: the same tokens whenever it is asked for."""
        if not num_tokens:
            return []
        tokens = self._shared.get((name, num_tokens))
        if tokens is None:
            if len(self._shared) == MAX_SHARED:
                raise ValueError(
                    f"the workload has more than {MAX_SHARED} shared prompts; give fewer programs `shared`"
                )
            first = self._first_shared_id + len(self._shared) * SHARED_IDS
            tokens = self._shared[name, num_tokens] = [first + position % 61 for position in range(num_tokens)]
        return tokens

    def finish(self, record: Record, *, lost: bool) -> None:
        """A program has come to its end."""
        record.end_s = self.simulation.clock.now()
        record.lost = lost
        record.waiting.clear()
        del self.open[record.number]
        if self._alone:
            self._await_next()

    def tool_s(self, segment: Segment) -> float:
        """How long the tool of a segment takes in this run."""
        return segment.tool_s * self._tool_scale if math.isfinite(segment.tool_s) else segment.tool_s

    def branch_s(self, branch: Branch) -> float:
        """What the tools of a branch take together: all of its duration that is known beforehand."""
        return sum(self.tool_s(segment) for segment in every_segment(branch.segments))

    def scaled_s(self, seconds: float | None) -> float | None:
        """A hint or a deadline, if there is one, where tools take that much of their time."""
        return None if seconds is None else seconds * self._tool_scale


class _Play:
    """One program."""

    def __init__(self, load: Load, record: Record) -> None:
        self.load = load
        self.record = record
        self.active = 0  # branches that want the engine

    def start(self) -> None:
        program = self.record.program
        engine = self.load.engine
        prompt = self.load.shared_prompt(program.shared, program.shared_tokens)
        _Strand(self, None, program.segments, self._end).begin(
            engine.open, [*prompt, *[self.load.own_token()] * program.prompt_tokens]
        )

    def enter(self) -> None:
        """A branch wants the engine."""
        record = self.record
        self.active += 1
        if self.active == 1 and record.away_since is not None:
            record.away_s += self.load.simulation.clock.now() - record.away_since
            record.away_since = None

    def leave(self) -> None:
        """A branch waits for a tool, or is done."""
        self.active -= 1
        if self.active == 0:
            self.record.away_since = self.load.simulation.clock.now()

    def _end(self, lost: bool) -> None:
        self.load.finish(self.record, lost=lost)


class _Strand:
    """One branch of a program: its context and the segments still to come."""

    def __init__(
        self, play: _Play, parent: ContextId | None, segments: tuple[Segment, ...], done: Callable[[bool], None]
    ) -> None:
        self._play = play
        self._engine = play.load.engine
        self._clock = play.load.simulation.clock
        self._segments = segments
        self._at = 0
        self._done = done
        self._answered_s: float | None = None
        self._alive = True
        self._away = False  # waiting for a tool or for branches
        self._generating = False
        self._children: list[_Strand] = []
        self._token = 0
        self.context = ContextId(-1)

    def begin(self, opener: Callable[..., ContextId], prompt: list[int]) -> None:
        self.context = opener(on_closed=self._closed)
        self._token = prompt[-1] if prompt else self._play.load.own_token()
        self._play.enter()
        self._generate(prompt)

    def _generate(self, tokens: list[int]) -> None:
        segment, record = self._segments[self._at], self._play.record
        if tokens:
            self._engine.append(self.context, tokens)
        record.waiting[self.context] = self._clock.now()
        self._generating = True
        record.started_tokens += segment.generate_tokens
        generation = counted(self._engine, self.context, segment.generate_tokens, self._generated, self._first)
        self._engine.generate(self.context, generation)

    def _first(self) -> None:
        """The first token of a segment."""
        now, record = self._clock.now(), self._play.record
        waited = now - record.waiting.pop(self.context)
        record.longest_wait_s = max(record.longest_wait_s, waited)
        if record.first_token_s is None:
            record.first_token_s = now
        if self._answered_s is not None:
            record.resumed_s.append(now - self._answered_s)
            self._answered_s = None

    def _generated(self, chunk: TokenChunk) -> None:
        if chunk.finish is None or chunk.finish.reason == "abort" or not self._alive:
            return
        self._generating = False
        segment = self._segments[self._at]
        self._play.load.generated_tokens += segment.generate_tokens
        if segment.branches:
            self._branch(segment)
        elif segment.tool:
            self._call(segment)
        else:
            self._play.load.simulation.at(self._clock.now(), lambda: self._advance(segment.tool_tokens))

    def _call(self, segment: Segment) -> None:
        load, now = self._play.load, self._clock.now()
        deadline_s = load.scaled_s(segment.deadline_s)
        tool_s = load.tool_s(segment)
        call = Call(segment.tool, load.scaled_s(segment.hint_s), tool_s)
        self._pause([call], now + deadline_s if deadline_s is not None else None)
        if math.isfinite(tool_s):
            load.simulation.at(now + tool_s, lambda: self._answer(segment))

    def _pause(self, calls: list[Call], deadline_at: float | None = None, *, wait_any: bool = False) -> None:
        self._engine.pause(self.context, calls, wait_any=wait_any, deadline_at=deadline_at)
        self._away = True
        self._play.leave()

    def _answer(self, segment: Segment) -> None:
        """The tool has answered."""
        if not self._alive:
            return
        self._away = False
        self._play.enter()
        self._play.record.returned_tokens += segment.tool_tokens
        self._answered_s = self._clock.now()
        self._advance(segment.tool_tokens)

    def _advance(self, result_tokens: int) -> None:
        if not self._alive:
            return
        self._at += 1
        if self._at < len(self._segments):
            self._generate([self._token] * result_tokens)
            return
        self._alive = False
        self._engine.close(self.context)
        self._play.leave()
        self._done(False)

    def _branch(self, segment: Segment) -> None:
        """Fork every branch off as the context is now, then wait for all of them, or for the first."""
        load, left = self._play.load, len(segment.branches)
        self._children = []

        def one_done(lost: bool) -> None:
            nonlocal left
            left -= 1
            if self._alive and left == (len(segment.branches) - 1 if segment.wait_any else 0):
                for child in self._children:
                    child.drop()
                self._answer(segment)

        def begin() -> None:
            if not self._alive:  # dropped at this very moment by a branch that was first
                return
            for branch in segment.branches:
                child = _Strand(self._play, self.context, branch.segments, one_done)
                self._children.append(child)
                fork = lambda on_closed: self._engine.fork(self.context, on_closed)  # noqa: E731
                child.begin(fork, [self._play.load.own_token()] * max(1, branch.prompt_tokens))
            calls = [Call("sub_agent", None, load.branch_s(branch)) for branch in segment.branches]
            self._pause(calls, wait_any=segment.wait_any)

        load.simulation.at(self._clock.now(), begin)

    def drop(self) -> None:
        """Nobody waits for this branch any more."""
        if self._alive:
            self._give_up()
            self._engine.close(self.context)

    def _closed(self, reason: Exception) -> None:
        """The engine closed the context: a deadline has passed."""
        self._give_up()
        self._done(True)

    def _give_up(self) -> None:
        """Nothing more comes of this branch nor of those below; what it was generating does not count."""
        record = self._play.record
        self._alive = False
        record.waiting.pop(self.context, None)
        if self._generating:
            record.started_tokens -= self._segments[self._at].generate_tokens
        for child in self._children:
            child.drop()
        if not self._away:
            self._play.leave()
