"""An engine that has nothing to do but wait: for a copy, until somebody wants something; for memory, without ado."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from caesura.runtime.clock import VirtualClock
from caesura.runtime.engine import COPY_WAIT_S, INBOX_EVERY_S, Engine
from caesura.runtime.executors.sim import SimExecutor
from caesura.runtime.generation import TokenChunk
from caesura.runtime.sim import generation
from caesura.scheduler.context import Call
from caesura.scheduler.policies import make_policy
from caesura.scheduler.profile import GPT_J_6B_A100
from caesura.scheduler.types import ContextId, MoveId, Phase


class Endless(SimExecutor):
    """Its copies never end."""

    waits_s: list[float]

    def acknowledged(self, *, wait_s: float = 0.0) -> list[MoveId]:
        self.waits_s.append(wait_s)
        return []


def engine(policy: str, executor: SimExecutor, clock: VirtualClock) -> Engine:
    return Engine(executor, make_policy(policy), GPT_J_6B_A100, clock)


def begin(running: Engine, prompt: list[int], count: int, chunks: list[TokenChunk]) -> ContextId:
    context = running.open()
    running.append(context, prompt)
    running.generate(context, generation(running, context, count, chunks.append))
    return context


LAST_LOOK = round(COPY_WAIT_S / INBOX_EVERY_S)


@pytest.mark.parametrize(
    ("inbox", "wanted"),
    [
        (None, [COPY_WAIT_S]),
        (lambda: False, [INBOX_EVERY_S] * LAST_LOOK),
        (iter([False, False, True]).__next__, [INBOX_EVERY_S] * 3),
    ],
)
def test_a_command_ends_the_wait_for_a_copy(inbox: Callable[[], bool] | None, wanted: list[float]) -> None:
    clock = VirtualClock()
    executor = Endless(GPT_J_6B_A100, clock, num_device_pages=16, num_host_pages=16)
    executor.waits_s = []
    running, chunks = engine("swap", executor, clock), list[TokenChunk]()
    context = begin(running, list(range(50)), 1, chunks)
    while not (chunks and chunks[-1].finish):
        running.step()
    running.pause(context, [Call("search")])
    executor.waits_s.clear()
    running.inbox = inbox
    plan = running.step()
    assert plan.moves and not plan.slices
    assert executor.waits_s == wanted


def test_who_waits_in_vain_has_nobody_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = VirtualClock()
    running = engine("preserve", SimExecutor(GPT_J_6B_A100, clock, num_device_pages=12, page_size=16), clock)
    begin(running, list(range(150)), 20, [])
    running.step()
    late = [begin(running, [number] * 60, 1, []) for number in (1, 2)]
    asked = []
    segments = running.ledger.segments
    monkeypatch.setattr(running.ledger, "segments", lambda: asked.append(1) or segments())
    for _ in range(5):
        running.step()
    assert {running.scheduler.contexts[context].phase for context in late} == {Phase.QUEUED}
    assert not asked
