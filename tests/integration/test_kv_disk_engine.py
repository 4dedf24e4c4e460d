"""The disk tier with tensors: pages bit for bit, faults that concern one copy, and a real model that uses it."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from caesura.runtime import calibrate
from caesura.runtime.build import build
from caesura.runtime.config import EngineConfig
from caesura.runtime.errors import BrokenInvariant, InvalidRequest
from caesura.runtime.kv import arena as arena_module
from caesura.runtime.kv.arena import KvArena
from caesura.runtime.kv.ledger import KVLedger
from caesura.runtime.kv.pagefile import PageFile
from caesura.scheduler.types import Move, MoveId, MoveKind, PageId

from tests.integration.test_identical_output import ClockedExecutor, tiny_model
from tests.sim.agents import PROFILE, World, populate

OUT, IN, DOWN = MoveKind.OUT, MoveKind.IN, MoveKind.DOWN
HOST, DISK = 4, 8  # pages; the disk's rows are 4 to 11


def make_arena(folder: Path, dtype: torch.dtype = torch.float32) -> KvArena:
    arena = KvArena(
        num_layers=2,
        kv_heads=2,
        head_dim=4,
        page_size=4,
        num_device_pages=12,
        num_host_pages=HOST,
        dtype=dtype,
        disk_folder=folder,
        num_disk_pages=DISK,
    )
    generator = torch.Generator().manual_seed(0)
    arena.device.normal_(generator=generator)
    return arena


def copy(arena: KvArena, kind: MoveKind, source: list[int], target: list[int]) -> bool:
    """Make one copy; was it made?"""
    arena.begin([Move(MoveId(1), kind, tuple(map(PageId, source)), tuple(map(PageId, target)))])
    assert arena.acknowledged(wait_s=5.0) == [1]
    return not arena.take_failed()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_pages_come_back_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk_bytes: int
) -> None:
    monkeypatch.setattr(arena_module, "CHUNK_BYTES", chunk_bytes)
    arena = make_arena(tmp_path, dtype)
    before = arena.device.clone()
    # runs of neighbours, single pages, reversed order, and a run over the border of memory and disk
    source, below = [2, 3, 4, 9, 7, 6, 0, 1], [5, 6, 7, 11, 10, 9, 3, 4]
    assert copy(arena, OUT, source, below)
    assert torch.equal(arena.device, before)
    assert copy(arena, DOWN, [3], [8])
    arena.device[:, :, source] = 0.0
    assert copy(arena, IN, [*below[:6], 8, 4], source)
    assert torch.equal(arena.device, before)
    arena.close()
    assert not list(tmp_path.iterdir())


def test_a_page_that_changed_fails_its_copy_alone(tmp_path: Path) -> None:
    arena = make_arena(tmp_path)
    assert copy(arena, OUT, [0, 1, 2], [4, 6, 8])
    before = arena.device.clone()
    assert arena._file is not None
    os.pwrite(arena._file._file.fileno(), b"\x01\x02\x03", 2 * arena.page_bytes + 7)
    arena.begin([Move(MoveId(n), IN, (PageId(4 + 2 * n),), (PageId(6 + n),)) for n in range(3)])
    done: list[MoveId] = []
    while len(done) < 3:
        done += arena.acknowledged(wait_s=5.0)
    assert (done, arena.take_failed(), arena.take_failed()) == ([0, 1, 2], {1}, frozenset())
    assert torch.equal(arena.device[:, :, [6, 8]], before[:, :, [0, 2]])
    assert torch.equal(arena.device[:, :, 7], before[:, :, 7]), "a bad page was copied in"
    arena.close()


def test_a_disk_that_is_full_fails_its_copy_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    arena = make_arena(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(PageFile, "write", full)
        assert not copy(arena, OUT, [0], [4])
    assert copy(arena, OUT, [0], [0])
    assert copy(arena, DOWN, [0], [4])
    arena.close()


def gated(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written to a file before the event is set."""
    gate, write = threading.Event(), PageFile.write

    def held(file: PageFile, first: int, data: memoryview) -> None:
        assert gate.wait(10)
        write(file, first, data)

    monkeypatch.setattr(PageFile, "write", held)
    return gate


def move(number: int, kind: MoveKind, source: int, target: int, count: int) -> Move:
    ends = (tuple(PageId(first + page) for page in range(count)) for first in (source, target))
    return Move(MoveId(number), kind, *ends)


def test_a_short_copy_is_not_held_up_by_a_long_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "CHUNK_BYTES", 1)
    gate = gated(monkeypatch)
    arena = make_arena(tmp_path)
    arena.begin([move(1, OUT, 0, HOST, 6), move(2, OUT, 9, HOST + 6, 1)])
    gate.set()
    done: list[MoveId] = []
    while len(done) < 2:
        done += arena.acknowledged(wait_s=5.0)
    assert done == [2, 1]
    arena.close()


def test_a_disk_that_makes_one_wait_holds_up_no_copy_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = gated(monkeypatch)
    arena = make_arena(tmp_path)
    arena.begin([move(1, OUT, 0, HOST, 6), move(2, OUT, 9, 0, 1)])
    assert arena.acknowledged(wait_s=5.0) == [2]
    gate.set()
    assert arena.acknowledged(wait_s=5.0) == [1]
    arena.close()


@pytest.mark.parametrize(("kind", "source", "target"), [(OUT, 0, 12), (IN, 12, 0), (DOWN, 4, 5), (DOWN, 0, 12)])
def test_rows_that_do_not_exist_are_refused(tmp_path: Path, kind: MoveKind, source: int, target: int) -> None:
    arena = make_arena(tmp_path)
    with pytest.raises(BrokenInvariant, match="page lies outside"):
        arena.begin([Move(MoveId(1), kind, (PageId(source),), (PageId(target),))])
    arena.close()


def transcripts(folder: Path, host_pages: int, disk_pages: int, *, spoil: bool = False) -> World:
    """A crowd of agents on a real model in a small pool. ``spoil`` changes bytes of the file every few steps."""
    executors: list[ClockedExecutor] = []

    def on_model(world: World) -> ClockedExecutor:
        executor = ClockedExecutor(
            tiny_model(),
            page_size=world.page_size,
            num_device_pages=world.device_pages,
            num_host_pages=host_pages,
            eos_ids=(),
            deterministic=True,
            kv_disk=folder,
            num_disk_pages=disk_pages,
        )
        executor.world = world
        executors.append(executor)
        return executor

    profile = replace(PROFILE, disk_base_s=0.0002, disk_token_s=0.00002)
    world = World("swap", 5, device_pages=24 if disk_pages else 1024, profile=profile, make_executor=on_model)
    [executor] = executors
    steps = 0

    def check() -> None:
        nonlocal steps
        steps += 1
        file = executor.arena._file
        if spoil and file is not None and steps % 7 == 0:
            for page in range(disk_pages):
                os.pwrite(file._file.fileno(), b"\x55" * 16, page * executor.page_bytes + 100)

    world.sim._on_step = check
    populate(world, 16, within_s=0.2)
    world.settle()
    executor.close()
    return world


def test_a_real_model_says_the_same_with_a_disk_and_with_one_that_rots(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    ample = transcripts(tmp_path, 0, 0)
    for host_pages in (0, 8):
        world = transcripts(tmp_path, host_pages, 80)
        assert world.transcripts == ample.transcripts
        assert world.engine.scheduler.meter.pages_from_disk > 0
        assert world.engine.scheduler.meter.copies_failed == 0
    rotten = transcripts(tmp_path, 0, 80, spoil=True)
    assert rotten.transcripts == ample.transcripts
    assert rotten.engine.scheduler.meter.copies_failed > 0


def test_the_engine_is_built_with_a_measured_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "BUDGET_S", 0.05)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = EngineConfig(kv_tokens=512, host_kv_tokens=0, num_threads=1, native=False)
    engine = build(replace(small, kv_disk=str(tmp_path))).engine
    assert isinstance(engine.ledger, KVLedger)
    assert engine.ledger.num_disk_pages == 8 * engine.ledger.num_device_pages
    assert engine.scheduler.profile.disk_token_s > 0
    engine.executor.close()
    given = replace(small, kv_disk=str(tmp_path), kv_disk_tokens=640, profile=PROFILE)
    engine = build(given).engine
    assert engine.ledger.num_disk_pages == 40
    assert engine.scheduler.profile.token_s == PROFILE.token_s
    assert engine.scheduler.profile.disk_token_s > 0
    engine.executor.close()
    with pytest.raises(InvalidRequest, match="kv_disk names no folder"):
        build(replace(small, kv_disk_tokens=640))
    with pytest.raises(InvalidRequest, match="must be a writable folder"):
        build(replace(small, kv_disk=str(tmp_path / "nowhere")))
