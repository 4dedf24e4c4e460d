"""The deterministic simulator: the engine loop under a virtual clock, with programs and faults as timed events."""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from caesura.runtime.clock import Clock
from caesura.runtime.engine import Engine
from caesura.runtime.errors import BrokenInvariant
from caesura.runtime.executors.base import SampledToken
from caesura.runtime.generation import Ending, Generation, TokenChunk
from caesura.runtime.sampling import SamplerState, SamplingParams
from caesura.scheduler.types import ContextId

MAX_IDLE_STEPS = 10_000
IDLE_TICK_S = 0.05  # how long a step that could do nothing waits, at most, before the next one


class SimTokenizer:
    """Token i is one character. Enough text for an engine without a model."""

    bos_id = None
    eos_ids: frozenset[int] = frozenset()
    hidden_ids: frozenset[int] = frozenset()
    strips_leading_space = False

    def __init__(self, vocab_size: int = 64) -> None:
        self.vocab_size = vocab_size
        self.special_ids: dict[str, int] = {}

    def encode(self, text: str, *, allow_special: bool = False, continuation: bool = False) -> list[int]:
        return [ord(letter) - 48 for letter in text]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True, continuation: bool = False) -> str:
        return "".join(chr(48 + token) for token in ids)

    def token_bytes(self, token_id: int) -> bytes:
        return chr(48 + token_id).encode()


def generation(
    engine: Engine, context: ContextId, max_new_tokens: int, sink: Callable[[TokenChunk], None]
) -> Generation:
    """A greedy generation for a simulated engine."""
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
    state = SamplerState(params, seed=0)
    return Generation(params, state, SimTokenizer(), frozenset(), engine.num_tokens(context), sink)


@dataclass(slots=True)
class CountedGeneration(Generation):
    """A generation of exactly ``max_new_tokens`` that makes no text: for simulations and loads without a reader.

    ``on_first`` is called when the first token is there.
    """

    on_first: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        """No detokenizer, no stops."""

    def push(self, sampled: SampledToken) -> Ending | None:
        """Count one token."""
        self.sampler.num_generated += 1
        self.token_ids.append(sampled.token_id)
        if self.on_first is not None and len(self.token_ids) == 1:
            self.on_first()
        return Ending("length", None, keep=True) if len(self.token_ids) >= self.params.max_new_tokens else None


@functools.lru_cache(maxsize=4096)
def _exactly(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=num_tokens, min_new_tokens=num_tokens, temperature=0.0, ignore_eos=True)


_NO_TEXT = SimTokenizer()


def counted(
    engine: Engine,
    context: ContextId,
    num_tokens: int,
    done: Callable[[TokenChunk], None],
    on_first: Callable[[], None],
) -> CountedGeneration:
    """Generate ``num_tokens``; ``on_first`` at the first one, ``done`` at the end or when the context is closed."""
    params = _exactly(num_tokens)
    state = SamplerState(params, seed=0)
    prompt_tokens = engine.num_tokens(context)
    return CountedGeneration(params, state, _NO_TEXT, frozenset(), prompt_tokens, done, on_first=on_first)


class MovableClock(Clock, Protocol):
    """A clock on which waiting is possible: virtual time jumps, real time sleeps."""

    def advance_to(self, moment: float) -> None: ...


class Simulation:
    """Runs an engine and a heap of events until nothing is left to do.

    ``on_step`` is called after every engine step (for invariant checks). A queue that cannot move for
    ``MAX_IDLE_STEPS`` steps is a deadlock and raises.
    """

    def __init__(self, engine: Engine, clock: MovableClock, on_step: Callable[[], None] = lambda: None) -> None:
        self.engine = engine
        self.clock = clock
        self._on_step = on_step
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.steps = 0
        self._stopped = False

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Call ``action`` in ``delay_s`` seconds of the clock."""
        self.at(self.clock.now() + delay_s, action)

    def at(self, moment: float, action: Callable[[], None]) -> None:
        """Call ``action`` at ``moment``, or as soon after it as a step ends."""
        heapq.heappush(self._events, (moment, next(self._order), action))

    def stop(self) -> None:
        """Let ``run`` return after the present step."""
        self._stopped = True

    def run(self, until_s: float = float("inf")) -> None:
        """Run to the end of all work, or to ``until_s``, or to ``stop``."""
        without_progress = 0
        self._stopped = False
        while self.clock.now() < until_s and not self._stopped:
            while self._events and self._events[0][0] <= self.clock.now():
                heapq.heappop(self._events)[2]()
            if not self.engine.has_work:
                if not self._skip(until_s):
                    return
                continue
            before = self.clock.now()
            plan = self.engine.step()
            self.steps += 1
            self._on_step()
            if plan.slices:
                without_progress = 0
                continue
            without_progress = 0 if plan.moves or plan.expired else without_progress + 1
            if without_progress > MAX_IDLE_STEPS:
                raise BrokenInvariant(f"no progress in {MAX_IDLE_STEPS} steps at {self.clock.now():.3f} s")
            if not self.engine.scheduler.has_work:
                self._skip(until_s)
            elif self.clock.now() == before and not plan.moves:  # all that is queued has to wait for something
                self._skip(min(until_s, before + IDLE_TICK_S))

    def _skip(self, until_s: float) -> bool:
        """Move the clock to the next thing that can happen; False when there is none (and the clock stays)."""
        moments = [self._events[0][0]] if self._events else []
        deadline = self.engine.next_deadline()
        if deadline is not None:
            moments.append(deadline)
        copy_at = getattr(self.engine.executor, "next_copy_at", None)
        if copy_at is not None:
            moments.append(copy_at)
        if not moments:
            if self.engine.scheduler.has_work:
                self.clock.advance_to(until_s)
            return False
        self.clock.advance_to(min(*moments, until_s))
        if deadline is not None and self.clock.now() >= deadline:
            self.engine.step()
            self._on_step()
        return True
