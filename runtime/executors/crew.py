"""The processes of a model that is split over several devices: this one's side (``ProcessCrew``) and theirs (``main``).

This process plans, samples and speaks to the engine. The others do what it tells them, in order: load a part, begin
copies, run a step. Orders go through each one's standard input, so that they end with whoever gives them; sums go
through ``torch.distributed``. Everything is framed msgpack.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, TypeVar

import msgspec
import torch
import torch.distributed as dist
from caesura.runtime.errors import EngineStopped
from caesura.runtime.model.cuda.device import Device
from caesura.runtime.model.cuda.layout import Layout
from caesura.runtime.model.cuda.loading import load_part
from caesura.runtime.model.cuda.parallel import Group, ProcessGroup, Shard
from caesura.runtime.model.cuda.runner import Options, Runner, arena_for
from caesura.runtime.model.weights import Model
from caesura.scheduler.types import Move, MoveId

LOAD_DEADLINE_S = 1800.0
JOIN_DEADLINE_S = 300.0
STEP_DEADLINE_S = 120.0  # of a sum that another process does not join
LEAVE_DEADLINE_S = 10.0
T = TypeVar("T")
_LENGTH = struct.Struct("<I")


class Load(msgspec.Struct, frozen=True, tag=True):
    """Load part ``rank`` of ``size``."""

    rank: int
    size: int
    folder: str  # private; where the processes meet
    device: str
    model: str
    dtype: str
    load_format: str
    seed: int
    num_threads: int | None


class Pools(msgspec.Struct, frozen=True, tag=True):
    """Allocate pages and join the others."""

    page_size: int
    num_device_pages: int
    num_host_pages: int
    options: Options


class Begin(msgspec.Struct, frozen=True, tag=True):
    """Begin copies between the tiers. ``done`` are copies that the first process has seen done: what follows comes
    behind them."""

    moves: list[Move]
    done: list[MoveId]


class Step(msgspec.Struct, frozen=True, tag=True):
    """Run a step. ``done`` as for ``Begin``."""

    layout: bytes | None
    copies: list[Move]
    done: list[MoveId]


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The answer to ``Load``: bytes that are free on the device now."""

    free_bytes: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The other answer."""

    reason: str


Order = Load | Pools | Begin | Step


class ProcessCrew:
    """Starts the other processes and tells them what to do. Implements ``torch_cuda.Crew``."""

    def __init__(self, orders: Sequence[Load]) -> None:
        """``orders``: one for each process but this one. Returns when all of them have loaded their parts.

        Raises EngineStopped with the reason of the first that cannot.
        """
        self._folder = Path(orders[0].folder)
        self._members = [_Member(order) for order in orders]
        try:
            self.free_bytes = min(member.loaded() for member in self._members)
        except BaseException:
            self.close()
            raise

    def join(self, pools: Pools, device: Device) -> Group:
        """Let everybody allocate, and meet them."""
        self._tell(pools)
        return join(self._folder, device, 0, len(self._members) + 1)

    def begin(self, moves: Sequence[Move], done: Sequence[MoveId]) -> None:
        self._tell(Begin(list(moves), list(done)))

    def step(self, layout: Layout | None, copies: Sequence[Move], done: Sequence[MoveId]) -> None:
        self._tell(Step(layout.encode() if layout is not None else None, list(copies), list(done)))

    def close(self) -> None:
        """End the processes. Idempotent."""
        for member in self._members:
            member.hang_up()
        if dist.is_initialized() and self._folder.exists():
            leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)  # waits for all to do the same
            leaving.start()
            leaving.join(LEAVE_DEADLINE_S)
        for member in self._members:
            member.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _tell(self, order: Order) -> None:
        frame = _frame(order)
        for member in self._members:
            member.tell(frame)


class _Member:
    """One of the other processes."""

    def __init__(self, order: Load) -> None:
        self._rank = order.rank
        reading, writing = os.pipe()
        try:
            self._process = subprocess.Popen(  # -P: the working folder must not be able to replace a module
                [sys.executable, "-P", "-m", "caesura.runtime.executors.crew", str(writing)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=[writing],
                env=os.environ | _interfaces(),
            )
        finally:
            os.close(writing)
        self._answers = os.fdopen(reading, "rb", buffering=0)
        self.tell(_frame(order))

    def tell(self, frame: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(frame)
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise EngineStopped(f"process {self._rank} of the model has ended ({self._process.poll()})") from None

    def loaded(self) -> int:
        deadline = time.monotonic() + LOAD_DEADLINE_S
        if not select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise EngineStopped(f"process {self._rank} of the model did not load its part in {LOAD_DEADLINE_S:.0f} s")
        answer = _read(self._answers, _ANSWERS)
        if isinstance(answer, Loaded):
            return answer.free_bytes
        why = answer.reason if answer is not None else f"it ended with code {self._process.wait(5.0)}"
        raise EngineStopped(f"process {self._rank} of the model could not load its part: {why}")

    def hang_up(self) -> None:
        """There are no more orders."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with suppress(BrokenPipeError):
                self._process.stdin.close()

    def close(self) -> None:
        self.hang_up()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()


def new_folder() -> str:
    """A folder that only this user may enter, where the processes of one model meet."""
    return tempfile.mkdtemp(prefix="caesura-crew-")


def join(folder: Path, device: Device, rank: int, size: int) -> Group:
    """Meet the other processes. Each of them calls this."""
    with _environment(_interfaces()):
        dist.init_process_group(
            "nccl" if device.is_cuda else "gloo",
            init_method=f"file://{folder}/meeting",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=max(JOIN_DEADLINE_S, STEP_DEADLINE_S)),
            device_id=device.torch if device.is_cuda else None,
        )
    return ProcessGroup()


def _interfaces() -> dict[str, str]:
    """Sums stay on this machine: loopback alone is listened on, unless somebody chose otherwise."""
    return {name: os.environ.get(name, "lo") for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# -- the other processes ----------------------------------------------------------------------------------------------


def main(answers_fd: int) -> None:
    """Do what standard input says, until it ends. Signals meant for whoever gives the orders end nothing here."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    orders = os.fdopen(os.dup(0), "rb", buffering=1 << 16)
    with os.fdopen(answers_fd, "wb", buffering=0) as answers:
        order = _read(orders, _ORDERS)
        if not isinstance(order, Load):
            return
        try:
            device, model, shard = _load(order)
        except Exception as error:
            answers.write(_frame(Failed(f"{type(error).__name__}: {error}")))
            return
        answers.write(_frame(Loaded(device.free_bytes())))
    pools = _read(orders, _ORDERS)
    if not isinstance(pools, Pools):
        return
    arena = arena_for(model, device, pools.page_size, pools.num_device_pages, pools.num_host_pages)
    group = join(Path(order.folder), device, order.rank, order.size)
    runner = Runner(model, shard, arena, device, group, pools.options)
    with torch.inference_mode():
        while (told := _read(orders, _ORDERS)) is not None:
            _obey(runner, told)
    runner.close()
    dist.destroy_process_group()


def _load(order: Load) -> tuple[Device, Model, Shard]:
    device = Device(f"cuda:{order.rank}" if order.device.startswith("cuda") else order.device)
    device.bind()
    if order.num_threads is not None:
        torch.set_num_threads(order.num_threads)
    model, shard = load_part(
        order.model,
        device,
        dtype=order.dtype,
        load_format=order.load_format,
        seed=order.seed,
        rank=order.rank,
        size=order.size,
    )
    return device, model, shard


def _obey(runner: Runner, order: Order) -> None:
    match order:
        case Begin(moves, done):
            runner.arena.wait_behind(done)
            runner.arena.begin(moves)
        case Step(None, copies, done):
            runner.arena.wait_behind(done)
            runner.arena.copy_within(copies)
        case Step(encoded, copies, done) if encoded is not None:
            layout = Layout.decode(encoded)
            runner.arena.wait_behind(done)
            rows = runner.run(layout, copies)
            for _ in runner.score_logits(layout, rows):
                pass
            if len(layout.sampled):
                runner.keep(torch.zeros(len(layout.sampled), dtype=torch.int64, device=runner.device.torch))


# -- frames -----------------------------------------------------------------------------------------------------------

_ORDERS: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
_ANSWERS: msgspec.msgpack.Decoder[Loaded | Failed] = msgspec.msgpack.Decoder(Loaded | Failed)


def _frame(message: object) -> bytes:
    data = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(data)) + data


def _read(stream: IO[bytes], decoder: msgspec.msgpack.Decoder[T]) -> T | None:
    """The next message, None at the end."""
    head = _exactly(stream, _LENGTH.size)
    if head is None:
        return None
    data = _exactly(stream, _LENGTH.unpack(head)[0])
    return None if data is None else decoder.decode(data)


def _exactly(stream: IO[bytes], count: int) -> bytes | None:
    data = b""
    while len(data) < count:
        part = stream.read(count - len(data))
        if not part:
            return None
        data += part
    return data


if __name__ == "__main__":
    main(int(sys.argv[1]))
