"""Agents of today: coding sessions with long contexts, trees of sub-agents, tools that change, tools that hang."""

from __future__ import annotations

import math
import random

from benchmarks.workloads.draw import lognormal, normal, tokens
from benchmarks.workloads.model import Branch, Program, Segment

CODING_SCALE = 4  # lengths of published sessions are divided by this, so that several of them fit one pool
HANG_SHARE = 0.05
HANG_DEADLINE_S = 120.0


def shell_s(source: random.Random) -> float:
    """A tool call of a coding agent: 0.9 s in the mean; one call in forty holds two thirds of the time."""
    if source.random() < 0.025:
        return lognormal(source, 25.0, 15.0)
    return lognormal(source, 0.31, 0.4)


def coding(source: random.Random, progress: float) -> Program:
    """About 11 turns; contexts end at 20,000 to 70,000 tokens, 10,000 of them a shared preamble, all over four."""
    turns = max(3, round(normal(source, 10.9, 2.1, 3)))
    final = source.uniform(20_000, 70_000) / CODING_SCALE
    preamble, issue = 10_000 // CODING_SCALE, tokens(source, 2000 / CODING_SCALE, 1200 / CODING_SCALE, 50, 2000)
    written = [tokens(source, 320 / CODING_SCALE, 240 / CODING_SCALE, 10, 400) for _ in range(turns + 1)]
    room = max(turns * 20.0, final - preamble - issue - sum(written))
    weights = [lognormal(source, 1.0, 1.0) for _ in range(turns)]
    results = [max(5, round(room * weight / sum(weights))) for weight in weights]
    segments = [Segment(written[turn], "shell", shell_s(source), results[turn]) for turn in range(turns)]
    return Program("coding", issue, (*segments, Segment(written[-1])), "coding", preamble)


def _sub_agent(source: random.Random, depth: int) -> Branch:
    segments = [
        Segment(
            tokens(source, 50, 25, 8, 200), "search", lognormal(source, 2.0, 2.0), tokens(source, 300, 150, 30, 900)
        )
        for _ in range(source.randint(2, 4))
    ]
    if depth < 2 and source.random() < 0.3:
        helpers = tuple(_sub_agent(source, depth + 1) for _ in range(2))
        segments.append(Segment(30, branches=helpers, tool_tokens=160))
    segments.append(Segment(tokens(source, 80, 30, 20, 200)))
    return Branch(tokens(source, 60, 20, 20, 200), tuple(segments))


def forks(source: random.Random, progress: float) -> Program:
    """A planner that sends out two to five sub-agents, reads what they bring, and often does so again."""
    segments = []
    for _ in range(1 + (source.random() < 0.5)):
        branches = tuple(_sub_agent(source, 1) for _ in range(source.randint(2, 5)))
        segments.append(Segment(tokens(source, 80, 40, 20, 300), branches=branches, tool_tokens=80 * len(branches)))
    segments.append(Segment(tokens(source, 200, 100, 40, 600)))
    return Program("forks", tokens(source, 1500, 700, 200, 5000), tuple(segments), "forks", 1024)


def _office(source: random.Random, fast_s: float, slow_s: float) -> list[Segment]:
    """Six calls of two tools, one of which takes its time."""
    segments = []
    for _ in range(max(2, round(normal(source, 6, 2, 2, 12)))):
        tool, mean_s = ("lookup", fast_s) if source.random() < 0.5 else ("report", slow_s)
        tool_s = lognormal(source, mean_s, 0.6 * mean_s)
        segments.append(Segment(tokens(source, 60, 40, 5, 300), tool, tool_s, tokens(source, 150, 100, 10, 800)))
    segments.append(Segment(tokens(source, 120, 60, 20, 400)))
    return segments


def shift(source: random.Random, progress: float) -> Program:
    """Half-way through the run the fast tool becomes the slow one and the slow one the fast one."""
    fast_s, slow_s = (0.5, 20.0) if progress < 0.5 else (20.0, 0.5)
    return Program("shift", tokens(source, 800, 400, 100, 3000), tuple(_office(source, fast_s, slow_s)), "office", 512)


def hang(source: random.Random, progress: float) -> Program:
    """One program in twenty waits for a tool that never answers, until a deadline closes it."""
    segments = _office(source, 0.5, 20.0)
    if source.random() < HANG_SHARE:
        at = source.randrange(len(segments) - 1)
        lost = segments[at]
        stuck = Segment(lost.generate_tokens, lost.tool, math.inf, 0, deadline_s=HANG_DEADLINE_S, hint_s=lost.hint_s)
        segments = [*segments[:at], stuck]
    return Program("hang", tokens(source, 800, 400, 100, 3000), tuple(segments), "office", 512)


def turns(source: random.Random, progress: float) -> Program:
    """Ten tool calls with two dozen tokens between them: many pauses and little else."""
    segments = [
        Segment(tokens(source, 24, 12, 4, 80), "search", lognormal(source, 2.0, 2.0), tokens(source, 40, 20, 5, 150))
        for _ in range(10)
    ]
    return Program("turns", tokens(source, 300, 150, 50, 1200), (*segments, Segment(tokens(source, 24, 12, 4, 80))))
