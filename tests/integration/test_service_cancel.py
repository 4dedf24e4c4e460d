"""A caller that goes away at any moment leaves nothing running and nothing open."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from caesura.runtime.config import EngineConfig
from caesura.runtime.errors import InvalidRequest
from caesura.runtime.handle import ContextHandle
from caesura.runtime.sampling import SamplingParams
from caesura.runtime.service import EngineService


@pytest.fixture(scope="module")
def service() -> Iterator[EngineService]:
    with EngineService.start(EngineConfig(kv_tokens=4096)) as running:
        yield running


async def _generate(handle: ContextHandle) -> None:
    async for _ in handle.generate(SamplingParams(max_new_tokens=1000, ignore_eos=True)):
        pass


async def _settled(service: EngineService, contexts: int) -> None:
    for _ in range(200):
        found = service.stats()["contexts"]
        if not found["running"] and not found["queued"] and found["paused"] == contexts:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"still there: {service.stats()['contexts']}")


def test_cancelling_a_generation_at_any_moment_stops_it(service: EngineService) -> None:
    async def main() -> None:
        handle = await service.open()
        await handle.append([5] * 40)
        for delays in range(12):
            task = asyncio.create_task(_generate(handle))
            for _ in range(delays):
                await asyncio.sleep(0)
            await asyncio.sleep(0.004 * (delays % 3))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await _settled(service, 1)
        await handle.close()
        await _settled(service, 0)

    asyncio.run(main())


def test_a_second_request_that_is_cancelled_leaves_the_first_alone(service: EngineService) -> None:
    async def main() -> None:
        handle = await service.open()
        await handle.append([5] * 40)
        await service.hold(retract=False)
        first = asyncio.create_task(_generate(handle))
        await asyncio.sleep(0.05)
        for second in (_generate(handle), handle.prefill(), handle.score(1)):
            task = asyncio.ensure_future(second)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        await service.go_on()
        await first
        await handle.close()

    asyncio.run(main())


def test_cancelling_an_open_or_a_fork_closes_what_it_made(service: EngineService) -> None:
    async def main() -> None:
        handle = await service.open()
        await handle.append([5] * 40)
        for make in (lambda: service.open(), lambda: handle.fork(3)):
            for yields in range(4):
                task = asyncio.create_task(make())  # type: ignore[arg-type]
                for _ in range(yields):
                    await asyncio.sleep(0)
                task.cancel()
                try:
                    made = await task
                except asyncio.CancelledError:
                    continue
                for opened in made if isinstance(made, list) else [made]:
                    await opened.close()
        await _settled(service, 1)
        await handle.close()
        await _settled(service, 0)

    asyncio.run(main())


@pytest.mark.parametrize("wrong", [-1, 1 << 30])
def test_a_token_that_the_model_does_not_have_is_refused_and_disturbs_nobody(
    service: EngineService, wrong: int
) -> None:
    async def main() -> None:
        bystander, handle = await service.open(), await service.open()
        await bystander.append([5] * 40)
        running = asyncio.create_task(_generate(bystander))
        await asyncio.sleep(0.05)
        with pytest.raises(InvalidRequest, match="outside the model's vocabulary"):
            await handle.append([5, wrong])
        assert handle.num_tokens == 0
        await handle.append([5])
        refused = {
            "logit_bias": SamplingParams(logit_bias=((5, 1.0), (wrong, 1.0))),
            "stop_token_ids": SamplingParams(stop_token_ids=(5, wrong)),
        }
        for field, params in refused.items():
            with pytest.raises(InvalidRequest, match=f"{field}: token id"):
                async for _ in handle.generate(params):
                    pytest.fail("nothing is generated")
        await running
        await bystander.close()
        await handle.close()
        await _settled(service, 0)

    asyncio.run(main())
