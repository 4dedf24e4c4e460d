"""Random tool-using agents driven on the engine loop under a virtual clock, with faults.

What an agent does is drawn from its own seed alone, never from what happens around it, so the same agent can be run
under any policy, batch and cache state and must end with the same tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from caesura.runtime.clock import VirtualClock
from caesura.runtime.engine import Engine
from caesura.runtime.executors.base import Executor, OverlappingExecutor
from caesura.runtime.executors.sim import SimExecutor, expected_token
from caesura.runtime.generation import TokenChunk
from caesura.runtime.sim import Simulation, generation
from caesura.scheduler.context import Call
from caesura.scheduler.policies import make_policy
from caesura.scheduler.profile import CostProfile
from caesura.scheduler.scheduler import SchedulerConfig
from caesura.scheduler.types import ContextId

VOCAB = 50
PROFILE = CostProfile(0.002, 0.0002, 1e-8, 0.0001, 0.00001, 64, "made up")
TOOLS = (("fast", 0.001), ("shell", 0.03), ("search", 0.2), ("person", 2.0))


@dataclass
class World:
    """An engine under a virtual clock and the book of what every agent got."""

    policy: str
    seed: int = 0
    page_size: int = 4
    device_pages: int = 40
    host_pages: int = 20
    disk_pages: int = 0
    disk_faults: float = 0.0
    slow: float = 1.0
    profile: CostProfile = PROFILE
    max_step_tokens: int = 24
    max_running: int = 8
    share: bool = True
    check_every: int = 1
    make_executor: Callable[[World], Executor] | None = None
    overlap: bool = False  # the executor made is an OverlappingExecutor
    wrong: list[str] = field(default_factory=list)
    transcripts: dict[str, list[int]] = field(default_factory=dict)
    finished: int = 0
    lost: int = 0

    def __post_init__(self) -> None:
        self.clock = VirtualClock()
        executor = self.make_executor(self) if self.make_executor else self._simulated()
        config = SchedulerConfig(self.max_step_tokens, self.max_running)
        policy = make_policy(self.policy)
        overlapping = cast(OverlappingExecutor, executor) if self.overlap else None
        self.engine = Engine(
            executor, policy, self.profile, self.clock, config, share_prefixes=self.share, overlapping=overlapping
        )
        self.sim = Simulation(self.engine, self.clock, self._check)

    def _simulated(self) -> Executor:
        return SimExecutor(
            self.profile,
            self.clock,
            page_size=self.page_size,
            num_device_pages=self.device_pages,
            num_host_pages=self.host_pages,
            num_disk_pages=self.disk_pages,
            disk_faults=self.disk_faults,
            vocab_size=VOCAB,
            seed=self.seed,
            slow=self.slow,
        )

    def _check(self) -> None:
        if self.check_every and self.sim.steps % self.check_every == 0:
            self.engine.check()

    def expect(self, context: ContextId | None, before: list[int], got: list[int]) -> None:
        """Simulated tokens are a pure function of the prefix; a real model is compared by transcript."""
        if self.make_executor is None:
            tokens = list(before)
            for token in got:
                if token != expected_token(tokens, VOCAB):
                    self.wrong.append(f"context {context}: token {token} after {len(tokens)} tokens is wrong")
                tokens.append(token)

    def settle(self) -> None:
        """Run to the end, then assert that nothing is left behind."""
        self.sim.run()
        assert not self.wrong, self.wrong[:3]
        self.engine.check()
        ledger = self.engine.ledger
        assert not self.engine.scheduler.contexts
        assert not ledger.copying_pages
        assert ledger.free_pages + ledger.evictable_pages == ledger.num_device_pages
        self.engine.flush_cache()
        self.engine.check()
        assert ledger.free_pages == ledger.num_device_pages, "device pages are leaked"
        assert ledger.free_host_pages == ledger.num_host_pages, "host pages are leaked"
        assert ledger.free_disk_pages == ledger.num_disk_pages, "disk pages are leaked"


class Agent:
    """A program of rounds: append, generate, wait for a tool - now and then forking or rolling back - then close."""

    def __init__(self, world: World, name: str, rounds: int, prompt: list[int], faults: float = 0.0) -> None:
        self.world = world
        self.name = name
        self.rounds = rounds
        self.faults = faults
        self.random = random.Random(name)
        self.tokens: list[int] = []
        self.pending = list(prompt)
        self.alive = True
        self.context: ContextId | None = None

    def start(self) -> None:
        """Open a context and go."""
        self.context = self.world.engine.open(on_closed=self._closed)
        self._go()

    def _closed(self, reason: Exception) -> None:
        self.alive = False
        self.world.lost += 1

    def _go(self) -> None:
        if not self.alive:
            return
        engine = self.world.engine
        assert self.context is not None
        engine.append(self.context, self.pending)
        self.tokens += self.pending
        self.got: list[int] = []
        engine.generate(self.context, generation(engine, self.context, self.random.randint(1, 6), self._chunk))
        if self.random.random() < self.faults / 2:  # the client goes away while it is being served
            self.world.sim.after(self.random.uniform(0, 0.02), self._leave)

    def _chunk(self, chunk: TokenChunk) -> None:
        self.got += chunk.token_ids
        if chunk.finish is None or chunk.finish.reason == "abort":
            return
        self.world.expect(self.context, self.tokens, self.got)
        self.tokens += self.got
        self.world.sim.after(0.0, self._between)

    def _between(self) -> None:
        if not self.alive:
            return
        assert self.context is not None
        self.rounds -= 1
        if self.rounds <= 0:
            self.world.finished += 1
            self.world.transcripts[self.name] = self.tokens
            self._leave()
            return
        if self.random.random() < 0.15 and self.name.count("/") < 2:
            self._branch()
        if self.random.random() < 0.1:
            keep = self.random.randint(1, len(self.tokens))
            self.world.engine.truncate(self.context, keep)
            del self.tokens[keep:]
        self.pending = [self.random.randrange(VOCAB) for _ in range(self.random.randint(1, 9))]
        if self.random.random() < 0.75:
            self._call_tool()
        else:
            self._go()

    def _call_tool(self) -> None:
        world = self.world
        tool, typical_s = self.random.choice(TOOLS)
        duration_s = typical_s * self.random.uniform(0.5, 1.5)
        hint_s = duration_s if self.random.random() < 0.3 else None
        hangs = self.random.random() < self.faults
        deadline_at = world.clock.now() + 5.0 if hangs or self.random.random() < 0.3 else None
        assert self.context is not None
        world.engine.pause(self.context, [Call(tool, hint_s)], deadline_at=deadline_at)
        if not hangs:
            world.sim.after(duration_s, self._go)

    def _branch(self) -> None:
        assert self.context is not None
        child = Agent(self.world, f"{self.name}/{self.rounds}", self.random.randint(1, 2), [], self.faults)
        child.context = self.world.engine.fork(self.context, child._closed)
        child.tokens = list(self.tokens)
        child.pending = [self.random.randrange(VOCAB) for _ in range(3)]
        self.world.sim.after(self.random.uniform(0, 0.01), child._go)

    def _leave(self) -> None:
        if self.alive:
            self.alive = False
            assert self.context is not None
            self.world.engine.close(self.context)


def populate(world: World, agents: int, *, faults: float = 0.0, within_s: float = 1.0) -> None:
    """Agents arriving over ``within_s``, half of them behind a shared prompt. The seed alone decides what they do."""
    draw = random.Random(world.seed)
    shared = [draw.randrange(VOCAB) for _ in range(21)]
    for number in range(agents):
        own = [draw.randrange(VOCAB) for _ in range(draw.randint(1, 30))]
        prompt = shared + own if draw.random() < 0.5 else own
        agent = Agent(world, f"{world.seed}-{number}", draw.randint(1, 4), prompt, faults)
        world.sim.after(draw.uniform(0, within_s), agent.start)
