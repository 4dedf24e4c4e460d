"""What this machine can do: bytes read per second, float32 and int8 operations per second, bytes copied per second.

A limit is what was reached at best, by whatever reached it: torch's kernels or the engine's own. All threads are used.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from caesura.runtime.model.config import parse_config
from caesura.runtime.model.weights import dummy_model
from caesura.runtime.native.decoder import NativeDecoder, unsupported

from benchmarks.common import Bench

READ_BYTES = 1 << 28  # far more than caches hold
HIDDEN = 2048
PAGE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Limits:
    """Rates at their best; ``native_ops_s`` is the C decoder's float32 rate, 0 without a compiler."""

    read_bytes_s: float
    torch_ops_s: float
    native_ops_s: float
    int8_ops_s: float
    copy_bytes_s: float

    @property
    def fp32_ops_s(self) -> float:
        """The better of the two."""
        return max(self.torch_ops_s, self.native_ops_s)


def measure_limits(seconds: float = 4.0) -> Limits:
    """Measure for about that long."""
    share = seconds / 6
    block = torch.ones(READ_BYTES // 4)
    target = torch.empty_like(block)
    read = max(_rate(block.sum, block.nbytes, share), _rate(block.max, block.nbytes, share))
    copied = _rate(lambda: target.copy_(block), block.nbytes, share / 2)
    products = max(_torch_rate(*shape, share / 2) for shape in ((1024, 1024, 1024), (2048, 576, 3072)))
    native_read, native = _native(share)
    return Limits(max(read, native_read), products, native, _int8_rate(share / 2), copied)


def best(measured: list[Limits]) -> Limits:
    """The best of several measurements, rate by rate."""
    return Limits(**{name: max(getattr(one, name) for one in measured) for name in asdict(measured[0])})


def _torch_rate(rows: int, inner: int, outer: int, seconds: float) -> float:
    left, right = torch.randn(rows, inner), torch.randn(outer, inner)
    return _rate(lambda: torch.nn.functional.linear(left, right), 2 * rows * inner * outer, seconds)


def _int8_rate(seconds: float) -> float:
    rows, inner, outer = 1024, 1024, 1024
    left = torch.randint(-127, 127, (rows, inner), dtype=torch.int8)
    right = torch.randint(-127, 127, (outer, inner), dtype=torch.int8).t()
    return _rate(lambda: torch._int_mm(left, right), 2 * rows * inner * outer, seconds)


def _native(seconds: float) -> tuple[float, float]:
    """Bytes per second of a one-row product that no cache holds, operations per second of one of many rows."""
    outer = READ_BYTES // 4 // HIDDEN
    model = dummy_model(
        parse_config(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "vocab_size": outer,
                "hidden_size": HIDDEN,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": HIDDEN // 64,
                "num_key_value_heads": HIDDEN // 64,
                "max_position_embeddings": 64,
                "tie_word_embeddings": True,
            }
        )
    )
    if unsupported(model, PAGE_TOKENS) is not None:
        return 0.0, 0.0
    decoder = NativeDecoder(model, num_threads=torch.get_num_threads())
    weights = HIDDEN * outer
    row, rows = torch.randn(1, HIDDEN), torch.randn(48, HIDDEN)
    read = _rate(lambda: decoder.logits(row), 4 * weights, seconds)
    return read, _rate(lambda: decoder.logits(rows), 2 * weights * rows.shape[0], seconds)


def _rate(work: Callable[[], object], amount: float, seconds: float) -> float:
    """Best ``amount`` per second among the calls that fit the time, five at least."""
    work()
    until = time.perf_counter() + seconds
    fastest, calls = float("inf"), 0
    while calls < 5 or time.perf_counter() < until:
        begun = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - begun)
        calls += 1
    return amount / fastest


def run(bench: Bench, *, quick: bool) -> None:
    """Three measurements (one when quick), so that their spread is seen."""
    measured = [measure_limits(2.0 if quick else 6.0) for _ in range(1 if quick else 3)]
    bench.configure(threads=torch.get_num_threads())
    for name, unit, scale in (
        ("read_bytes_s", "GB/s", 1e9),
        ("copy_bytes_s", "GB/s", 1e9),
        ("torch_ops_s", "GFLOP/s", 1e9),
        ("native_ops_s", "GFLOP/s", 1e9),
        ("int8_ops_s", "GOP/s", 1e9),
    ):
        title = name.rsplit("_", 1)[0].replace("_", " ")
        bench.record(title, [getattr(one, name) / scale for one in measured], unit=unit)
