"""However a request or an engine ends, whoever waits for it hears so, and at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from caesura.runtime.config import EngineConfig
from caesura.runtime.engine import Engine
from caesura.runtime.errors import BrokenInvariant, EngineStopped
from caesura.runtime.generation import TokenChunk
from caesura.runtime.sampling import SamplingParams
from caesura.runtime.service import EngineService
from caesura.scheduler.profile import CostProfile
from caesura.scheduler.types import StepPlan, StepResult

PROFILE = CostProfile(0.01, 0.01, 0.0, 1e-6, 1e-8, 32)


@pytest.fixture
def service() -> Iterator[EngineService]:
    with EngineService.start(EngineConfig(num_threads=1, kv_tokens=1024, profile=PROFILE)) as running:
        yield running


async def waiting(service: EngineService, count: int) -> list[asyncio.Future[int]]:
    """So many requests of an engine on hold."""
    await service.hold(retract=False)
    handles = [await service.open() for _ in range(count)]
    for handle in handles:
        await handle.append([5] * 40)
    tasks = [asyncio.ensure_future(handle.prefill()) for handle in handles]
    while service.stats()["contexts"]["queued"] < count:
        await asyncio.sleep(0.002)
    return tasks


async def all_told(tasks: list[asyncio.Future[int]], why: str) -> None:
    for error in await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10):
        assert isinstance(error, EngineStopped) and why in str(error)


def test_a_command_that_fails_and_that_nobody_waits_for(service: EngineService) -> None:
    async def main() -> None:
        tasks = await waiting(service, 2)
        service.post(lambda engine: 1 / 0)
        await all_told(tasks, "division by zero")
        with pytest.raises(EngineStopped, match="division by zero"):
            await service.open()
        assert not service.ready

    asyncio.run(main())


def test_an_engine_whose_accounting_is_broken(service: EngineService, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise BrokenInvariant("page 3 is twice on the free list")

    async def main() -> None:
        tasks = await waiting(service, 3)
        monkeypatch.setattr(service._engine, "step", broken)
        monkeypatch.setattr(service._engine.scheduler, "close", broken)
        service.post(lambda engine: engine.go_on())
        await all_told(tasks, "page 3")

    asyncio.run(main())


class Holding:
    """Holds the engine's thread at the end of the step in which a generation ended."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def on_step(self, engine: Engine, plan: StepPlan, result: StepResult) -> None:
        if result.finished:
            self.go_on.wait(10)


def test_the_last_chunk_does_not_wait_for_the_next_step(service: EngineService) -> None:
    async def main() -> None:
        handle = await service.open()
        await handle.append([5] * 40)
        holding = Holding()
        service.observe(holding)

        async def chunks() -> list[TokenChunk]:
            return [chunk async for chunk in handle.generate(SamplingParams(max_new_tokens=3, ignore_eos=True))]

        try:
            found = await asyncio.wait_for(chunks(), 5)
        finally:
            holding.go_on.set()
        assert found[-1].finish is not None and handle.num_tokens == 43
        await handle.close()

    asyncio.run(main())
