"""The six augmentations of InferCept (arXiv 2402.01869, table 1), and their mix in equal parts.

Given by the paper and its trace: pauses per request, seconds per call (mean and standard deviation over calls, chat and
the human turns of image and speech clipped at 60 s), first prompt and returned tokens, contexts cut at the models'
2,048 tokens. Not given and assumed: tokens generated between two calls (means of the published trace, rounded) and the
shape of the distributions between the given moments.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from benchmarks.workloads.draw import choice, lognormal, normal, tokens
from benchmarks.workloads.model import Draw, Program, Segment

MAX_CONTEXT_TOKENS = 2048
HUMAN_LIMIT_S = 60.0


def human_s(source: random.Random) -> float:
    """Reading and typing: median 20.8 s, mean 28, clipped at a minute."""
    return min(HUMAN_LIMIT_S, max(3.0, source.lognormvariate(3.035, 1.0)))


def _math(source: random.Random) -> Program:
    count = choice(source, {1: 0.28, 2: 0.10, 3: 0.15, 4: 0.47})
    calls = [
        Segment(
            tokens(source, 113, 131, 10, 800),
            "calculator",
            normal(source, 8.3e-5, 4.8e-5, 1e-5),
            round(normal(source, 21, 5, 10)),
        )
        for _ in range(count)
    ]
    return _program("math", round(normal(source, 405, 17, 350)), [*calls, Segment(tokens(source, 113, 131, 10, 800))])


def _qa(source: random.Random) -> Program:
    count = choice(source, {1: 0.18, 2: 0.12, 3: 0.18, 4: 0.52})
    calls = [
        Segment(
            tokens(source, 211, 163, 30, 900),
            "wikipedia",
            normal(source, 0.709, 0.209, 0.05, 1.03),
            round(normal(source, 57, 9, 30)),
        )
        for _ in range(count)
    ]
    return _program("qa", round(normal(source, 934, 7, 900)), [*calls, Segment(tokens(source, 211, 163, 30, 900))])


def _virtual_env(source: random.Random) -> Program:
    count = choice(source, {4: 0.10, 5: 0.30, 6: 0.30, 7: 0.30})
    calls = [
        Segment(4, "environment", normal(source, 0.0851, 0.0147, 0.04), round(normal(source, 9, 10, 0)))
        for _ in range(count)
    ]
    return _program("virtual_env", 1973, calls)


def _first_words(source: random.Random) -> int:
    return min(1200, max(2, round(source.lognormvariate(3.26, 1.73))))  # median 26, mean about 117 before the cut


def _chat(source: random.Random) -> Program:
    count = choice(source, {1: 0.22, 2: 0.17, 3: 0.15, 4: 0.14, 5: 0.13, 6: 0.11, 7: 0.08})
    calls = [
        Segment(tokens(source, 116, 130, 8, 900), "human", human_s(source), tokens(source, 42, 55))
        for _ in range(count)
    ]
    return _program("chat", _first_words(source), [*calls, Segment(tokens(source, 116, 130, 8, 900))])


def _two_step(kind: str, tool: str, tool_s: Callable[[random.Random], float]) -> Callable[[random.Random], Program]:
    """A model's answer (a picture, speech), then what the person says to it: this is why the pauses are bimodal."""

    def draw(source: random.Random) -> Program:
        rounds = choice(source, {1: 0.22, 2: 0.16, 3: 0.16, 4: 0.14, 5: 0.12, 6: 0.11, 7: 0.09})
        segments = []
        for _ in range(rounds):
            segments.append(Segment(64, tool, tool_s(source), 8))
            segments.append(Segment(7, "human", human_s(source), tokens(source, 40, 60)))
        return _program(kind, _first_words(source), segments)

    return draw


def _program(kind: str, prompt_tokens: int, segments: list[Segment]) -> Program:
    """Cut where the model's context ends."""
    kept, used = [], prompt_tokens
    for segment in segments:
        used += segment.generate_tokens
        if used > MAX_CONTEXT_TOKENS:
            room = segment.generate_tokens - (used - MAX_CONTEXT_TOKENS)
            kept.append(Segment(max(1, room)))
            break
        kept.append(segment)
        used += segment.tool_tokens
        if used >= MAX_CONTEXT_TOKENS:
            break
    return Program(kind, prompt_tokens, tuple(kept))


KINDS: dict[str, Callable[[random.Random], Program]] = {
    "math": _math,
    "qa": _qa,
    "virtual_env": _virtual_env,
    "chat": _chat,
    "image": _two_step("image", "image_model", lambda source: normal(source, 10.8, 0.9, 8.0)),
    "tts": _two_step("tts", "speech_model", lambda source: lognormal(source, 6.1, 2.6)),
}


def single(kind: str) -> Draw:
    """One kind alone."""
    return lambda source, progress: KINDS[kind](source)


def mix(shared_tokens: int = 0) -> Draw:
    """All six in equal parts; each kind is an application with a system prompt of ``shared_tokens``."""

    def draw(source: random.Random, progress: float) -> Program:
        program = KINDS[source.choice(tuple(KINDS))](source)
        if not shared_tokens:
            return program
        return Program(program.kind, program.prompt_tokens, program.segments, program.kind, shared_tokens)

    return draw
