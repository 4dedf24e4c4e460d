"""The engine in its own process does what the engine in this one does; strangers at its socket change nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from caesura.runtime.api import Handle, PendingCall, Service
from caesura.runtime.config import EngineConfig
from caesura.runtime.errors import BrokenCheckpoint, ContextClosed, ContextTooLong, DeadlineExceeded, InvalidRequest
from caesura.runtime.generation import Finish, TokenChunk, ToolCalling
from caesura.runtime.ipc import messages as m
from caesura.runtime.ipc.channel import Channel
from caesura.runtime.ipc.client import EngineClient
from caesura.runtime.ipc.process import SOCKET_NAME, TO_CLIENT, TO_ENGINE
from caesura.runtime.sampling import SamplingParams
from caesura.runtime.service import EngineService

CONFIG = EngineConfig(kv_tokens=8192, policy="discard", deterministic=True)
GREEDY = SamplingParams(max_new_tokens=40, temperature=0.0, ignore_eos=True)
ENDLESS = SamplingParams(max_new_tokens=1500, temperature=0.0, ignore_eos=True)
TOOL = {
    "name": "calculator",
    "description": "Work out an arithmetic expression.",
    "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
}


@pytest.fixture(scope="module")
def remote() -> Iterator[EngineClient]:
    with EngineClient.start(CONFIG) as client:
        yield client


@pytest.fixture(scope="module")
def local() -> Iterator[EngineService]:
    with EngineService.start(CONFIG) as service:
        yield service


async def generated(handle: Handle, params: SamplingParams, tools: ToolCalling | None = None) -> list[TokenChunk]:
    return [chunk async for chunk in handle.generate(params, tools)]


def ids(chunks: list[TokenChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def finish(chunks: list[TokenChunk]) -> Finish:
    assert chunks[-1].finish is not None
    return chunks[-1].finish


async def life(service: Service) -> list[Any]:
    """One context's life with everything a handle can do; what it saw, for comparison."""
    encode = service.tokenizer.encode
    handle = await service.open("here")
    seen: list[Any] = [await handle.append(encode("What is 12 + 30?\n"))]
    chunks = await generated(handle, GREEDY)
    seen += [ids(chunks), "".join(chunk.text for chunk in chunks), finish(chunks), handle.num_tokens]
    await handle.pause([PendingCall("clock", 0.01)])
    handle.report(0.5)
    handle.report(1.0, call=7)  # it waits for no such call
    with pytest.raises(InvalidRequest, match="fraction"):
        handle.report(1.5)
    seen.append(await handle.append(encode(" and more")))
    await handle.resume()
    seen.append(await handle.prefill())
    children = await handle.fork(2)
    texts = [SamplingParams(max_new_tokens=20, temperature=0.9, seed=5, logprobs=2), GREEDY]
    for child, params in zip(children, texts, strict=True):
        chunks = await generated(child, params)
        seen += [ids(chunks), [chunk.logprobs for chunk in chunks], child.num_tokens, finish(chunks)]
        await child.close()
    await handle.truncate(9)
    seen += [handle.num_tokens, await handle.token_ids(), await handle.score(3), await handle.score_top(3, 2)]
    chunks = await generated(handle, SamplingParams(max_new_tokens=0))
    seen += [ids(chunks), finish(chunks).reason]
    await service.hold(retract=True)
    waiting = asyncio.ensure_future(generated(handle, GREEDY))
    await asyncio.sleep(0.05)
    seen.append(waiting.done())
    await service.go_on()
    seen += [ids(await waiting), handle.num_tokens]
    assert await handle.read_decisions() == await asyncio.to_thread(handle.decisions)
    await handle.close()
    await handle.close()
    handle.report(0.5)
    await service.flush_cache()
    stats = await service.read_stats()
    seen += [stats["contexts"], stats["policy"], stats["device_pages"], stats["free_pages"]]
    return seen


def test_both_engines_give_the_same(remote: EngineClient, local: EngineService) -> None:
    assert asyncio.run(life(remote)) == asyncio.run(life(local))
    assert remote.tool_format == local.tool_format
    assert remote.template.source == local.template.source
    assert remote.ready
    assert local.ready


async def calls_a_tool(service: Service) -> tuple[Finish, list[str]]:
    handle = await service.open()
    prompt = service.template.pieces(
        [{"role": "user", "content": "What is 12 * 30?"}],
        tools=[{"type": "function", "function": TOOL}],
        add_generation_prompt=True,
    )
    for piece in prompt:
        await handle.append(service.tokenizer.encode(piece.text, allow_special=piece.special))
    params = SamplingParams(max_new_tokens=64, temperature=0.0)
    chunks = await generated(handle, params, ToolCalling((TOOL,), choice="required"))
    end = time.monotonic() + 10
    while not (decisions := await handle.read_decisions()) and time.monotonic() < end:
        other = await service.open()  # decisions fall in steps, so make some
        await other.append([5])
        await other.prefill()
        await other.close()
    await handle.close()
    return finish(chunks), [decision.tool for decision in decisions]


def test_a_models_call_pauses_its_context_there_too(remote: EngineClient, local: EngineService) -> None:
    there = asyncio.run(calls_a_tool(remote))
    assert there == asyncio.run(calls_a_tool(local))
    assert there[0].reason == "tool_calls"
    assert there[1] == ["calculator"]


async def failures(service: Service) -> list[tuple[type[Exception], str]]:
    handle = await service.open()
    found: list[tuple[type[Exception], str]] = []

    async def expect(work: Any, *kinds: type[Exception]) -> None:
        with pytest.raises(kinds) as caught:
            await work
        found.append((type(caught.value), str(caught.value).replace(f"context {handle.id}", "context N")))

    await expect(generated(handle, GREEDY), InvalidRequest)
    await expect(handle.append([1] * 100_000), ContextTooLong)
    await handle.append([5, 6, 7])
    await expect(handle.score(9), InvalidRequest)
    await expect(handle.truncate(4), InvalidRequest)
    busy = asyncio.ensure_future(generated(handle, ENDLESS))
    while not (await service.read_stats())["contexts"]["running"]:
        await asyncio.sleep(0.01)
    await expect(handle.append([1]), InvalidRequest)
    await handle.close()
    await expect(busy, ContextClosed)
    await expect(handle.token_ids(), ContextClosed)
    late = await service.open("", 0.2)
    await late.append([5, 6])
    with pytest.raises(DeadlineExceeded):
        await generated(late, ENDLESS)
        await asyncio.sleep(0.3)
        await late.append([1])
    with pytest.raises(DeadlineExceeded):
        await late.append([1])
    waits = await service.open("", 0.5)
    await waits.append([5, 6])
    await waits.pause([PendingCall("person", deadline_s=60.0)], deadline_s=60.0)
    await asyncio.sleep(0.6)
    assert await waits.append([7]) == 3, "a pause may give it more time than it was opened with"
    await waits.close()
    return found


def test_both_engines_fail_the_same(remote: EngineClient, local: EngineService) -> None:
    assert asyncio.run(failures(remote)) == asyncio.run(failures(local))


async def until_idle(service: Service) -> None:
    async with asyncio.timeout(10):
        while True:
            contexts = (await service.read_stats())["contexts"]
            if not contexts["queued"] and not contexts["running"]:
                return
            await asyncio.sleep(0.01)


async def opened(service: Service) -> int:
    counts: dict[str, int] = (await service.read_stats())["contexts"]
    return sum(counts.values())


def test_leaving_a_generation_stops_it_in_the_other_process(remote: EngineClient) -> None:
    async def scenario() -> None:
        handle = await remote.open()
        await handle.append([5, 6, 7])
        async with contextlib.aclosing(handle.generate(ENDLESS)) as chunks:
            async for chunk in chunks:
                assert chunk.finish is None
                break
        await until_idle(remote)
        cancelled = asyncio.ensure_future(generated(handle, ENDLESS))
        await asyncio.sleep(0.05)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        await until_idle(remote)
        at_once = asyncio.ensure_future(generated(handle, ENDLESS))
        await asyncio.sleep(0)
        at_once.cancel()
        await asyncio.wait([at_once])
        await until_idle(remote)
        assert len(ids(await generated(handle, GREEDY))) == 40  # the context itself lives on
        await handle.close()
        assert await opened(remote) == 0

    asyncio.run(scenario())


def test_contexts_nobody_waited_for_are_closed(remote: EngineClient) -> None:
    async def scenario() -> None:
        handle = await remote.open()
        await handle.append([5, 6, 7])
        before = await opened(remote)
        for attempt in range(100):  # cancelled before, while and after the answer comes
            task: asyncio.Task[Any] = asyncio.ensure_future(remote.open() if attempt % 2 else handle.fork(3))
            await asyncio.sleep(attempt * 1e-5)
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                made = task.result()
                for one in made if isinstance(made, list) else [made]:
                    await one.close()
        async with asyncio.timeout(10):  # each is closed when its late answer comes
            while await opened(remote) != before:
                await asyncio.sleep(0.01)
        await handle.close()

    asyncio.run(scenario())


def test_a_generation_whose_event_loop_died_is_stopped(remote: EngineClient) -> None:
    async def abandon() -> None:
        handle = await remote.open()
        await handle.append([5, 6, 7])
        kept.append(handle.generate(ENDLESS))
        await anext(aiter(kept[0]))

    kept: list[Any] = []
    loop = asyncio.new_event_loop()
    loop.run_until_complete(abandon())
    loop.close()
    asyncio.run(until_idle(remote))


def test_two_event_loops_and_many_contexts_at_once(remote: EngineClient) -> None:
    async def one(number: int) -> list[int]:
        handle = await remote.open(f"space-{number}")
        await handle.append([5 + number, 6, 7])
        try:
            return ids(await generated(handle, GREEDY))
        finally:
            await handle.close()

    async def many() -> list[list[int]]:
        return await asyncio.gather(*[one(number) for number in range(24)])

    async def both() -> tuple[list[list[int]], list[list[int]]]:
        first, second = await asyncio.gather(many(), asyncio.to_thread(asyncio.run, many()))
        return first, second

    first, second = asyncio.run(both())
    assert first == second
    assert all(len(tokens) == 40 for tokens in first)


def test_a_hundred_thousand_frames_from_strangers_are_dropped_and_counted(remote: EngineClient) -> None:
    folder = remote._connection.folder
    assert folder is not None
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    files_before = set(os.listdir(folder))
    before = remote.stats()["ipc"]["engine"]
    draw = random.Random(11)
    whole = Channel(bytes(32), sends=TO_ENGINE, receives=TO_CLIENT, inbound=m.Event).pack([m.encode(m.Shutdown(0.0))])[
        0
    ]
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.set_hwm(0)
        stranger.connect(f"ipc://{folder}/{SOCKET_NAME}")
        for number in range(100_000):
            if number % 3 == 0:
                frame = draw.randbytes(draw.randrange(200))
            else:
                damaged = bytearray(whole)
                damaged[draw.randrange(len(damaged))] ^= draw.randrange(1, 256)
                frame = bytes(damaged)
            if number % 10 == 0:
                stranger.send_multipart([frame, frame])
            else:
                stranger.send(frame)

        async def works() -> int:
            handle = await remote.open()
            await handle.append([5, 6, 7])
            chunks = await generated(handle, GREEDY)
            await handle.close()
            return len(ids(chunks))

        assert asyncio.run(works()) == 40  # while the flood goes on
        end = time.monotonic() + 60
        while remote.stats()["ipc"]["engine"]["foreign"] - before["foreign"] < 100_000:
            assert time.monotonic() < end
            time.sleep(0.05)
    after = remote.stats()["ipc"]["engine"]
    assert after["foreign"] - before["foreign"] == 100_000
    assert after["gaps"] == after["malformed"] == after["unauthentic"] == 0
    assert remote.ready
    assert remote.stats()["ipc"]["restarts"] == 0
    assert set(os.listdir(folder)) == files_before


def test_the_client_loads_no_torch() -> None:
    code = "import sys, caesura.runtime.ipc.client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_model_that_cannot_be_loaded_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    missing = tmp_path / "model"
    missing.mkdir()
    with pytest.raises(BrokenCheckpoint, match=r"config\.json|tokenizer"):
        EngineClient.start(EngineConfig(model=str(missing)))
    assert os.listdir(tmp_path) == ["model"]
