"""What every system is asked to do, in the standard library alone: this runs inside the peers' own environments.

Prompts are random token ids, decoding is greedy, lengths are fixed, end-of-sequence is ignored. The same seed gives
every system the same prompts, and no two seeds share more than chance.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

PROMPT_TOKENS = 512
NEW_TOKENS = 128
BATCH = 16
LONG_PROMPT_TOKENS = 2048
FIRST_ID, LAST_IDS = 300, 64  # ids at both ends of a vocabulary are special ones


@dataclass(frozen=True, slots=True)
class Agents:
    """Agents that share a beginning and go round: generate, wait for a tool, read its result."""

    count: int = 16
    prefix_tokens: int = 512
    own_tokens: int = 128
    rounds: int = 4
    new_tokens: int = 32
    tool_tokens: int = 64
    tool_s: float = 0.2
    arrival_s: float = 0.0  # mean time between two arrivals; 0: all at once

    @property
    def most_tokens(self) -> int:
        """Length of a context at its end."""
        return self.prefix_tokens + self.own_at(self.rounds - 1) + self.new_tokens

    def own_at(self, number: int) -> int:
        """Tokens of an agent beyond the prefix when round ``number`` begins to generate."""
        return self.own_tokens + number * (self.new_tokens + self.tool_tokens)


AGENTS = Agents()
CROWD = Agents(count=64, arrival_s=0.4)
SMALL_POOL_TOKENS = 2560


@dataclass(frozen=True, slots=True)
class Scenario:
    """One column of the comparison. ``metric`` is the figure that counts; ``pool`` says how much KV there is."""

    name: str
    title: str
    metric: str
    pool: str  # ample | tiered: a small device pool, ample host memory | short: a small pool is all there is
    agents: Agents | None = None


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("a", "one stream, prompt 512, 128 new: decode", "decode_tok_s", "ample"),
        Scenario("b", "16 at once, prompt 512, 128 new: output", "out_tok_s", "ample"),
        Scenario("c", "prefill of 2048", "prefill_tok_s", "ample"),
        Scenario("d", "16 agents, shared prefix, 4 rounds: output", "out_tok_s", "ample", AGENTS),
        Scenario("e", "d with a KV pool of 2,560 tokens, host memory beside it", "out_tok_s", "tiered", AGENTS),
        Scenario("e2", "64 agents over time, 2,560 tokens of KV in all", "out_tok_s", "short", CROWD),
    )
}


@dataclass(frozen=True, slots=True)
class Reply:
    """New tokens, and how many of the prompt's were found in a cache (None: the system does not say)."""

    tokens: list[int]
    cached: int | None = None


class Session(Protocol):
    """One conversation with a system."""

    async def turn(self, token_ids: list[int], new_tokens: int) -> Reply:
        """Append ``token_ids``, generate ``new_tokens`` more."""

    async def tool_begins(self) -> None:
        """A tool will run until the next turn."""

    async def close(self) -> None:
        """No more turns."""


class System(Protocol):
    """A running engine."""

    def about(self) -> dict[str, str]:
        """Versions and settings that the figures depend on."""

    async def session(self) -> Session:
        """A conversation that begins empty."""

    async def close(self) -> None:
        """Stop it."""


class Transcript:
    """A session with a system that keeps none: the whole conversation is sent at every turn."""

    def __init__(self, complete: Callable[[list[int], int], Awaitable[Reply]]) -> None:
        self._complete = complete
        self._tokens: list[int] = []

    async def turn(self, token_ids: list[int], new_tokens: int) -> Reply:
        self._tokens += token_ids
        reply = await self._complete(list(self._tokens), new_tokens)
        self._tokens += reply.tokens
        return reply

    async def tool_begins(self) -> None:
        """Nobody to tell."""

    async def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True, slots=True)
class Result:
    """One run. ``figures`` are named with their units; ``tokens`` are the first session's, to compare systems by."""

    figures: dict[str, float]
    tokens: list[int]
    complete: bool  # every request gave all the tokens that were asked for


async def run_scenario(system: System, scenario: Scenario, seed: int, vocab: int) -> Result:
    """Run one scenario once."""
    numbers = random.Random(f"{scenario.name}/{seed}")
    if scenario.agents is not None:
        return await _agents(system, scenario.agents, numbers, vocab)
    if scenario.name == "a":
        return await _single(system, numbers, vocab)
    if scenario.name == "b":
        return await _batch(system, numbers, vocab)
    seconds, replies = await _together(system, [draw(numbers, LONG_PROMPT_TOKENS, vocab)], 1)
    figures = {"prefill_tok_s": LONG_PROMPT_TOKENS / seconds, "total_s": seconds}
    return Result(figures, replies[0].tokens, _complete(replies, 1))


async def warm_up(system: System, vocab: int) -> None:
    """Two short requests: what a system does only once should not be measured."""
    numbers = random.Random("warm")
    await _together(system, [draw(numbers, 64, vocab) for _ in range(2)], 8)
    await _together(system, [draw(numbers, PROMPT_TOKENS, vocab)], 4)


def draw(numbers: random.Random, count: int, vocab: int) -> list[int]:
    """Random token ids."""
    return [numbers.randrange(FIRST_ID, vocab - LAST_IDS) for _ in range(count)]


async def _single(system: System, numbers: random.Random, vocab: int) -> Result:
    """Decode rate: the time of 128 tokens less that of the first, each after a prompt of its own."""
    first_s, _ = await _together(system, [draw(numbers, PROMPT_TOKENS, vocab)], 1)
    all_s, replies = await _together(system, [draw(numbers, PROMPT_TOKENS, vocab)], NEW_TOKENS)
    figures = {
        "decode_tok_s": (NEW_TOKENS - 1) / max(all_s - first_s, 1e-9),
        "total_s": all_s,
        "first_token_s": first_s,
    }
    return Result(figures, replies[0].tokens, _complete(replies, NEW_TOKENS))


async def _batch(system: System, numbers: random.Random, vocab: int) -> Result:
    prompts = [draw(numbers, PROMPT_TOKENS, vocab) for _ in range(BATCH)]
    seconds, replies = await _together(system, prompts, NEW_TOKENS)
    produced = sum(len(reply.tokens) for reply in replies)
    figures = {"out_tok_s": produced / seconds, "total_s": seconds}
    return Result(figures, replies[0].tokens, _complete(replies, NEW_TOKENS))


async def _together(system: System, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[Reply]]:
    begun = time.perf_counter()

    async def ask(prompt: list[int]) -> Reply:
        session = await system.session()
        try:
            return await session.turn(prompt, new_tokens)
        finally:
            await session.close()

    replies = await asyncio.gather(*(ask(prompt) for prompt in prompts))
    return time.perf_counter() - begun, list(replies)


async def _agents(system: System, agents: Agents, numbers: random.Random, vocab: int) -> Result:
    prefix = draw(numbers, agents.prefix_tokens, vocab)
    reads = [
        [draw(numbers, agents.own_tokens if turn == 0 else agents.tool_tokens, vocab) for turn in range(agents.rounds)]
        for _ in range(agents.count)
    ]
    delays = [0.0]
    while len(delays) < agents.count:
        delays.append(delays[-1] + (numbers.expovariate(1 / agents.arrival_s) if agents.arrival_s else 0.0))
    waits_s: list[float] = []
    replies: list[Reply] = []
    written: dict[int, list[int]] = {}

    async def live(number: int) -> None:
        await asyncio.sleep(delays[number])
        session = await system.session()
        written[number] = []
        try:
            for turn, read in enumerate(reads[number]):
                begun = time.perf_counter()
                reply = await session.turn(prefix + read if turn == 0 else read, agents.new_tokens)
                waits_s.append(time.perf_counter() - begun)
                replies.append(reply)
                written[number] += reply.tokens
                if turn + 1 < agents.rounds:
                    await session.tool_begins()
                    await asyncio.sleep(agents.tool_s)
        finally:
            await session.close()

    begun = time.perf_counter()
    await asyncio.gather(*(live(number) for number in range(agents.count)))
    total_s = time.perf_counter() - begun
    produced = sum(len(reply.tokens) for reply in replies)
    figures = {
        "out_tok_s": produced / total_s,
        "total_s": total_s,
        "turn_p50_s": statistics.median(waits_s),
        "turn_p95_s": statistics.quantiles(waits_s, n=20)[-1],
    }
    known = [reply.cached for reply in replies if reply.cached is not None]
    if len(known) == len(replies):
        asked = agents.count * sum(agents.prefix_tokens + agents.own_at(turn) for turn in range(agents.rounds))
        figures["cached_share"] = sum(known) / asked
    return Result(figures, written[0], _complete(replies, agents.new_tokens))


def _complete(replies: list[Reply], new_tokens: int) -> bool:
    return all(len(reply.tokens) == new_tokens for reply in replies)
