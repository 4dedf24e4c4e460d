"""On a GPU: the same tokens as on the CPU, FlashInfer beside torch, graphs beside plain steps, swaps beside decodes.

Skipped without CUDA. Figures are printed as ``benchmarks.gpu_check`` reads them.
"""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from caesura.runtime.embedded import checkpoint_path
from caesura.runtime.errors import UnsupportedModel
from caesura.runtime.executors.base import SliceInput
from caesura.runtime.executors.torch_cuda import CudaExecutor
from caesura.runtime.kv.device_arena import PagedCache
from caesura.runtime.model import load_model
from caesura.runtime.model.config import ModelConfig, parse_config
from caesura.runtime.model.cuda.attention import TorchAttention
from caesura.runtime.model.cuda.device import Device
from caesura.runtime.model.cuda.kernels import TorchKernels
from caesura.runtime.model.cuda.layout import Layout, LayoutBuilder
from caesura.runtime.model.cuda.runner import Options
from caesura.runtime.model.weights import Model, dummy_model
from caesura.runtime.sampling import SamplerState, SamplingParams
from caesura.scheduler.policies import POLICIES
from caesura.scheduler.types import TOKEN_TO_COME, ContextId, Move, MoveId, MoveKind, PageId

from tests.integration.device_executor import make_device_executor
from tests.integration.model_checkpoints import CHECKPOINTS, make_executor, make_reference, save
from tests.integration.test_device_executor import PROMPTS, tokens_of, transcripts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = "cuda:0"


def figure(
    what: str, value: float | str, unit: str = "", share: float | None = None, target: float | None = None
) -> None:
    held = None if share is None or target is None else share <= target
    row = {"what": what, "value": value, "unit": unit, "share": share, "target": target, "below": True, "held": held}
    print("\nFIGURE " + json.dumps(row), flush=True)


def config_of(head_dim: int, *, window: int | None = None, layers: int = 4) -> ModelConfig:
    return parse_config(
        {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "vocab_size": 1000,
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": head_dim,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "sliding_window": window,
        }
    )


def needs_flashinfer() -> None:
    if importlib.util.find_spec("flashinfer") is None:  # one that is there and cannot be imported is a failure
        pytest.skip("flashinfer is not installed")


# -- float32: the CPU's tokens ----------------------------------------------------------------------------------------


def test_the_embedded_model_in_float32_yields_the_cpu_tokens() -> None:
    model = load_model(checkpoint_path())
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 1000) for _ in range(draw.randint(3, 60))] for _ in range(24)]
    expected = tokens_of(make_executor(model, 16), prompts)
    found = tokens_of(make_device_executor(model, 16, device=CUDA), prompts)
    wrong = sum(a != b for a, b in zip(found, expected, strict=True))
    figure("float32, embedded: contexts that differ from the CPU", wrong, f"of {len(prompts)}", float(wrong), 0.0)
    assert found == expected


def test_every_architecture_in_float32_yields_the_cpu_tokens(tmp_path: Path) -> None:
    wrong = []
    for name in CHECKPOINTS:
        model = load_model(save(make_reference(name), tmp_path / name))
        if tokens_of(make_device_executor(model, 4, device=CUDA)) != tokens_of(make_executor(model, 4, native=False)):
            wrong.append(name)
    figure("float32, random checkpoints that differ", len(wrong), f"of {len(CHECKPOINTS)}", float(len(wrong)), 0.0)
    assert not wrong


def test_same_tokens_under_every_policy_in_float32() -> None:
    deterministic = True
    try:
        reference = transcripts("preserve", overlap=False, ample=True, device=CUDA)
    except UnsupportedModel as error:  # then rounding may decide a close choice, and how often it does is worth knowing
        figure("float32: deterministic mode", "REFUSED", str(error)[:100])
        deterministic = False
        reference = transcripts("preserve", overlap=False, ample=True, device=CUDA, deterministic=False)
    wrong = {}
    for policy in POLICIES:
        found = transcripts(policy, overlap=True, device=CUDA, deterministic=deterministic)
        wrong[policy] = sum(found[name] != reference[name] for name in reference)
    total = sum(wrong.values())
    figure(
        "float32, programs that differ under a policy", total, f"of {len(reference) * len(wrong)}", float(total), 0.0
    )
    assert not total, wrong


# -- bfloat16: FlashInfer ---------------------------------------------------------------------------------------------


def run_logits(model: Model, device: str, prompts: list[list[int]], **options: Any) -> torch.Tensor:
    """Logits of prompts prefilled in two chunks and then of one decode step for all: [2 * prompts, vocab]."""
    executor = make_device_executor(model, 16, device=device, **options)
    runner = executor.runner
    builder = LayoutBuilder(16, executor.num_device_pages, model.config.vocab_size)
    state = SamplerState(SamplingParams(temperature=0.0), seed=0)
    each = -(-max(map(len, prompts)) // 16) + 1
    tables = [tuple(PageId(n * each + page) for page in range(each)) for n in range(len(prompts))]
    found = []
    with torch.inference_mode():
        for part in range(3):
            slices = []
            for number, prompt in enumerate(prompts):
                cut = len(prompt) // 2
                first, last = ((0, cut), (cut, len(prompt) - 1), (len(prompt) - 1, len(prompt)))[part]
                slices.append(SliceInput(ContextId(number), prompt[first:last], first, tables[number], state))
            rows = runner.run(builder.build(slices, {}), ())
            found.append(rows.logits.float().cpu().clone())
            executor._device.synchronize()
    executor.close()
    return torch.cat(found[1:])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_bfloat16_logits_are_close_to_float32(head_dim: int) -> None:
    needs_flashinfer()
    config = config_of(head_dim)
    exact = dummy_model(config, dtype="float32", seed=1)
    rounded = dummy_model(config, dtype="bfloat16", seed=1)
    draw = random.Random(1)
    prompts = [[draw.randrange(1000) for _ in range(draw.randint(20, 200))] for _ in range(6)]
    reference = run_logits(exact, "cpu", prompts)
    for name, options in (("graphs", {}), ("no graphs", {"graphs": False}), ("torch", {"flashinfer": False})):
        found = run_logits(rounded, CUDA, prompts, **options)
        error = float((found - reference).norm() / reference.norm())
        figure(f"bfloat16 logits, heads of {head_dim}, {name}: error", error, "", error, 2e-2)
        assert error < 2e-2


def layout_for(pieces: list[tuple[int, int, list[int]]]) -> Layout:
    slices = [
        SliceInput(ContextId(number), [1] * count, start, tuple(map(PageId, pages)), None)
        for number, (start, count, pages) in enumerate(pieces)
    ]
    return LayoutBuilder(16, 400, 1000).build(slices, {})


BATCHES = {
    "decodes": [(15 + 37 * n, 1, list(range(30 * n, 30 * n + 30))) for n in range(9)],
    "mixed": [(0, 90, list(range(6))), (200, 1, list(range(20, 40))), (33, 60, list(range(50, 60))), (5, 1, [70])],
    "shared": [(160 + n, 1 + 3 * (n % 2), [*range(9), *range(100 + 4 * n, 104 + 4 * n)]) for n in range(8)],
}


@pytest.mark.parametrize("batch", sorted(BATCHES))
@pytest.mark.parametrize("window", [None, 50])
def test_flashinfer_attention_beside_torch(batch: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_flashinfer()
    from caesura.runtime.model.cuda import flashinfer_kernels

    monkeypatch.setattr(flashinfer_kernels, "CASCADE_TOKENS", 64 if batch == "shared" else 1 << 30)
    config = config_of(128, window=window, layers=1)
    device = Device(CUDA)
    generator = torch.Generator(CUDA).manual_seed(0)
    pages = torch.randn(400, 1, 2, 16, 2, 128, device=CUDA, generator=generator).bfloat16()
    cache = PagedCache(pages)
    layout = layout_for(BATCHES[batch])
    queries = torch.randn(layout.num_rows, 8, 128, device=CUDA, generator=generator).bfloat16()
    with torch.inference_mode():
        ours = flashinfer_kernels.FlashInferAttention(config, 16, torch.bfloat16, device)
        found = ours.plan(layout, cache)(0, queries).float()
        wide = PagedCache(pages.float())
        plain = TorchAttention(config, torch.float32, device.torch)
        expected = plain.plan(layout, wide)(0, queries.float())
    assert ours.cascades == (batch == "shared" and window is None)
    error = float((found - expected).norm() / expected.norm())
    figure(f"attention, {batch}, window {window}: error", error, "", error, 1e-2)
    assert error < 1e-2


def test_flashinfer_kernels_beside_torch() -> None:
    needs_flashinfer()
    from caesura.runtime.model.cuda.flashinfer_kernels import FlashInferKernels

    config = config_of(128)
    place = torch.device(CUDA)
    ours, plain = FlashInferKernels(config, 512, place), TorchKernels(config, torch.float32, 512, place)
    generator = torch.Generator(CUDA).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=CUDA, generator=generator).bfloat16()

    def same(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        error = float((found.float() - expected).norm() / expected.norm())
        figure(f"{name}: error", error, "", error, 1e-2)
        assert error < 1e-2, name

    with torch.inference_mode():
        values, update, weight = drawn(33, 512), drawn(33, 512), drawn(512)
        same("norm", ours.norm(values, weight, 1e-5), plain.norm(values.float(), weight.float(), 1e-5))
        residual = values.clone()
        added = ours.add_norm(update.clone(), residual, weight, 1e-5)
        same("add and norm", added, plain.norm(values.float() + update.float(), weight.float(), 1e-5))
        same("sum", residual, values.float() + update.float())
        fused = drawn(33, 12, 128)
        queries, keys = fused[:, :8], fused[:, 8:10]
        positions = torch.randint(0, 512, (33,), device=CUDA, generator=generator)
        turned = plain.rotate(queries.float(), keys.float(), positions)
        for name, found, expected in zip(
            ("queries", "keys"), ours.rotate(queries, keys, positions), turned, strict=True
        ):
            same(f"rotated {name}", found, expected)
        same(
            "head norm",
            ours.head_norm(queries, weight[:128], 1e-5),
            plain.head_norm(queries.float(), weight[:128].float(), 1e-5),
        )
        gate_up = drawn(33, 2816)
        same("silu", ours.silu_mul(gate_up), plain.silu_mul(gate_up.float()))
        probs = torch.softmax(4 * torch.randn(16, 1000, device=CUDA, generator=generator), dim=-1)
        top_k = torch.arange(1, 17, device=CUDA, dtype=torch.int32) * 5
        top_p = torch.linspace(0.1, 0.97, 16, device=CUDA)
        differ = float((ours.keep_top(probs, top_k, top_p) != plain.keep_top(probs, top_k, top_p)).sum())
        figure("top-k and top-p: tokens that differ", differ, "of 16000", differ, 4.0)
        assert differ <= 4


# -- steps that overlap, and swaps beside them ------------------------------------------------------------------------


def decode_ahead(executor: CudaExecutor, steps: int, beside: Any = None) -> list[list[int]]:
    """Tokens of PROMPTS, each step launched before the one before is collected."""
    states = [SamplerState(SamplingParams(temperature=0.0), seed=0) for _ in PROMPTS]
    tables = [tuple(PageId(8 * n + page) for page in range(8)) for n in range(len(PROMPTS))]
    found: list[list[int]] = [[] for _ in PROMPTS]

    def slices(step: int) -> list[SliceInput]:
        return [
            SliceInput(
                ContextId(n),
                prompt if step == 0 else [TOKEN_TO_COME],
                0 if step == 0 else len(prompt) + step - 1,
                tables[n],
                states[n],
            )
            for n, prompt in enumerate(PROMPTS)
        ]

    ticket = executor.launch(slices(0), ())
    for step in range(steps):
        if beside is not None:
            beside(step)
        following = executor.launch(slices(step + 1), ())
        for n, out in enumerate(executor.collect(ticket).outputs):
            assert out.sampled is not None
            found[n].append(out.sampled.token_id)
        ticket = following
    executor.collect(ticket)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_launched_ahead_yield_the_tokens_of_steps_in_turn(dtype: str) -> None:
    if dtype == "bfloat16":
        needs_flashinfer()
    model = dummy_model(config_of(64), dtype=dtype, seed=2)
    turns = make_device_executor(model, 16, device=CUDA)
    expected = []
    for n, prompt in enumerate(PROMPTS):
        tokens, state = list(prompt), SamplerState(SamplingParams(temperature=0.0), seed=0)
        table = tuple(PageId(8 * n + page) for page in range(8))
        for step in range(30):
            start = 0 if step == 0 else len(tokens) - 1
            out = turns.execute([SliceInput(ContextId(n), tokens[start:], start, table, state)], ()).outputs[0]
            assert out.sampled is not None
            tokens.append(out.sampled.token_id)
        expected.append(tokens[len(prompt) :])
    turns.close()
    ahead = make_device_executor(model, 16, device=CUDA)
    found = decode_ahead(ahead, 30)
    same = sum(a == b for a, b in zip(found, expected, strict=True))
    figure(f"launched ahead, {dtype}: contexts as in turn", same, f"of {len(PROMPTS)}")
    if dtype == "float32":
        assert found == expected
    ahead.close()


def test_pages_survive_swaps_while_others_decode() -> None:
    """Random pages go out, are overwritten, and come back into other places, beside steps that keep the GPU busy."""
    model = dummy_model(config_of(64), seed=2)
    plain = make_device_executor(model, 16, device=CUDA, num_host_pages=64, num_device_pages=256)
    expected = decode_ahead(plain, 40)
    plain.close()
    executor = make_device_executor(model, 16, device=CUDA, num_host_pages=64, num_device_pages=256)
    pages = executor.runner.arena.pages
    draw = random.Random(0)
    kept = torch.randn(64, *pages.shape[1:], device=CUDA)
    place = {n: 64 + n for n in range(64)}  # where page n of `kept` lies on the device
    for n, row in place.items():
        pages[row] = kept[n]
    flying: dict[int, dict[int, tuple[MoveKind, int]]] = {}
    parked: dict[int, int] = {}  # host rows; a page that is coming in keeps its own until it is there
    moves = 0

    def land(wait_s: float = 0.0) -> None:
        for done in executor.acknowledged(wait_s=wait_s):
            for n, (kind, row) in flying.pop(done).items():
                if kind is MoveKind.OUT:
                    parked[n] = row
                    pages[place.pop(n)] = float("nan")  # in the compute stream, behind the copy
                else:
                    place[n] = row
                    del parked[n]

    def begin(kind: MoveKind, chosen: list[int], source: dict[int, int], free: set[int]) -> None:
        coming = {row for flight in flying.values() for other, row in flight.values() if other is kind}
        rows = draw.sample(sorted(free - coming), len(chosen))
        sources = tuple(PageId(source[n]) for n in chosen)
        executor.begin([Move(MoveId(moves), kind, sources, tuple(map(PageId, rows)))])
        flying[moves] = {n: (kind, row) for n, row in zip(chosen, rows, strict=True)}

    def swap(step: int) -> None:
        nonlocal moves
        land()
        moves += 1
        busy = {n for flight in flying.values() for n in flight}
        here, below = sorted(set(place) - busy), sorted(set(parked) - busy)
        if step % 2 == 0 and here:
            begin(MoveKind.OUT, draw.sample(here, min(9, len(here))), place, set(range(64)) - set(parked.values()))
        elif below:
            room = set(range(64, 200)) - set(place.values())
            begin(MoveKind.IN, draw.sample(below, min(7, len(below))), parked, room)

    found = decode_ahead(executor, 40, swap)
    for step in range(1, 200, 2):  # bring the rest home
        while flying:
            land(1.0)
        if not parked:
            break
        swap(step)
    wrong = [n for n, row in place.items() if not torch.equal(pages[row], kept[n])]
    figure("swaps beside decodes: pages that differ", len(wrong), "of 64", float(len(wrong)), 0.0)
    assert len(place) == 64 and not wrong
    assert found == expected
    executor.close()


def test_the_graph_of_every_size_is_that_of_a_plain_step() -> None:
    needs_flashinfer()
    model = dummy_model(config_of(64, layers=2), dtype="bfloat16", seed=3)
    executor = make_device_executor(model, 16, 8192, device=CUDA)
    plain = make_device_executor(model, 16, 8192, device=CUDA, graphs=False)
    graphs = executor.runner.graphs
    assert graphs is not None
    worst = 0.0
    with torch.inference_mode():
        state = SamplerState(SamplingParams(temperature=0.0), seed=0)
        for one in (executor, plain):
            generator = torch.Generator(CUDA).manual_seed(0)
            one.runner.arena.pages.copy_(torch.randn(one.runner.arena.pages.shape, device=CUDA, generator=generator))
        for rows in (1, 3, 16, 30, 64, 200):
            slices = [
                SliceInput(ContextId(n), [n % 1000], 16 + n % 13, (PageId(2 * n), PageId(2 * n + 1)), state)
                for n in range(rows)
            ]
            layout = LayoutBuilder(16, executor.num_device_pages, 1000).build(slices, {})
            found, expected = (one.runner.run(layout, ()).logits.float() for one in (executor, plain))
            worst = max(worst, float((found - expected).norm() / expected.norm()))
    figure("graphs beside plain steps: error", worst, "", worst, 1e-2)
    assert graphs.replays >= 6
    assert worst < 1e-2
    executor.close()
    plain.close()


def test_the_defaults_of_a_runner_use_what_there_is() -> None:
    needs_flashinfer()
    executor = make_device_executor(dummy_model(config_of(128, layers=1), dtype="bfloat16"), 16, device=CUDA)
    assert executor.runner.flashinfer_refused is None
    assert executor.runner.graphs is not None
    assert Options().graphs
    executor.close()
