"""The torch executor and its arenas: page copies, scoring, and failures that stay with their own slice."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from caesura.runtime.errors import BrokenInvariant, NotEnoughMemory
from caesura.runtime.executors.base import Executor, SliceInput
from caesura.runtime.executors.torch_cpu import TorchExecutor
from caesura.runtime.kv import arena as arena_module
from caesura.runtime.kv.arena import KvArena
from caesura.runtime.model import load_model, memory
from caesura.runtime.sampling import SamplerState, SamplingParams
from caesura.scheduler.types import ContextId, Move, MoveId, MoveKind, PageId

from tests.integration.model_checkpoints import drive, make_executor, make_reference, make_runs, save

PROMPT = [5, 9, 33, 12, 80, 41, 7, 7, 19, 60, 3, 22, 50, 11, 90, 4, 66, 70, 31, 8]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(save(make_reference("llama3"), tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture
def executor(model: Any) -> Iterator[TorchExecutor]:
    made = make_executor(model, 4, num_tokens=256, num_host_pages=24)
    yield made
    made.close()


def make_arena(page_size: int = 4, device: int = 12, host: int = 9) -> KvArena:
    arena = KvArena(
        num_layers=2,
        kv_heads=2,
        head_dim=4,
        page_size=page_size,
        num_device_pages=device,
        num_host_pages=host,
        dtype=torch.float32,
    )
    generator = torch.Generator().manual_seed(0)
    arena.device.normal_(generator=generator)
    arena.host.normal_(generator=generator)
    return arena


def move(number: int, kind: MoveKind, source: list[int], target: list[int]) -> Move:
    return Move(MoveId(number), kind, tuple(map(PageId, source)), tuple(map(PageId, target)))


def settle(target: KvArena | TorchExecutor, count: int) -> list[MoveId]:
    done: list[MoveId] = []
    while len(done) < count:
        fresh = target.acknowledged(wait_s=5.0)
        assert fresh, "a copy was never acknowledged"
        done += fresh
    return done


def state(**params: Any) -> SamplerState:
    return SamplerState(SamplingParams(**{"temperature": 0.0, **params}), seed=1)


def piece(tokens: list[int], start: int, pages: list[int], **fields: Any) -> SliceInput:
    return SliceInput(ContextId(fields.pop("context", 0)), tokens, start, pages, fields.pop("sampler", None), **fields)


def test_the_executor_fulfils_the_protocol(executor: TorchExecutor) -> None:
    checked: Executor = executor
    assert checked.page_bytes == 2 * 3 * 4 * 2 * 16 * 4  # K and V, layers, page, kv heads, head dim, float32
    assert checked.max_context_tokens == 512


@pytest.mark.parametrize("page_size", [1, 4, 64])
def test_a_swap_round_trip_is_bit_exact_and_touches_nothing_else(page_size: int) -> None:
    arena = make_arena(page_size)
    device, host = arena.device.clone(), arena.host.clone()
    # runs of neighbours, single pages and reversed order; every other page is a guard
    source, parked, target = [2, 3, 4, 9, 7, 6], [1, 2, 3, 6, 8, 5], [6, 7, 2, 3, 9, 4]
    arena.begin([move(1, MoveKind.OUT, source, parked)])
    assert settle(arena, 1) == [1]
    assert torch.equal(arena.device, device)
    assert torch.equal(arena.host[:, :, parked], device[:, :, source])
    guards = [page for page in range(9) if page not in parked]
    assert torch.equal(arena.host[:, :, guards], host[:, :, guards])
    arena.device[:, :, source] = 0.0
    arena.begin([move(2, MoveKind.IN, parked, target)])
    assert settle(arena, 1) == [2]
    assert torch.equal(arena.device[:, :, target], device[:, :, source])
    guards = [page for page in range(12) if page not in source + target]
    assert torch.equal(arena.device[:, :, guards], device[:, :, guards])
    arena.close()
    arena.close()


def test_moves_are_acknowledged_once_and_in_order() -> None:
    arena = make_arena()
    assert arena.acknowledged(wait_s=5.0) == []  # nothing in flight: no wait
    arena.begin([move(n, MoveKind.OUT, [n], [n]) for n in range(1, 6)])
    assert settle(arena, 5) == [1, 2, 3, 4, 5]
    assert arena.acknowledged() == []
    arena.close()


def test_copies_run_beside_the_caller_and_close_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    original, gate, threads = arena_module._copy_pages, threading.Event(), []

    def held(*args: Any) -> None:
        threads.append(threading.current_thread().name)
        assert gate.wait(10)
        original(*args)

    monkeypatch.setattr(arena_module, "_copy_pages", held)
    arena = make_arena()
    expected = arena.device[:, :, 3].clone()
    host = arena.host
    arena.begin([move(1, MoveKind.OUT, [3], [0])])
    assert arena.acknowledged() == []
    assert arena.acknowledged(wait_s=0.01) == []
    gate.set()
    arena.close()
    assert torch.equal(host[:, :, 0], expected)
    assert threads == ["caesura-kv-copy"]


def test_a_failed_copy_reaches_the_engine_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such memory")

    monkeypatch.setattr(arena_module, "_copy_pages", fail)
    arena = make_arena()
    arena.begin([move(1, MoveKind.OUT, [3], [0])])
    with pytest.raises(BrokenInvariant, match="no such memory"):
        arena.acknowledged(wait_s=5.0)
    arena.close()


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (move(1, MoveKind.OUT, [12], [0]), "source page"),
        (move(1, MoveKind.OUT, [0], [9]), "target page"),
        (move(1, MoveKind.IN, [9], [0]), "source page"),
        (move(1, MoveKind.IN, [-1], [0]), "source page"),
        (move(1, MoveKind.OUT, [1, 2], [0]), "2 sources, 1 targets"),
        (move(1, MoveKind.COPY, [1], [0]), "copy_within"),
    ],
)
def test_page_ids_are_checked_before_a_copy_begins(bad: Move, says: str) -> None:
    arena = make_arena()
    with pytest.raises(BrokenInvariant, match=says):
        arena.begin([bad])
    arena.close()


def test_pools_that_cannot_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: 1 << 10)
    with pytest.raises(NotEnoughMemory, match="12 device and 9 host pages"):
        make_arena()
    with pytest.raises(BrokenInvariant, match="page_size 65"):
        make_arena(page_size=65)


def test_generation_goes_on_after_a_swap_into_other_pages(executor: TorchExecutor) -> None:
    expected = drive(executor, make_runs([PROMPT], 8, 64, 4))[0]
    run = make_runs([PROMPT], 8, 64, 4)[0]
    run.goal = 3
    tokens = drive(executor, [run])[0]
    used = run.pages[: -(-run.computed // 4)]
    parked = [PageId(page) for page in range(3, 3 + len(used))]
    executor.begin([Move(MoveId(1), MoveKind.OUT, tuple(used), tuple(parked))])
    settle(executor, 1)
    executor.arena.device[:, :, 1 : 1 + len(run.pages)] = 7.0  # what was there is gone
    moved = [PageId(40 + 2 * index) for index in range(len(run.pages))]
    executor.begin([Move(MoveId(2), MoveKind.IN, tuple(parked), tuple(moved[: len(used)]))])
    settle(executor, 1)
    run.pages, run.goal = moved, 8
    tokens += drive(executor, [run])[0]
    assert tokens == expected


def test_copies_on_the_device_come_before_compute(executor: TorchExecutor) -> None:
    """Two contexts share a full page; the partial one is copied for the second in the step that writes to it."""
    executor.execute([piece(PROMPT[:6], 0, [1, 2])], [])
    copy = move(1, MoveKind.COPY, [2], [5])
    result = executor.execute(
        [
            piece([17], 6, [1, 2], sampler=state()),
            piece([71], 6, [1, 5], context=1, sampler=state()),
        ],
        [copy],
    )
    for branch, output in zip((17, 71), result.outputs, strict=True):
        alone = executor.execute([piece([*PROMPT[:6], branch], 0, [8, 9], sampler=state())], [])
        assert output.sampled == alone.outputs[0].sampled


def test_scores_are_logprobs_of_successors(model: Any, executor: TorchExecutor) -> None:
    targets = [(row, PROMPT[row + 1]) for row in range(4, 19)]
    whole = executor.execute([piece(PROMPT, 0, [1, 2, 3, 4, 5], score_targets=targets)], []).outputs[0].scores
    executor.execute([piece(PROMPT[:7], 0, [6, 7])], [])
    later = [(row - 7, token) for row, token in targets if row >= 7]
    other = piece([50, 51], 0, [20], context=2, score_targets=[(1, 3), (0, 51), (0, 3)])
    mixed = executor.execute([other, piece(PROMPT[7:], 7, [6, 7, 8, 9, 10], score_targets=later)], [])
    assert mixed.outputs[1].scores == pytest.approx(whole[3:], abs=1e-5)
    assert len(mixed.outputs[0].scores) == 3
    greedy = executor.execute([piece(PROMPT, 0, [1, 2, 3, 4, 5], sampler=state(logprobs=0))], []).outputs[0].sampled
    assert greedy is not None
    scored = executor.execute([piece(PROMPT, 0, [1, 2, 3, 4, 5], score_targets=[(19, greedy.token_id)])], [])
    assert scored.outputs[0].scores[0] == pytest.approx(greedy.logprob, abs=1e-5)


def test_a_broken_grammar_fails_its_own_slice_alone(executor: TorchExecutor) -> None:
    class Raising:
        stopped = False

        def fill_mask(self, row: Any) -> None:
            raise RuntimeError("limit reached")

        def accept(self, token_id: int) -> None: ...

    class Closed(Raising):
        def fill_mask(self, row: Any) -> None:
            row[:] = 0

    raising, closed = state(), state()
    raising.matcher, closed.matcher = Raising(), Closed()
    samplers = [state(), raising, state(temperature=1.0), closed]
    slices = [
        piece(PROMPT, 0, list(range(1 + 5 * index, 6 + 5 * index)), context=index, sampler=sampler)
        for index, sampler in enumerate(samplers)
    ]
    outputs = executor.execute(slices, []).outputs
    assert outputs[0].sampled is not None
    assert outputs[2].sampled is not None
    assert outputs[1].sampled is None
    assert "limit reached" in str(outputs[1].failure)
    assert "allows no further token" in str(outputs[3].failure)


def test_numbers_that_are_not_finite_stay_with_their_context(executor: TorchExecutor) -> None:
    expected = executor.execute([piece(PROMPT, 0, [6, 7, 8, 9, 10], sampler=state())], []).outputs[0].sampled
    executor.execute([piece(PROMPT[:4], 0, [1])], [])
    executor.arena.device[:, :, 1] = float("nan")
    outputs = executor.execute(
        [
            piece(PROMPT[4:], 4, [1, 2, 3, 4, 5], sampler=state()),
            piece(PROMPT, 0, [6, 7, 8, 9, 10], context=1, sampler=state()),
        ],
        [],
    ).outputs
    assert "not finite" in str(outputs[0].failure)
    assert outputs[1].sampled == expected
    assert torch.isfinite(executor.arena.device[:, :, 2:]).all()  # nothing is left for the pages' next owner


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (piece([1], 0, []), "need 1 pages"),
        (piece([1] * 5, 0, [1]), "need 2 pages"),
        (piece([], 0, [1]), "0 tokens"),
        (piece([97], 0, [1]), "token id"),
        (piece([-1], 0, [1]), "token id"),
        (piece([1], 0, [4096]), "page"),
        (piece([1], 0, [1], score_targets=[(1, 1)]), "score target"),
    ],
)
def test_slices_that_do_not_fit_are_named(executor: TorchExecutor, bad: SliceInput, says: str) -> None:
    with pytest.raises(BrokenInvariant, match=says):
        executor.execute([bad], [])


def test_padding_of_the_vocabulary_is_never_sampled(model: Any) -> None:
    limited = make_executor(model, 4, num_tokens=128, vocab_limit=10)
    runs = make_runs([PROMPT, PROMPT[:3]], 12, 64, 4, temperature=2.0)
    assert max(token.token_id for tokens in drive(limited, runs) for token in tokens) < 10
    limited.close()


def test_sampled_output_does_not_depend_on_the_batch(model: Any) -> None:
    prompts = [PROMPT, PROMPT[3:9], PROMPT[::-1]]
    settings = {"temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.2, "min_new_tokens": 4}
    executor = make_executor(model, 4, deterministic=True)
    together = drive(executor, make_runs(prompts, 24, 64, 4, **settings))
    runs = make_runs(prompts, 24, 5, 4, **settings)
    assert drive(executor, runs, max_batch=1) == together
    executor.close()
