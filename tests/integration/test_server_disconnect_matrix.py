"""A client that leaves in any state gets its pages back within two steps of the engine, whichever middleware is on.

The engine's thread is held at the very moment in question until the server has noticed that the client is gone, so
that nothing here depends on how fast the machine is; what follows is counted in steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from caesura.runtime.config import EngineConfig
from caesura.runtime.engine import Engine
from caesura.runtime.handle import ContextHandle
from caesura.runtime.sampling import SamplingParams
from caesura.runtime.server.errors import ApiError
from caesura.runtime.service import EngineService
from caesura.scheduler.profile import CostProfile
from caesura.scheduler.types import ContextId, Phase, StepPlan, StepResult
from fastapi import FastAPI

from tests.integration.server_client import QUESTION, TOOLS, answered, client_of, make_app, post
from tests.integration.test_server_disconnect import leave

MIDDLEWARE = ("Counting", "Outermost", "HostGuard", "Auth", "BodyLimit")
STATES = ("queued", "prefilling", "decoding", "paused", "swapping")
MAX_STEPS = 2
CHEAP_COPIES = CostProfile(0.01, 0.01, 0.0, 1e-6, 1e-8, 32)
LONG = {"max_new_tokens": 1000, "ignore_eos": True}
ASK = {"messages": [QUESTION], "tools": TOOLS, "temperature": 0}


class Gate:
    """Sees every step. Holds the engine's thread once ``when`` is true, and counts steps until all is given back."""

    def __init__(self) -> None:
        self.when: Callable[[Engine], bool] | None = None
        self.reached: Callable[[], None] = lambda: None
        self.released = threading.Event()
        self.targets: Callable[[Engine], set[ContextId]] = lambda engine: set()
        self.left: set[ContextId] = set()
        self.steps_at_release = 0
        self.back_after: int | None = None
        self.late_copies: list[Any] | None = None

    def on_step(self, engine: Engine, plan: StepPlan, result: StepResult) -> None:
        if self.when is not None and self.when(engine):
            self.hold(engine)
        else:
            self.look(engine)

    def hold(self, engine: Engine) -> None:
        """The client leaves now; go on when the server is done with it."""
        self.when = None
        self.left = self.targets(engine)
        self.reached()
        assert self.released.wait(20), "the server does not notice that its client is gone"
        self.steps_at_release = engine.scheduler.meter.steps

    def look(self, engine: Engine) -> None:
        held = self.left & (set(engine.scheduler.contexts) | set(engine.ledger.holdings))
        if self.left and self.back_after is None and not held and not engine.ledger.copying_pages:
            self.back_after = engine.scheduler.meter.steps - self.steps_at_release


class Stage:
    """An engine whose commands and copies can be held."""

    def __init__(self) -> None:
        config = EngineConfig(
            num_threads=1, kv_tokens=2048, host_kv_tokens=4096, max_running=2, max_step_tokens=64, profile=CHEAP_COPIES
        )
        self.service = EngineService.start(config)
        self.engine = self.service._engine
        self.gate = Gate()
        self.service.observe(_Forward(self))
        self._append, self._acknowledged = self.engine.append, self.engine.executor.acknowledged
        self.engine.append = self._held_append  # type: ignore[method-assign]
        self.engine.executor.acknowledged = self._late_copies  # type: ignore[method-assign]
        self.idle_pages = self.service.call_now(_available)

    def _held_append(self, context: ContextId, tokens: Any) -> int:
        """What continues a paused context is the first command it hears of."""
        gate, state = self.gate, self.engine.scheduler.contexts.get(context)
        length = self._append(context, tokens)
        if gate.when is is_paused and state is not None and state.phase is Phase.PAUSED and state.pause.calls:
            gate.hold(self.engine)
        return length

    def _late_copies(self, *, wait_s: float = 0.0) -> list[Any]:
        done = self._acknowledged(wait_s=wait_s)
        if self.gate.when is is_swapping:  # a copy that has begun does not end before the client has left
            self.gate.late_copies = [*(self.gate.late_copies or []), *done]
            return []
        late, self.gate.late_copies = self.gate.late_copies or [], None
        return [*late, *done]


class _Forward:
    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def on_step(self, engine: Engine, plan: StepPlan, result: StepResult) -> None:
        self._stage.gate.on_step(engine, plan, result)


def _available(engine: Engine) -> int:
    return engine.ledger.free_pages + engine.ledger.evictable_pages


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    made = Stage()
    yield made
    made.service.close()


# -- the states --------------------------------------------------------------------------------------------------


def is_paused(engine: Engine) -> bool:
    return False  # noticed at a command, not at a step


def is_swapping(engine: Engine) -> bool:
    return engine.ledger.copying_pages > 0


def at_phase(before: set[ContextId], test: Callable[[Engine, ContextId], bool]) -> Callable[[Engine], bool]:
    return lambda engine: any(test(engine, context) for context in set(engine.scheduler.contexts) - before)


def _is_queued(engine: Engine, context: ContextId) -> bool:
    state = engine.scheduler.contexts[context]
    return state.phase is Phase.QUEUED and state.num_tokens > 0


def _is_prefilling(engine: Engine, context: ContextId) -> bool:
    state = engine.scheduler.contexts[context]
    return state.phase is Phase.RUNNING and 0 < engine.ledger.computed(context) < state.num_tokens - 64


def _is_decoding(engine: Engine, context: ContextId) -> bool:
    generation = engine._records[context].generation
    return generation is not None and len(generation.token_ids) >= 3


async def endless(service: EngineService) -> tuple[ContextHandle, asyncio.Task[None]]:
    """A context that runs until it is closed."""
    handle = await service.open()
    await handle.append([5, 6, 7])
    begun = asyncio.Event()

    async def run() -> None:
        async for _ in handle.generate(SamplingParams(max_new_tokens=1000, ignore_eos=True)):
            begun.set()

    task = asyncio.ensure_future(run())
    await asyncio.wait_for(begun.wait(), 10)
    return handle, task


async def crowd_out(service: EngineService) -> None:
    """Fill the device pool, so that what is paused has to go to the host."""
    handle = await service.open()
    draw = random.Random(time.monotonic_ns())  # nothing of it may be cached
    await handle.append([draw.randrange(9, 200) for _ in range(2020)])
    await handle.prefill()
    await handle.close()


async def leaves(stage: Stage, state: str, streaming: bool, without: tuple[str, ...]) -> None:
    """One client that leaves in ``state``."""
    service = stage.service
    gate = stage.gate = Gate()
    app = make_app(service)
    app.user_middleware = [one for one in app.user_middleware if getattr(one.cls, "__name__", "") not in without]
    others: list[tuple[ContextHandle, asyncio.Task[None]]] = []
    path, body = "/generate", {"text": "a b", "sampling_params": LONG}
    if state == "queued":
        others = [await endless(service) for _ in range(2)]
    if state == "prefilling":
        body = {"text": f"{time.monotonic_ns()} word " * 100, "sampling_params": {**LONG, "max_new_tokens": 8}}
    if state in ("paused", "swapping"):
        path = "/v1/chat/completions"
        async with client_of(app) as client:
            message = (await post(client, path, ASK))["choices"][0]["message"]
        body = {**ASK, "messages": [QUESTION, *answered(message)]}
        if state == "swapping":
            await crowd_out(service)
    before = set(service.call_now(lambda engine: list(engine.scheduler.contexts)))
    waiting = before if state in ("paused", "swapping") else set()
    gate.targets = lambda engine: (set(engine.scheduler.contexts) - before) | waiting
    gate.when = {
        "queued": at_phase(before, _is_queued),
        "prefilling": at_phase(before, _is_prefilling),
        "decoding": at_phase(before, _is_decoding),
        "paused": is_paused,
        "swapping": is_swapping,
    }[state]
    await hung_up(app, gate, path, {**body, "stream": streaming})
    assert gate.when is None, f"the request never was {state}"
    assert gate.left, "the request had a context"
    for _ in range(400):
        service.call_now(gate.look)
        if gate.back_after is not None:
            break
        await asyncio.sleep(0.005)
    assert gate.back_after is not None, "its pages are not given back"
    assert gate.back_after <= MAX_STEPS
    for handle, task in others:
        await handle.close()
        await asyncio.gather(task, return_exceptions=True)
    await app.state.server.close()
    service.call_now(lambda engine: engine.check())
    assert service.call_now(_available) == stage.idle_pages
    assert len(app.state.server.board) == len(app.state.server.kept) == 0


async def hung_up(app: FastAPI, gate: Gate, path: str, body: dict[str, Any]) -> None:
    """Send a request and hang up when the gate is reached; let the engine go on when the server is done."""
    loop, gone = asyncio.get_running_loop(), asyncio.Event()
    gate.reached = lambda: loop.call_soon_threadsafe(gone.set)
    try:
        with contextlib.suppress(ApiError):  # without the outermost middleware nobody turns refusals into answers
            await leave(app, path, body, after_events=10_000, after_s=15, gone=gone)
    finally:
        gate.released.set()


def matrix() -> Iterator[Any]:
    """State, streaming, middleware that is off. Those with the longest way to their state run one by one when slow."""
    for state in STATES:
        for streaming in (False, True):
            for without in ((), *((name,) for name in MIDDLEWARE), MIDDLEWARE):
                slow = len(without) == 1 and state in ("paused", "swapping")
                name = f"{state}-{'stream' if streaming else 'whole'}-{'+'.join(without) or 'none'}"
                yield pytest.param(state, streaming, without, id=name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("state", "streaming", "without"), matrix())
def test_pages_of_a_client_that_leaves_are_back_within_two_steps(
    stage: Stage, state: str, streaming: bool, without: tuple[str, ...]
) -> None:
    asyncio.run(leaves(stage, state, streaming, without))
