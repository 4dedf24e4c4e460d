"""8B in bfloat16 with random weights: decode and prefill beside the two limits, and the gap that the host leaves."""

from __future__ import annotations

import statistics
import time

from caesura.runtime.calibrate import measure
from caesura.runtime.clock import MonotonicClock
from caesura.runtime.engine import Engine
from caesura.runtime.executors.torch_cuda import CudaExecutor
from caesura.runtime.model.config import ModelConfig
from caesura.runtime.sim import counted
from caesura.scheduler.policies import make_policy
from caesura.scheduler.profile import CostProfile
from caesura.scheduler.scheduler import SchedulerConfig

from benchmarks.gpu.common import (
    GpuLimits,
    decode_slices,
    gpu_seconds,
    llama_8b,
    make_executor,
    measure_limits,
    paced,
    prefill_slice,
    report,
    step_bytes,
    step_operations,
)

DEPTH = 1024
PROFILE = CostProfile(5e-3, 2e-5, 0.0, 1e-4, 3e-6, 256, "given")  # nothing is paused: the policy has no choice
NEW = 64
STEPS = 40
KV_TOKENS = 340_000


def main() -> None:
    """All figures, the most wanted first."""
    limits = measure_limits()
    report("device copy, read + written", limits.copied_bytes_s / 1e12, "TB/s")
    report("bf16 products", limits.bf16_ops_s / 1e12, "TFLOP/s")
    begun = time.perf_counter()
    config = llama_8b()
    executor = make_executor(config, kv_tokens=KV_TOKENS)
    graphs = len(executor.runner.graphs.sizes) if executor.runner.graphs is not None else 0
    report("8B on the GPU", time.perf_counter() - begun, f"s ({graphs} graphs)")
    if executor.runner.flashinfer_refused is not None:
        report("FlashInfer", "OFF", executor.runner.flashinfer_refused)
    for contexts in (1, 16, 64, 256):
        _decode(executor, config, limits, contexts)
    for tokens in (512, 4096, 16384):
        _prefill(executor, config, limits, tokens)
    for contexts in (1, 64, 256):
        _loop(executor, contexts)
    profile = measure(executor, wide=True)
    report("calibrated: step", profile.step_s * 1e3, "ms")
    report("calibrated: token", profile.token_s * 1e6, "us")
    report("calibrated: saturation", profile.saturation_tokens, "tokens")
    executor.close()


def _decode(executor: CudaExecutor, config: ModelConfig, limits: GpuLimits, contexts: int) -> None:
    limit_s = step_bytes(config, contexts, DEPTH, 2) / limits.copied_bytes_s
    seconds = paced(executor, decode_slices(contexts, DEPTH), 40)
    target = 0.75 if contexts <= 64 else None
    report(f"decode of {contexts}", contexts / seconds, "tok/s", share=limit_s / seconds, target=target)


def _prefill(executor: CudaExecutor, config: ModelConfig, limits: GpuLimits, tokens: int) -> None:
    limit_s = step_operations(config, tokens, 1) / limits.bf16_ops_s
    piece = prefill_slice(tokens)
    seconds = gpu_seconds(lambda: executor.collect(executor.launch([piece], ())), 3, 1)
    report(f"prefill of {tokens}", tokens / seconds, "tok/s", share=limit_s / seconds, target=0.6)


def _loop(executor: CudaExecutor, contexts: int) -> None:
    """The engine's whole loop in steady decode, against the same steps on the device alone."""
    engine = Engine(
        executor,
        make_policy("min_waste"),
        PROFILE,
        MonotonicClock(),
        SchedulerConfig(max_step_tokens=4096, max_running=contexts),
        share_prefixes=False,
        overlapping=executor,
    )
    opened = []
    for number in range(contexts):
        context = engine.open()
        engine.append(context, [(7 * position + number) % 1000 for position in range(DEPTH)])
        engine.generate(context, counted(engine, context, NEW + contexts // 2, lambda _: None, lambda: None))
        opened.append(context)
    while any(engine.num_tokens(context) <= DEPTH for context in opened):
        engine.step()
    before = sum(map(engine.num_tokens, opened))
    begun, steps = time.perf_counter(), []
    for _ in range(STEPS):
        at = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - at)
    spent = time.perf_counter() - begun
    tokens = sum(map(engine.num_tokens, opened)) - before
    for context in opened:
        engine.close(context)
    while engine.has_work:  # the step under way is the engine's to collect
        engine.step()
    alone = _graph_seconds(executor, contexts)
    step_s = statistics.median(steps)
    report(f"loop of {contexts}", tokens / spent, "tok/s")
    report(f"loop of {contexts}: gap", step_s * 1e3, "ms", share=1 - alone / step_s, target=0.05, below=True)


def _graph_seconds(executor: CudaExecutor, contexts: int) -> float:
    """A decode step's time on the device: its graph alone, as it was planned last."""
    graphs = executor.runner.graphs
    if graphs is None:
        return gpu_seconds(lambda: executor.execute(decode_slices(contexts, DEPTH + NEW // 2), ()), 5)
    executor.execute(decode_slices(contexts, DEPTH + NEW // 2), ())
    size = next(size for size in graphs.sizes if size >= contexts)
    return gpu_seconds(graphs._captured[size].replay, 20)


if __name__ == "__main__":
    main()
