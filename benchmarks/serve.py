"""Requests per second and added latency of the HTTP server over the in-process engine, at 1, 16 and 64 clients."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import multiprocessing
import socket
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from caesura.runtime.api import Service
from caesura.runtime.config import EngineConfig
from caesura.runtime.ipc.client import EngineClient
from caesura.runtime.sampling import SamplingParams
from caesura.runtime.service import EngineService
from caesura.scheduler.profile import CostProfile

from benchmarks.common import Bench

CLIENTS = (1, 16, 64)
PROMPT_TOKENS, NEW_TOKENS = 64, 32
FIRST_ID, NUM_IDS = 32, 200  # ordinary tokens of the embedded model
READY_S = 60
# No two requests share a prefix, nothing pauses: no decision depends on the profile, so it need not be measured.
PROFILE = CostProfile(0.001, 1e-5, 0.0, 1e-4, 1e-6, 256)
ENGINE = EngineConfig(kv_tokens=1 << 15, num_threads=1, profile=PROFILE)
PARAMS = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)

Ask = Callable[[list[int]], Awaitable[int]]  # prompt to number of generated tokens
Layer = Callable[[], contextlib.AbstractAsyncContextManager[Ask]]  # what one client asks through
_numbers = itertools.count()


def _prompt() -> list[int]:
    """Token ids that begin as no earlier prompt did."""
    number = next(_numbers)
    digits = [FIRST_ID + number // NUM_IDS**place % NUM_IDS for place in range(4)]
    return digits + [FIRST_ID + (number + position) % NUM_IDS for position in range(PROMPT_TOKENS - len(digits))]


def _through(service: Service) -> Layer:
    @asynccontextmanager
    async def client() -> AsyncIterator[Ask]:
        async def ask(prompt: list[int]) -> int:
            handle = await service.open()
            try:
                await handle.append(prompt)
                return sum([len(chunk.token_ids) async for chunk in handle.generate(PARAMS)])
            finally:
                await handle.close()

        yield ask

    return client


def _over_http(port: int, *, stream: bool) -> Layer:
    """A client with a connection of its own, as small as can be: what it costs itself should not be measured."""
    sampling = {"max_new_tokens": NEW_TOKENS, "temperature": 0.0, "ignore_eos": True}

    @asynccontextmanager
    async def client() -> AsyncIterator[Ask]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        async def ask(prompt: list[int]) -> int:
            body = json.dumps({"input_ids": prompt, "sampling_params": sampling, "stream": stream}).encode()
            head = f"POST /generate HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            answer = await _answer(reader)
            if stream:
                *_, last, done = answer.strip().split(b"\n\n")
                assert done == b"data: [DONE]", done
                answer = last.removeprefix(b"data: ")
            return int(json.loads(answer)["meta_info"]["completion_tokens"])

        try:
            yield ask
        finally:
            writer.close()

    return client


async def _answer(reader: asyncio.StreamReader) -> bytes:
    """The body of one answer, whole or in chunks. Raises RuntimeError for any status but 200."""
    status, _, rest = (await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")
    headers = dict(line.lower().split(b": ", 1) for line in rest.strip().split(b"\r\n"))
    if b" 200 " not in status + b" ":
        raise RuntimeError(f"the server answered {status.decode()}")
    if b"content-length" in headers:
        return await reader.readexactly(int(headers[b"content-length"]))
    parts = []
    while size := int(await reader.readline(), 16):
        parts.append((await reader.readexactly(size + 2))[:-2])
    await reader.readexactly(2)
    return b"".join(parts)


async def _load(layer: Layer, clients: int, each: int) -> tuple[float, list[float]]:
    """Requests per second, and every request's seconds, of ``clients`` that ask ``each`` times in a row."""
    latencies: list[float] = []
    start = asyncio.Event()
    ready = asyncio.Semaphore(0)

    async def run() -> None:
        async with layer() as ask:
            ready.release()
            await start.wait()
            for _ in range(each):
                begun = time.perf_counter()
                tokens = await ask(_prompt())
                latencies.append(time.perf_counter() - begun)
                if tokens != NEW_TOKENS:
                    raise RuntimeError(f"a request gave {tokens} tokens instead of {NEW_TOKENS}")

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(run())
        for _ in range(clients):
            await ready.acquire()
        begun = time.perf_counter()
        start.set()
    return clients * each / (time.perf_counter() - begun), latencies


def _serve(port: int) -> None:
    from caesura.runtime.server import ServerConfig, serve

    serve(ServerConfig(ENGINE, port=port, log_level="warning"))


@contextmanager
def _server() -> Iterator[int]:
    """A server process on the embedded model, with its engine in a process of its own; its port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(port,))
    process.start()
    try:
        for _ in range(READY_S * 20):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if not process.is_alive():
                raise RuntimeError(f"the server ended with code {process.exitcode}")
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.join(30)
        process.kill()


def _measure(bench: Bench, layers: dict[str, Layer], clients: int, each: int, repeats: int) -> None:
    """The layers take turns, so that what else the machine does hits all of them alike."""
    rates: dict[str, list[float]] = {name: [] for name in layers}
    medians: dict[str, list[float]] = {name: [] for name in layers}
    slowest: dict[str, list[float]] = {name: [] for name in layers}
    for number in range(repeats + 1):
        for name, layer in layers.items():
            rate, latencies = asyncio.run(_load(layer, clients, each))
            if number:  # the first round warms up
                rates[name].append(rate)
                medians[name].append(statistics.median(latencies))
                slowest[name].append(statistics.quantiles(latencies, n=20)[-1] if len(latencies) > 1 else latencies[0])
    base = next(iter(layers))
    for name in layers:
        details = {"clients": clients, "layer": name, "requests": clients * each}
        record = (f"{name} x{clients}: rate", f"{base} x{clients}: rate")
        bench.record(record[0], rates[name], unit="/s", baseline=record[1], details=details)
    for name in layers:
        details = {"clients": clients, "layer": name, "p95_s": statistics.median(slowest[name])}
        record = (f"{name} x{clients}: latency", f"{base} x{clients}: latency")
        bench.record(record[0], medians[name], unit="s", baseline=record[1], details=details)
    for name in list(layers)[1:]:
        added = [mine - theirs for mine, theirs in zip(medians[name], medians[base], strict=True)]
        bench.record(f"{name} x{clients}: added", added, unit="s", details={"clients": clients, "layer": name})


def run(bench: Bench, *, quick: bool) -> None:
    """The same requests to the engine in this process, in one behind ZeroMQ, and behind HTTP, whole and streamed."""
    repeats = 1 if quick else 5
    bench.configure(prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS, model=ENGINE.model, engine_threads=1)
    with EngineService.start(ENGINE) as service, EngineClient.start(ENGINE) as client, _server() as port:
        layers = {
            "in process": _through(service),
            "engine process": _through(client),
            "HTTP": _over_http(port, stream=False),
            "HTTP stream": _over_http(port, stream=True),
        }
        for clients in CLIENTS:
            _measure(bench, layers, clients, max(2, (32 if quick else 64) // clients), repeats)
    bench.note(
        f"{PROMPT_TOKENS} prompt and {NEW_TOKENS} new tokens a request, nothing cached. Latency: the median request of "
        "each repeat; added: the same less the in-process engine's of that repeat. Clients, server and engine share "
        "the cores, and the in-process engine shares its interpreter with its clients."
    )
