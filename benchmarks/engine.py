"""Engine throughput on dummy Llamas of 15M and 135M parameters, with the machine's limits beside it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from caesura.runtime.calibrate import measure
from caesura.runtime.clock import MonotonicClock
from caesura.runtime.engine import Engine
from caesura.runtime.executors.torch_cpu import TorchExecutor
from caesura.runtime.generation import TokenChunk
from caesura.runtime.model.config import parse_config
from caesura.runtime.model.weights import Model, dummy_model
from caesura.runtime.sim import generation
from caesura.scheduler.policies import make_policy
from caesura.scheduler.scheduler import SchedulerConfig

from benchmarks.common import Bench

SHAPES = {  # hidden, layers, heads, KV heads, intermediate, vocabulary
    "15M": (288, 6, 6, 6, 768, 32000),
    "135M": (576, 30, 9, 3, 1536, 49152),
}
PROMPT = 512
NEW = 64


def _model(name: str) -> Model:
    hidden, layers, heads, kv_heads, intermediate, vocab = SHAPES[name]
    config = parse_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        }
    )
    return dummy_model(config)


def _engine(model: Model, *, deterministic: bool) -> Engine:
    executor = TorchExecutor(
        model, page_size=16, num_device_pages=1024, num_host_pages=0, eos_ids=(), deterministic=deterministic
    )
    config = SchedulerConfig(max_step_tokens=2048)
    return Engine(executor, make_policy("min_waste"), measure(executor), MonotonicClock(), config)


def _decode(engine: Engine, batch: int, seed: int) -> tuple[float, float]:
    """Prompt tokens per second, and output tokens per second once all prompts are in."""
    vocab = 1000
    waiting = set()
    for number in range(batch):
        context = engine.open(namespace=f"{seed}/{number}/{time.perf_counter()}")
        engine.append(context, [(7 * position + number + seed) % vocab for position in range(PROMPT)])
        waiting.add(context)

    def sink_for(context: int) -> Callable[[TokenChunk], None]:
        return lambda chunk: waiting.discard(context) if chunk.finish is not None else None  # type: ignore[arg-type]

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


def _bandwidth() -> float:
    """Bytes per second of a read over far more than the caches hold."""
    block = torch.ones(256 << 18)  # 256 MiB
    best = 0.0
    for _ in range(20):
        begun = time.perf_counter()
        block.sum()
        best = max(best, block.nbytes / (time.perf_counter() - begun))
    return best


def _flops() -> float:
    """Multiply-adds times two per second of a large fp32 product."""
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = 0.0
    for _ in range(60):
        begun = time.perf_counter()
        left @ right
        best = max(best, 2 * 1024**3 / (time.perf_counter() - begun))
    return best


def run(bench: Bench, *, quick: bool) -> None:
    """Batch 1, 4 and 16, prompt 512, 64 new tokens each."""
    bandwidth, flops = _bandwidth(), _flops()  # best of many: a limit is what the machine can do, not what it did
    bench.configure(prompt_tokens=PROMPT, new_tokens=NEW, threads=torch.get_num_threads())
    bench.record("memory bandwidth", [bandwidth / 1e9], unit="GB/s")
    bench.record("fp32 matrix rate", [flops / 1e9], unit="GFLOP/s")
    for name in ["15M"] if quick else SHAPES:
        model = _model(name)
        kv_bytes = model.config.kv_values_per_token * 4
        for deterministic in (False, True):
            if deterministic and name != "15M":
                continue
            engine = _engine(model, deterministic=deterministic)
            for batch in (1, 4, 16):
                label = f"{name} batch {batch}" + (", deterministic" if deterministic else "")
                runs = [_decode(engine, batch, seed) for seed in range(1 if quick else 3)]
                step_bytes = model.weight_bytes + batch * (PROMPT + NEW / 2) * kv_bytes
                bytes_s = step_bytes / bandwidth
                flops_s = 2 * batch * model.config.num_parameters / flops
                limit = f"{label}: decode limit"
                bench.record(limit, [batch / max(bytes_s, flops_s)], unit="tok/s")
                bench.record(f"{label}: decode", [decode for _, decode in runs], unit="tok/s", baseline=limit)
                if batch == 16:
                    body = model.config.num_parameters - model.embeddings.numel()
                    ceiling = f"{label}: prefill limit"
                    bench.record(ceiling, [flops / (2 * body)], unit="tok/s")
                    bench.record(f"{label}: prefill", [prefill for prefill, _ in runs], unit="tok/s", baseline=ceiling)
            engine.executor.close()
    bench.note("limit: weights and KV bytes over bandwidth, or operations over the matrix rate, whichever is slower")
