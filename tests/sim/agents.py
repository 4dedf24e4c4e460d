"""Random tool-using agents on the simulated engine, with faults, each checked against a pure function of its tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from caesura.runtime.clock import VirtualClock
from caesura.runtime.engine import Engine
from caesura.runtime.executors.sim import SimExecutor, expected_token
from caesura.runtime.generation import Generation, TokenChunk
from caesura.runtime.sampling import SamplerState, SamplingParams
from caesura.runtime.sim import Simulation
from caesura.scheduler.context import Call
from caesura.scheduler.policies import make_policy
from caesura.scheduler.profile import CostProfile
from caesura.scheduler.scheduler import SchedulerConfig
from caesura.scheduler.types import ContextId

VOCAB = 50
PROFILE = CostProfile(0.002, 0.0002, 1e-8, 0.0001, 0.00001, 64, "made up")


class LetterTokenizer:
    """Token i is one character; enough text for an engine without a model."""

    vocab_size = VOCAB
    eos_ids: frozenset[int] = frozenset()
    bos_id = None
    special_ids: dict[str, int] = {}
    hidden_ids: frozenset[int] = frozenset()
    strips_leading_space = False

    def encode(self, text: str, *, allow_special: bool = False, continuation: bool = False) -> list[int]:
        return [ord(letter) - 48 for letter in text]

    def decode(self, ids: list[int], *, skip_special: bool = True, continuation: bool = False) -> str:
        return "".join(chr(48 + token) for token in ids)

    def token_bytes(self, token_id: int) -> bytes:
        return chr(48 + token_id).encode()


def generation(engine: Engine, context: ContextId, max_new: int, sink, **params) -> Generation:  # type: ignore[no-untyped-def]
    """A greedy generation for the simulated engine."""
    sampling = SamplingParams(max_new_tokens=max_new, temperature=0.0, **params)
    return Generation(
        sampling, SamplerState(sampling, seed=0), LetterTokenizer(), frozenset(), engine.num_tokens(context), sink
    )


@dataclass
class World:
    """An engine in simulation and the book of what every agent should have got."""

    policy: str
    seed: int = 0
    page_size: int = 4
    device_pages: int = 40
    host_pages: int = 20
    slow: float = 1.0
    max_step_tokens: int = 24
    max_running: int = 8
    share: bool = True
    check_each_step: bool = True
    wrong: list[str] = field(default_factory=list)
    finished: int = 0
    lost: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.clock = VirtualClock()
        executor = SimExecutor(
            PROFILE,
            self.clock,
            page_size=self.page_size,
            num_device_pages=self.device_pages,
            num_host_pages=self.host_pages,
            vocab_size=VOCAB,
            seed=self.seed,
            slow=self.slow,
        )
        config = SchedulerConfig(self.max_step_tokens, self.max_running)
        self.engine = Engine(
            executor, make_policy(self.policy), PROFILE, self.clock, config, share_prefixes=self.share
        )
        self.sim = Simulation(self.engine, self.clock, self.engine.check if self.check_each_step else lambda: None)

    def settle(self) -> None:
        """Run to the end, then assert that nothing is left behind."""
        self.sim.run()
        assert not self.wrong, self.wrong[:3]
        self.engine.check()
        ledger = self.engine.ledger
        assert not ledger.holdings and not ledger.transfers
        assert ledger.free_pages + ledger.evictable_pages == ledger.num_device_pages
        self.engine.flush_cache()
        self.engine.check()
        assert ledger.free_pages == ledger.num_device_pages
        assert ledger.host.num_free == ledger.num_host_pages
        assert not ledger.tree.nodes


class Agent:
    """A program of rounds: append, generate, wait for a tool - now and then forking - then close."""

    def __init__(self, world: World, rounds: int, prompt: list[int], *, faults: float = 0.0, depth: int = 0) -> None:
        self.world = world
        self.rounds = rounds
        self.faults = faults
        self.depth = depth
        self.tokens: list[int] = []
        self.alive = True
        self.pending = list(prompt)
        self.context: ContextId | None = None

    def start(self) -> None:
        self.context = self.world.engine.open(on_closed=self._closed)
        self._go()

    def _closed(self, reason: Exception) -> None:
        self.alive = False
        self.world.lost += 1

    def _go(self) -> None:
        if not self.alive:
            return
        world, engine = self.world, self.world.engine
        assert self.context is not None
        engine.append(self.context, self.pending)
        self.tokens += self.pending
        self.wanted = world.random.randint(1, 6)
        self.got: list[int] = []
        engine.generate(self.context, generation(engine, self.context, self.wanted, self._chunk))
        if world.random.random() < self.faults / 2:  # the client goes away while it is being served
            world.sim.after(world.random.uniform(0, 0.02), self._leave)

    def _chunk(self, chunk: TokenChunk) -> None:
        self.got += chunk.token_ids
        if chunk.finish is None:
            return
        if chunk.finish.reason == "abort":
            return
        for token in self.got:
            expected = expected_token(self.tokens, VOCAB)
            if token != expected:
                self.world.wrong.append(f"context {self.context}: {token} after {len(self.tokens)}, not {expected}")
            self.tokens.append(token)
        self.world.sim.after(0.0, self._between)

    def _between(self) -> None:
        if not self.alive:
            return
        world, engine = self.world, self.world.engine
        assert self.context is not None
        self.rounds -= 1
        draw = world.random.random
        if self.rounds <= 0:
            world.finished += 1
            self._leave()
            return
        if draw() < 0.15 and self.depth < 2:
            self._branch()
        if draw() < 0.1:
            keep = world.random.randint(1, len(self.tokens))
            engine.truncate(self.context, keep)
            del self.tokens[keep:]
        self.pending = [world.random.randrange(VOCAB) for _ in range(world.random.randint(1, 9))]
        if draw() < 0.75:
            self._call_tool()
        else:
            self._go()

    def _call_tool(self) -> None:
        world = self.world
        tool, duration_s = world.random.choice([("fast", 0.001), ("shell", 0.03), ("search", 0.2), ("person", 2.0)])
        duration_s *= world.random.uniform(0.5, 1.5)
        assert self.context is not None
        hangs = world.random.random() < self.faults
        deadline_at = world.clock.now() + 5.0 if hangs or world.random.random() < 0.3 else None
        world.engine.pause(self.context, [Call(tool, duration_s if world.random.random() < 0.3 else None)],
                           deadline_at=deadline_at)  # fmt: skip
        if not hangs:
            world.sim.after(duration_s, self._go)

    def _branch(self) -> None:
        assert self.context is not None
        child = Agent(self.world, self.world.random.randint(1, 2), [], faults=self.faults, depth=self.depth + 1)
        child.context = self.world.engine.fork(self.context, child._closed)
        child.tokens = list(self.tokens)
        child.pending = [self.world.random.randrange(VOCAB) for _ in range(3)]
        self.world.sim.after(self.world.random.uniform(0, 0.01), child._go)

    def _leave(self) -> None:
        if self.alive:
            self.alive = False
            assert self.context is not None
            self.world.engine.close(self.context)


def populate(world: World, agents: int, *, faults: float = 0.0) -> None:
    """Agents arriving over a second, half of them behind a shared prompt."""
    shared = [world.random.randrange(VOCAB) for _ in range(21)]
    for _ in range(agents):
        own = [world.random.randrange(VOCAB) for _ in range(world.random.randint(1, 30))]
        prompt = shared + own if world.random.random() < 0.5 else own
        agent = Agent(world, world.random.randint(1, 4), prompt, faults=faults)
        world.sim.after(world.random.uniform(0, 1.0), agent.start)
