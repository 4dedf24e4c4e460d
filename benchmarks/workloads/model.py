"""What a workload is: programs that generate, wait and go on, and when they arrive. Plain frozen data.

A workload is a *recipe*: ``draw(random, progress)`` makes the next program from its own random numbers alone, so the
n-th program of a seed is the same at every rate and under every policy. ``progress`` is 0 at the beginning of the run
and 1 at its end, for workloads that change on the way.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MAX_SHARED = 64  # shared prompts of a workload


@dataclass(frozen=True, slots=True)
class Segment:
    """Generate, then wait: for a tool (``tool_s`` seconds, infinite for one that never returns), or for branches.

    The result is ``tool_tokens`` long. A segment without a tool and branches goes on at once, or ends the program.
    ``hint_s`` is what the program says the tool will take; ``deadline_s`` closes the context when it has not
    answered by then.
    """

    generate_tokens: int
    tool: str = ""
    tool_s: float = 0.0
    tool_tokens: int = 0
    hint_s: float | None = None
    deadline_s: float | None = None
    branches: tuple[Branch, ...] = ()
    wait_any: bool = False

    @property
    def waits(self) -> bool:
        """Something happens outside before the program can go on."""
        return bool(self.tool or self.branches)


@dataclass(frozen=True, slots=True)
class Branch:
    """A sub-agent: a fork of the context as it is, with its own instruction and its own segments."""

    prompt_tokens: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """One request of a workload. ``shared_tokens`` of system prompt are the same for all with the same ``shared``."""

    kind: str
    prompt_tokens: int
    segments: tuple[Segment, ...]
    shared: str = ""
    shared_tokens: int = 0

    @property
    def output_tokens(self) -> int:
        """Tokens generated in all segments of all branches."""
        return sum(segment.generate_tokens for segment in every_segment(self.segments))

    @property
    def pauses(self) -> int:
        """Segments that end in a wait."""
        return sum(segment.waits for segment in every_segment(self.segments))

    @property
    def may_be_lost(self) -> bool:
        """A deadline may close it."""
        return any(segment.deadline_s is not None for segment in every_segment(self.segments))

    @property
    def final_tokens(self) -> int:
        """Length of the program's own context at its end."""
        own = sum(segment.generate_tokens + segment.tool_tokens for segment in self.segments)
        return self.shared_tokens + self.prompt_tokens + own


def every_segment(segments: tuple[Segment, ...]) -> Iterator[Segment]:
    """The segments and those of all branches below."""
    for segment in segments:
        yield segment
        for branch in segment.branches:
            yield from every_segment(branch.segments)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A program and the second it arrives."""

    number: int
    at_s: float
    program: Program


Draw = Callable[[random.Random, float], Program]


@dataclass(frozen=True, slots=True)
class Workload:
    """A named recipe. ``describe`` is one sentence for reports."""

    name: str
    describe: str
    draw: Draw

    def arrivals(self, rate_rps: float, minutes: float, seed: int) -> Iterator[Arrival]:
        """Poisson arrivals, without end; ``progress`` stays 1 after ``minutes``.

        The same seed at another rate gives the same programs with the gaps stretched: comparisons share their luck.
        """
        expected = rate_rps * minutes * 60
        for number, at_s in enumerate(self.moments(rate_rps, seed)):
            source = random.Random(f"{self.name}/{seed}/{number}")
            yield Arrival(number, at_s, self.draw(source, min(1.0, number / expected)))

    def moments(self, rate_rps: float, seed: int) -> Iterator[float]:
        """The seconds at which programs arrive, without end."""
        if not (rate_rps > 0 and math.isfinite(rate_rps)):
            raise ValueError(f"the rate is {rate_rps}; it must be a positive number of requests per second")
        gaps = random.Random(f"{self.name}/{seed}/gaps")
        at_s = 0.0
        while True:
            at_s += gaps.expovariate(1.0) / rate_rps
            yield at_s
