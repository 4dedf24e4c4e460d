"""SEC-03: damaged, spliced and replayed frames of a real conversation at the engine's socket: dropped and counted.

The flood of a hundred thousand frames from strangers is in ``test_ipc_engine.py``; here they come from the client's own
address, or before the client has spoken, so that only the frames' tags can tell.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import zmq
from caesura.runtime.ipc import messages as m
from caesura.runtime.ipc import process
from caesura.runtime.ipc.channel import Channel
from caesura.runtime.sampling import SamplingParams

from tests.integration.test_ipc_process import Line, kinds, running

GREEDY = SamplingParams(max_new_tokens=24, temperature=0.0, ignore_eos=True)


def recorded() -> list[bytes]:
    """Frames as a client writes them, sealed with another key."""
    channel: Channel[m.Event] = Channel(bytes(32), sends=process.TO_ENGINE, receives=process.TO_CLIENT, inbound=m.Event)
    commands: list[m.Command] = [m.Open(1, "", None), m.Stats(2), m.Shutdown(0.0), m.Generate(3, 1, GREEDY, None)]  # type: ignore[arg-type]
    return [frame for command in commands for frame in channel.pack([m.encode(command)])] + [channel.note()]


def damaged(draw: random.Random, real: list[bytes]) -> bytes:
    """A frame that is none: noise, a flipped byte, a cut, a splice, a foreign tag."""
    one, other = draw.choice(real), draw.choice(real)
    match draw.randrange(5):
        case 0:
            return draw.randbytes(draw.randrange(300))
        case 1:
            at = draw.randrange(len(one))
            return one[:at] + bytes([one[at] ^ draw.randrange(1, 256)]) + one[at + 1 :]
        case 2:
            return one[: draw.randrange(len(one))]
        case 3:
            return one + draw.randbytes(draw.randrange(1, 40))
        case _:
            return draw.randbytes(16) + other[16:]


async def counts_of(line: Line, request: int) -> dict[str, int]:
    line.send(m.Stats(request))
    await line.until(lambda heard: any(isinstance(e, m.Account) and e.request == request for e in heard))
    found = next(e for e in line.heard if isinstance(e, m.Account) and e.request == request)
    ipc: dict[str, int] = found.values["ipc"]
    return ipc


async def generate(line: Line, request: int) -> list[int]:
    """Open a context, generate greedily, close."""
    line.send(m.Open(request, "", None))
    await line.until(lambda heard: any(isinstance(e, m.Opened) and e.request == request for e in heard))
    context = next(e.context for e in line.heard if isinstance(e, m.Opened) and e.request == request)
    line.send(m.Append(request + 1, context, (5, 6, 7)), m.Generate(request + 2, context, GREEDY, None))

    def done(heard: list[m.Event]) -> bool:
        return any(isinstance(e, m.Chunk) and e.request == request + 2 and e.chunk.finish for e in heard)

    await line.until(done)
    line.send(m.Close(context))
    chunks = [e.chunk for e in line.heard if isinstance(e, m.Chunk) and e.request == request + 2]
    return [token for chunk in chunks for token in chunk.token_ids]


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_sec_03_damaged_frames_from_the_clients_own_address_are_dropped_and_counted(tmp_path: Path, count: int) -> None:
    draw = random.Random(5)

    async def scenario() -> None:
        async with running(tmp_path) as (line, _):
            line.send(m.Ping())
            await line.until(lambda heard: m.Ready in kinds(heard))
            expected = await generate(line, 100)
            before = await counts_of(line, 1)
            line.socket.set_hwm(0)
            mine = line.channel.pack([m.encode(m.Ping())])
            for frame in mine:
                line.socket.send(frame)
            real = recorded() + mine
            num_bad = num_replayed = 0
            for number in range(count):
                if number % 20 == 0:  # an honest frame a second time
                    line.socket.send(mine[0])
                    num_replayed += 1
                else:
                    line.socket.send(damaged(draw, real))
                    num_bad += 1
                if number % 1000 == 0:
                    await asyncio.sleep(0)
            assert await generate(line, 200) == expected
            after = await counts_of(line, 2)
            assert after["unauthentic"] - before["unauthentic"] == num_bad
            assert after["repeated"] - before["repeated"] == num_replayed
            assert after["malformed"] == 0
            line.send(m.Shutdown(0.0))

    asyncio.run(scenario())


def test_sec_03_nobody_becomes_the_client_by_speaking_first_or_under_its_name(tmp_path: Path) -> None:
    draw = random.Random(6)

    address = f"ipc://{tmp_path}/{process.SOCKET_NAME}"

    async def scenario(early: zmq.Socket[bytes], double: zmq.Socket[bytes]) -> None:
        async with running(tmp_path) as (line, _):
            real = recorded()
            line.socket.disconnect(address)
            line.socket.setsockopt(zmq.ROUTING_ID, b"the client")
            early.connect(address)
            for _ in range(5_000):
                early.send(damaged(draw, real))
            await asyncio.sleep(0.05)
            line.socket.connect(address)
            line.send(m.Ping())
            await line.until(lambda heard: m.Ready in kinds(heard))
            counts = await counts_of(line, 1)
            assert counts["unauthentic"] + counts["foreign"] == 5_000
            assert counts["unauthentic"] > 0
            double.setsockopt(zmq.ROUTING_ID, b"the client")
            double.connect(address)
            for frame in real * 100:
                double.send(frame)
            assert len(await generate(line, 100)) == GREEDY.max_new_tokens
            counts = await counts_of(line, 2)
            assert counts["malformed"] == counts["gaps"] == 0
            with pytest.raises(zmq.Again):
                double.recv(zmq.NOBLOCK)
            line.send(m.Shutdown(0.0))

    sockets = [zmq.Context.instance().socket(zmq.DEALER) for _ in range(2)]
    try:
        for socket in sockets:
            socket.setsockopt(zmq.LINGER, 0)
            socket.set_hwm(0)
        asyncio.run(scenario(*sockets))
    finally:
        for socket in sockets:
            socket.close()
