"""The deterministic simulator: the engine loop under a virtual clock, with programs and faults as timed events."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence

from caesura.runtime.clock import VirtualClock
from caesura.runtime.engine import Engine
from caesura.runtime.errors import BrokenInvariant
from caesura.runtime.generation import Generation, TokenChunk
from caesura.runtime.sampling import SamplerState, SamplingParams
from caesura.scheduler.types import ContextId

MAX_IDLE_STEPS = 10_000


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


class Simulation:
    """Runs an engine and a heap of events until nothing is left to do.

    ``on_step`` is called after every engine step (for invariant checks). A queue that cannot move for
    ``MAX_IDLE_STEPS`` steps is a deadlock and raises.
    """

    def __init__(self, engine: Engine, clock: VirtualClock, on_step: Callable[[], None] = lambda: None) -> None:
        self.engine = engine
        self.clock = clock
        self._on_step = on_step
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.steps = 0

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Call ``action`` in ``delay_s`` virtual seconds."""
        heapq.heappush(self._events, (self.clock.now() + delay_s, next(self._order), action))

    def run(self, until_s: float = float("inf")) -> None:
        """Run to the end of all work, or to ``until_s``."""
        without_progress = 0
        while self.clock.now() < until_s:
            while self._events and self._events[0][0] <= self.clock.now():
                heapq.heappop(self._events)[2]()
            if self.engine.has_work:
                plan = self.engine.step()
                self.steps += 1
                self._on_step()
                without_progress = 0 if plan.slices or plan.moves or plan.expired else without_progress + 1
                if without_progress > MAX_IDLE_STEPS:
                    raise BrokenInvariant(f"no progress in {MAX_IDLE_STEPS} steps at {self.clock.now():.3f} s")
                if not plan.slices and not self.engine.scheduler.has_work:
                    self._skip()
            elif not self._skip():
                return

    def _skip(self) -> bool:
        """Move the clock to the next thing that can happen; False when there is none."""
        moments = [self._events[0][0]] if self._events else []
        deadline = self.engine.next_deadline()
        if deadline is not None:
            moments.append(deadline)
        copy_at = getattr(self.engine.executor, "next_copy_at", None)
        if copy_at is not None:
            moments.append(copy_at)
        if not moments:
            return False
        self.clock.advance_to(min(moments))
        if deadline is not None and self.clock.now() >= deadline:
            self.engine.step()
            self._on_step()
        return True
