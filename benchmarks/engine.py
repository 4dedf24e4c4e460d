"""The engine's own steps beside the limits: in C, in torch, in torch made deterministic; the loop; and its start.

A step is one call of the executor (decoder, logits, greedy sampling); a loop is everything, scheduler included.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch
from caesura.runtime.calibrate import measure
from caesura.runtime.clock import MonotonicClock
from caesura.runtime.engine import Engine
from caesura.runtime.executors.base import SliceInput
from caesura.runtime.executors.torch_cpu import TorchExecutor
from caesura.runtime.generation import TokenChunk
from caesura.runtime.model.config import parse_config
from caesura.runtime.model.weights import Model, dummy_model
from caesura.runtime.sampling import SamplerState, SamplingParams
from caesura.runtime.sim import generation
from caesura.scheduler.policies import make_policy
from caesura.scheduler.scheduler import SchedulerConfig
from caesura.scheduler.types import ContextId

from benchmarks.common import Bench
from benchmarks.limits import Limits, measure_limits
from benchmarks.peers.checkpoint import model_config
from benchmarks.peers.roofline import SHAPES, Machine, Roofline

PAGE_TOKENS = 16
PROMPT = 512
NEW = 64
DECODES = (1, 4, 16, 32)
PREFILLS = (512, 2048)
PATHS = ("C", "torch", "torch, deterministic")
STEP_BUDGET_S = 1.5  # for the repeats of one step
START = """
import time
from caesura.runtime.build import build
from caesura.runtime.config import EngineConfig
import caesura.runtime.executors.torch_cpu
begun = time.perf_counter()
build(EngineConfig())
print(time.perf_counter() - begun)
"""


def run(bench: Bench, *, quick: bool) -> None:
    """Steps of 1 to 32 contexts after 512 tokens, prompts of 512 and 2048, the loop at 1 and 16, the start."""
    limits = measure_limits(3.0 if quick else 8.0)
    bench.configure(prompt_tokens=PROMPT, new_tokens=NEW, threads=torch.get_num_threads())
    bench.record("memory bandwidth", [limits.read_bytes_s / 1e9], unit="GB/s")
    bench.record("fp32 matrix rate", [limits.fp32_ops_s / 1e9], unit="GFLOP/s")
    bench.record("of torch's products", [limits.torch_ops_s / 1e9], unit="GFLOP/s")
    for name in ["10m"] if quick else SHAPES:
        model = dummy_model(parse_config(model_config(SHAPES[name])))
        roofline = Roofline(SHAPES[name], _machine(limits))
        _steps(bench, name, model, roofline, 3 if quick else 9)
        _loops(bench, name, model, roofline, 1 if quick else 3)
    bench.record("start on the embedded model, after import", _starts(1 if quick else 3), unit="s")
    bench.note("limit: weights and KV bytes over bandwidth, or operations over the matrix rate, whichever is slower")
    bench.note("C needs no deterministic mode: its rows never depend on what is computed beside them")


def _machine(limits: Limits) -> Machine:
    return Machine(limits.read_bytes_s, limits.fp32_ops_s, limits.int8_ops_s)


# -- steps ----------------------------------------------------------------------------------------------------


def _steps(bench: Bench, name: str, model: Model, roofline: Roofline, repeats: int) -> None:
    executors = dict(_executors(bench, model))
    for contexts in DECODES:
        limit_s = roofline.step_s(contexts, PROMPT + 1)
        work = {path: _decode_step(executor, contexts) for path, executor in executors.items()}
        _record(bench, f"{name} decode of {contexts}", limit_s, _in_turns(work, repeats))
    for tokens in PREFILLS:
        limit_s = roofline.prefill_s(tokens, tokens / 2)
        work = {path: _prefill_step(executor, tokens) for path, executor in executors.items()}
        _record(bench, f"{name} prompt of {tokens}", limit_s, _in_turns(work, repeats))
    for executor in executors.values():
        executor.close()


def _executors(bench: Bench, model: Model) -> Iterator[tuple[str, TorchExecutor]]:
    pages = -(-(max(DECODES) * (PROMPT + 1)) // PAGE_TOKENS) + max(DECODES)
    for path in PATHS:
        executor = TorchExecutor(
            model,
            page_size=PAGE_TOKENS,
            num_device_pages=pages,
            num_host_pages=0,
            eos_ids=(),
            deterministic=path == PATHS[2],
            native=path == "C",
        )
        if path == "C" and executor.native_refused is not None:
            bench.note(f"no steps in C: {executor.native_refused}")
            executor.close()
            continue
        executor.arena.device.uniform_(-1.0, 1.0)  # pages never written all lie in one page of zeros, in the cache
        yield path, executor


def _greedy() -> SamplerState:
    return SamplerState(SamplingParams(temperature=0.0, max_new_tokens=NEW), seed=0)


def _decode_step(executor: TorchExecutor, contexts: int) -> Callable[[], object]:
    each = -(-(PROMPT + 1) // PAGE_TOKENS)
    slices = [
        SliceInput(ContextId(number), [7 + number], PROMPT, list(range(number * each, (number + 1) * each)), _greedy())
        for number in range(contexts)
    ]
    return lambda: executor.execute(slices, ())


def _prefill_step(executor: TorchExecutor, tokens: int) -> Callable[[], object]:
    ids = [(7 * position + 1) % 1000 for position in range(tokens)]
    piece = SliceInput(ContextId(0), ids, 0, list(range(-(-tokens // PAGE_TOKENS))), _greedy())
    return lambda: executor.execute([piece], ())


def _in_turns(work: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, one after the other in every repeat: what disturbs the machine disturbs all alike."""
    seconds: dict[str, list[float]] = {path: [] for path in work}
    for number in range(repeats + 1):
        for path, step in work.items():
            if sum(seconds[path]) > STEP_BUDGET_S:
                continue
            begun = time.perf_counter()
            step()
            if number:
                seconds[path].append(time.perf_counter() - begun)
    return seconds


def _record(bench: Bench, label: str, limit_s: float, seconds: dict[str, list[float]]) -> None:
    limit = f"{label}: limit"
    bench.record(limit, [limit_s], unit="s")
    for path, values in seconds.items():
        bench.record(f"{label}: {path}", values, unit="s", baseline=limit)


# -- the loop -------------------------------------------------------------------------------------------------


def _loops(bench: Bench, name: str, model: Model, roofline: Roofline, repeats: int) -> None:
    engine = _engine(model)
    for batch in (1, 16):
        runs = [_run_loop(engine, batch, seed) for seed in range(repeats)]
        limit = f"{name} loop of {batch}: decode limit"
        bench.record(limit, [batch / roofline.step_s(batch, PROMPT + NEW / 2)], unit="tok/s")
        bench.record(f"{name} loop of {batch}: decode", [one for _, one in runs], unit="tok/s", baseline=limit)
    ceiling = f"{name} loop: prefill limit"
    bench.record(ceiling, [PROMPT / roofline.prefill_s(PROMPT, PROMPT / 2)], unit="tok/s")
    bench.record(f"{name} loop: prefill", [one for one, _ in runs], unit="tok/s", baseline=ceiling)
    engine.executor.close()


def _engine(model: Model) -> Engine:
    executor = TorchExecutor(model, page_size=PAGE_TOKENS, num_device_pages=1024, num_host_pages=0, eos_ids=())
    config = SchedulerConfig(max_step_tokens=2048)
    return Engine(executor, make_policy("min_waste"), measure(executor), MonotonicClock(), config)


def _run_loop(engine: Engine, batch: int, seed: int) -> tuple[float, float]:
    """Prompt tokens per second, and output tokens per second once all prompts are in."""
    vocab = 1000
    waiting = set()
    for number in range(batch):
        context = engine.open(namespace=f"{seed}/{number}/{time.perf_counter()}")
        engine.append(context, [(7 * position + number + seed) % vocab for position in range(PROMPT)])
        waiting.add(context)

    def sink_for(context: int) -> Callable[[TokenChunk], None]:
        return lambda chunk: waiting.discard(context) if chunk.finish is not None else None

    for context in sorted(waiting):
        engine.generate(context, generation(engine, context, NEW, sink_for(context)))
    begun = time.perf_counter()
    contexts = list(waiting)
    while any(engine.ledger.computed(context) < PROMPT for context in contexts):
        engine.step()
    prompted = time.perf_counter()
    first = sum(engine.num_tokens(context) - PROMPT for context in contexts)
    while waiting:
        engine.step()
    ended = time.perf_counter()
    for context in contexts:
        engine.close(context)
    engine.flush_cache()
    return batch * PROMPT / (prompted - begun), (batch * NEW - first) / (ended - prompted)


# -- the start ------------------------------------------------------------------------------------------------


def _starts(repeats: int) -> list[float]:
    """Seconds to an engine on the embedded model, in fresh processes, once the imports are done."""

    def start() -> float:
        command = [sys.executable, "-c", START]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return float(done.stdout.split()[-1])

    start()  # the first one measures the machine and compiles, and keeps both
    return [start() for _ in range(repeats)]
