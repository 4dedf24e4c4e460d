"""What the stages share: reporting a figure, an 8B model on the GPU, and timing there."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from caesura.runtime.executors.base import SliceInput
from caesura.runtime.executors.torch_cuda import CudaExecutor
from caesura.runtime.model.config import ModelConfig, parse_config
from caesura.runtime.model.cuda.device import Device
from caesura.runtime.model.cuda.loading import part_of
from caesura.runtime.model.cuda.parallel import whole
from caesura.runtime.model.cuda.runner import Options, Runner, arena_for
from caesura.runtime.model.weights import dummy_tensors
from caesura.runtime.sampling import SamplerState, SamplingParams
from caesura.scheduler.types import ContextId, PageId

from benchmarks.dummy import llama_config

MARK = "FIGURE "
PAGE_TOKENS = 16


def report(
    what: str,
    value: float | str,
    unit: str = "",
    *,
    share: float | None = None,
    target: float | None = None,
    below: bool = False,
) -> None:
    """One line of the table. ``share`` is what ``target`` is about: at least (``below``: at most) so much."""
    held = None
    if target is not None and share is not None:
        held = share <= target if below else share >= target
    row = {"what": what, "value": value, "unit": unit, "share": share, "target": target, "below": below, "held": held}
    print(MARK + json.dumps(row), flush=True)


def llama_8b() -> ModelConfig:
    """A config shaped like Llama 3 8B."""
    return parse_config(llama_config("8B"))


def make_executor(
    config: ModelConfig,
    *,
    kv_tokens: int,
    host_tokens: int = 0,
    dtype: str = "bfloat16",
    options: Options | None = None,
) -> CudaExecutor:
    """An executor on the GPU with random weights."""
    device = Device("cuda:0")
    device.bind()
    with torch.inference_mode():
        model = part_of(config, device, dtype, dummy_tensors(config, 0, device.torch))
    arena = arena_for(model, device, PAGE_TOKENS, -(-kv_tokens // PAGE_TOKENS), -(-host_tokens // PAGE_TOKENS))
    runner = Runner(model, whole(config), arena, device, None, options or Options())
    return CudaExecutor(runner, eos_ids=())


def greedy() -> SamplerState:
    return SamplerState(SamplingParams(temperature=0.0, max_new_tokens=64), seed=0)


def decode_slices(contexts: int, depth: int, first_page: int = 0) -> list[SliceInput]:
    """A decode step of ``contexts``, each after ``depth`` tokens on pages of its own."""
    each = -(-(depth + 1) // PAGE_TOKENS)
    return [
        SliceInput(
            ContextId(number),
            [7 + number],
            depth,
            tuple(PageId(first_page + number * each + page) for page in range(each)),
            greedy(),
        )
        for number in range(contexts)
    ]


def prefill_slice(tokens: int) -> SliceInput:
    ids = [(7 * position + 1) % 1000 for position in range(tokens)]
    return SliceInput(ContextId(0), ids, 0, tuple(PageId(page) for page in range(-(-tokens // PAGE_TOKENS))), greedy())


def gpu_seconds(work: Callable[[], object], repeats: int = 10, warm: int = 3) -> float:
    """Median time of ``work`` between two events of its stream."""
    times = []
    for number in range(warm + repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        if number >= warm:
            times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


@dataclass(frozen=True, slots=True)
class GpuLimits:
    """What this GPU was measured to do."""

    copied_bytes_s: float  # read and written, on the device
    bf16_ops_s: float
    out_bytes_s: float  # device to pinned host memory
    in_bytes_s: float


def measure_limits() -> GpuLimits:
    """A copy of 4 GB, a product of 8192-square matrices on random data, copies of 1 GB over the link."""
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copied = 2 * source.numel() / gpu_seconds(partial(target.copy_, source))
    del source, target
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    ops = 2 * 8192**3 / gpu_seconds(lambda: torch.mm(left, right, out=out), 20, 5)
    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    outward = host.numel() / gpu_seconds(lambda: host.copy_(there, non_blocking=True), 5)
    inward = host.numel() / gpu_seconds(lambda: there.copy_(host, non_blocking=True), 5)
    return GpuLimits(copied, ops, outward, inward)


def step_operations(config: ModelConfig, tokens: int, sampled: int) -> float:
    """Multiplications and additions of a prompt's prefill: weights, causal attention, the head of ``sampled`` rows."""
    head = config.vocab_size * config.hidden_size
    layers = config.num_parameters - head * (1 if config.tie_embeddings else 2)
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * tokens * tokens / 2
    return 2.0 * (layers * tokens + head * sampled) + attention


def step_bytes(config: ModelConfig, contexts: int, depth: int, itemsize: int) -> float:
    """What a decode step has to read: every weight but the embeddings once, and the contexts' KV."""
    weights = config.num_parameters - (0 if config.tie_embeddings else config.vocab_size * config.hidden_size)
    return itemsize * (weights + contexts * depth * config.kv_values_per_token)


def paced(executor: CudaExecutor, slices: Sequence[SliceInput], steps: int) -> float:
    """Seconds a step, each launched before the one before is collected."""
    ticket = executor.launch(slices, ())
    begun = time.perf_counter()
    for _ in range(steps):
        following = executor.launch(slices, ())
        executor.collect(ticket)
        ticket = following
    spent = time.perf_counter() - begun
    executor.collect(ticket)
    return spent / steps
