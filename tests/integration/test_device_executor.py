"""The executor for GPUs, run on the CPU: the tokens of the CPU's own executor, in every batch, swap and order."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from caesura.runtime.embedded import checkpoint_path
from caesura.runtime.errors import BrokenInvariant, UnsupportedModel
from caesura.runtime.executors.base import ExecOutput, OverlappingExecutor, SliceInput
from caesura.runtime.executors.torch_cuda import CudaExecutor
from caesura.runtime.model import load_model
from caesura.runtime.model.cuda.device import Device
from caesura.runtime.model.weights import Model
from caesura.runtime.sampling import SamplerState, SamplingParams
from caesura.scheduler.policies import POLICIES
from caesura.scheduler.types import TOKEN_TO_COME, ContextId, Move, MoveId, MoveKind, PageId

from tests.integration.device_executor import make_arena, make_device_executor
from tests.integration.model_checkpoints import CHECKPOINTS, drive, make_executor, make_reference, make_runs, save
from tests.integration.test_identical_output import tiny_model
from tests.sim.agents import PROFILE, World, populate

PROMPTS = [
    [5, 9, 33, 12, 80, 41, 7, 7, 19, 60, 3, 22, 50, 11, 90, 4, 66, 70, 31, 8],
    [44, 3],
    [5, 9, 33, 12, 80, 41, 7, 7, 1],
    list(range(20, 60)),
]


@lru_cache(maxsize=1)
def llama() -> Model:
    """A Llama of 3 layers, as the other tests of executors use."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return load_model(save(make_reference("llama3"), Path(folder)))


def tokens_of(executor: Any, prompts: Sequence[Sequence[int]] = PROMPTS, **params: Any) -> list[list[int]]:
    runs = make_runs(prompts, 12, params.pop("chunk", 7), executor.page_size, **params)
    found = [[token.token_id for token in sampled] for sampled in drive(executor, runs)]
    executor.close()
    return found


@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_every_architecture_yields_the_tokens_of_the_cpu_path(name: str, tmp_path: Path) -> None:
    model = load_model(save(make_reference(name), tmp_path))
    expected = tokens_of(make_executor(model, 4, native=False))
    assert tokens_of(make_device_executor(model, 4)) == expected
    assert tokens_of(make_device_executor(model, 16), chunk=40) == expected


def test_a_closed_executor_holds_neither_weights_nor_cache(tmp_path: Path) -> None:
    """Whoever still knows it: the next engine of this process needs the room."""
    executor = make_device_executor(load_model(save(make_reference("llama3"), tmp_path)), 4)
    held = [weakref.ref(executor.runner.decoder.model.embeddings), weakref.ref(executor.runner.cache.pages)]
    assert all(one() is not None for one in held)
    for _ in range(2):
        executor.close()
    gc.collect()
    assert [one() for one in held] == [None, None]


def test_the_embedded_model_yields_the_tokens_of_the_c_decoder() -> None:
    model = load_model(checkpoint_path())
    prompts = [list(range(300, 340)), list(range(500, 507)), [9, 8, 7]]
    assert tokens_of(make_device_executor(model, 16), prompts) == tokens_of(make_executor(model, 16), prompts)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.8},
        {"temperature": 1.3, "min_p": 0.05},
        {"temperature": 0.7, "min_new_tokens": 12},
        {"temperature": 1.0, "frequency_penalty": 0.7, "top_p": 0.9},  # worked out on the host, in both
        {"temperature": 0.9, "logprobs": 2, "top_k": 5},
        {"temperature": 0.0, "repetition_penalty": 1.3},
    ],
)
def test_drawn_tokens_are_those_of_the_host_sampler(params: dict[str, Any]) -> None:
    expected = tokens_of(make_executor(llama(), 4, native=False), **params)
    assert tokens_of(make_device_executor(llama(), 4), **params) == expected


def test_logprobs_and_scores_are_those_of_the_cpu_path() -> None:
    targets = [(row, PROMPTS[0][row + 1]) for row in range(4, 19)]
    sampler = SamplerState(SamplingParams(temperature=0.0, logprobs=2), seed=1)
    pages = [PageId(page) for page in range(3, 8)]
    piece = SliceInput(ContextId(1), PROMPTS[0], 0, pages, sampler, targets, 3)
    outputs = []
    for executor in (make_executor(llama(), 4, native=False), make_device_executor(llama(), 4)):
        outputs.append(executor.execute([piece], ()).outputs[0])
        executor.close()
    expected, found = outputs
    assert found.scores == pytest.approx(expected.scores, abs=1e-5)
    assert [[token for token, _ in top] for top in found.score_tops] == [
        [token for token, _ in top] for top in expected.score_tops
    ]
    assert found.sampled is not None and expected.sampled is not None
    assert found.sampled.token_id == expected.sampled.token_id
    assert found.sampled.logprob == pytest.approx(expected.sampled.logprob, abs=1e-5)


def sampler(**params: Any) -> SamplerState:
    return SamplerState(SamplingParams(**{"temperature": 0.0, **params}), seed=1)


def test_a_step_runs_on_the_token_that_the_step_before_is_still_sampling() -> None:
    for params in ({}, {"temperature": 1.0}):
        plain, ahead = make_device_executor(llama(), 4), make_device_executor(llama(), 4)
        checked: OverlappingExecutor = ahead
        pages = [PageId(page) for page in range(1, 9)]
        state = sampler(**params)
        expected: list[int] = []
        tokens = list(PROMPTS[0])
        for _ in range(6):
            start = len(tokens) - 1 if expected else 0
            out = plain.execute([SliceInput(ContextId(0), tokens[start:], start, pages, state)], ()).outputs[0]
            assert out.sampled is not None
            state.accept(out.sampled.token_id)
            tokens.append(out.sampled.token_id)
            expected.append(out.sampled.token_id)
        found: list[int] = []
        state = sampler(**params)
        ticket = checked.launch([SliceInput(ContextId(0), PROMPTS[0], 0, pages, state)], ())
        for step in range(6):
            start = len(PROMPTS[0]) + step
            following = checked.launch([SliceInput(ContextId(0), [TOKEN_TO_COME], start, pages, state)], ())
            out = checked.collect(ticket).outputs[0]
            assert out.sampled is not None
            state.accept(out.sampled.token_id)
            found.append(out.sampled.token_id)
            ticket = following
        assert found == expected
        plain.close()
        ahead.close()


def test_what_does_not_fit_is_refused_before_anything_is_computed() -> None:
    executor = make_device_executor(llama(), 4)
    pages = [PageId(1), PageId(2)]
    for bad, says in [
        (SliceInput(ContextId(3), [1] * 9, 0, pages, None), "need 3 pages of 4"),
        (SliceInput(ContextId(3), [1, 97], 0, pages, None), r"token id lies outside \[0, 97\): 97"),
        (SliceInput(ContextId(3), [1], 0, [PageId(9999)], None), "outside"),
        (SliceInput(ContextId(3), [TOKEN_TO_COME], 3, pages, None), "no step samples it"),
        (SliceInput(ContextId(3), [1], 0, pages, None, [(1, 5)]), "score target"),
        (SliceInput(ContextId(3), [1], 0, pages, None, [(0, 97)]), "score target"),
    ]:
        with pytest.raises(BrokenInvariant, match=says):
            executor.execute([SliceInput(ContextId(1), [5, 6], 0, [PageId(5)], None), bad], ())
    executor.close()
    with pytest.raises(UnsupportedModel, match="tpu"):
        Device("tpu:0")


def test_a_context_that_breaks_leaves_the_others_and_its_pages_clean() -> None:
    executor = make_device_executor(llama(), 4)
    executor.execute([SliceInput(ContextId(0), PROMPTS[0][:4], 0, [PageId(1)], None)], ())
    executor.runner.arena.pages[1] = float("nan")
    sick = SliceInput(ContextId(0), PROMPTS[0][4:8], 4, [PageId(1), PageId(2)], sampler())
    well = SliceInput(ContextId(1), PROMPTS[1], 0, [PageId(6)], sampler())
    outputs = executor.execute([sick, well], ()).outputs
    assert "not finite" in str(outputs[0].failure)
    assert outputs[1].sampled is not None
    assert bool((executor.runner.arena.pages[2] == 0).all())
    executor.close()


# -- pages ------------------------------------------------------------------------------------------------------------


def move(number: int, kind: MoveKind, source: list[int], target: list[int]) -> Move:
    return Move(MoveId(number), kind, tuple(map(PageId, source)), tuple(map(PageId, target)))


def test_pages_travel_bit_exact_through_host_memory_and_the_file(tmp_path: Path) -> None:
    arena = make_arena(llama(), 4, 12, 6, disk_folder=tmp_path, num_disk_pages=5)
    arena.pages.normal_(generator=torch.Generator().manual_seed(0))
    device = arena.pages.clone()

    def settle(*moves: Move) -> None:
        arena.begin(moves)
        left = {one.id for one in moves}
        while left:
            done = arena.acknowledged(wait_s=5.0)
            assert done
            left -= set(done)
        assert not arena.take_failed()

    # the file's rows follow those of host memory: 6 and up
    settle(move(1, MoveKind.OUT, [2, 3, 9], [1, 2, 5]), move(2, MoveKind.OUT, [7, 8], [6, 9]))
    settle(move(3, MoveKind.DOWN, [1, 2], [7, 8]))
    arena.pages.zero_()
    settle(move(4, MoveKind.IN, [5], [0]), move(5, MoveKind.IN, [7, 8, 6, 9], [4, 10, 6, 5]))
    for target, source in ((0, 9), (4, 2), (10, 3), (6, 7), (5, 8)):
        assert torch.equal(arena.pages[target], device[source])
    assert arena.acknowledged() == []
    arena.copy_within([move(6, MoveKind.COPY, [4], [11])])
    assert torch.equal(arena.pages[11], device[2])
    for bad, says in [
        (move(7, MoveKind.OUT, [12], [0]), "source page"),
        (move(7, MoveKind.IN, [11], [0]), "source page"),
        (move(7, MoveKind.OUT, [1], [11]), "target page"),
        (move(7, MoveKind.COPY, [1], [2]), "copy_within"),
    ]:
        with pytest.raises(BrokenInvariant, match=says):
            arena.begin([bad])
    arena.close()
    arena.close()


def test_what_fills_a_batch_writes_beside_the_pages_of_contexts() -> None:
    arena = make_arena(llama(), 4, 12)
    assert arena.pages.shape[0] == 13
    arena.close()


# -- the strongest test -----------------------------------------------------------------------------------------------


class ClockedExecutor(CudaExecutor):
    """On virtual time: a step takes what the cost profile says."""

    world: World

    def collect(self, ticket: Any) -> ExecOutput:
        step = self._launched[0]
        output = super().collect(ticket)
        duration_s = PROFILE.forward_s(sum(len(piece.token_ids) for piece in step.slices))
        self.world.clock.advance(duration_s)
        return ExecOutput(duration_s, output.outputs)


def on_device(world: World, device: str = "cpu", deterministic: bool = True) -> ClockedExecutor:
    made = make_device_executor(
        tiny_model(),
        world.page_size,
        num_device_pages=world.device_pages,
        num_host_pages=world.host_pages,
        eos_ids=(),
        deterministic=deterministic,
        device=device,
    )
    executor = ClockedExecutor(made.runner, eos_ids=())
    executor.world = world
    return executor


def transcripts(
    policy: str, *, overlap: bool, ample: bool = False, device: str = "cpu", deterministic: bool = True
) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    pressure = 0
    for number in range(2):
        page_size = (4, 16)[number]
        tokens = 4096 if ample else 160
        world = World(
            policy,
            seed=number,
            page_size=page_size,
            device_pages=tokens // page_size,
            host_pages=(96, 2048)[number] // page_size,
            max_step_tokens=(17, 64)[number],
            max_running=1 if ample else 8,
            share=not ample,
            check_every=20,
            make_executor=partial(on_device, device=device, deterministic=deterministic),
            overlap=overlap,
        )
        populate(world, 25, within_s=1.0)
        world.settle()
        world.engine.executor.close()
        found |= world.transcripts
        meter = world.engine.scheduler.meter
        pressure += meter.tokens_recomputed + meter.pages_in + meter.preemptions
    assert ample or pressure > 20, "the pool was never short: the test would show nothing"
    return found


@lru_cache(maxsize=1)
def reference() -> dict[str, list[int]]:
    return transcripts("preserve", overlap=False, ample=True)


EACH = [pytest.param(name, marks=() if name in ("min_waste", "swap") else pytest.mark.slow) for name in POLICIES]


@pytest.mark.parametrize("policy", EACH)
def test_same_tokens_under_every_policy_with_steps_planned_ahead(policy: str) -> None:
    torch.set_num_threads(1)
    assert transcripts(policy, overlap=True) == reference()
