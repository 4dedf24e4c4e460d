"""The stages that time a GPU, run through on the CPU: that they end, not what they find."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from caesura.runtime.model.config import parse_config
from caesura.runtime.model.weights import dummy_model

from benchmarks.gpu import speed, swap
from tests.integration.device_executor import make_device_executor


def seconds_here(work: Callable[[], object], *_: int) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def test_the_stages_leave_nothing_under_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 1000,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
    }
    sizes = {"DEPTH": 32, "NEW": 8, "STEPS": 4, "FIRST": 32, "PAGES": 4, "CONTEXTS": 3}
    for module in (speed, swap):
        for name in sizes.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, sizes[name])
    monkeypatch.setattr(speed, "gpu_seconds", seconds_here)
    executor = make_device_executor(
        dummy_model(parse_config(config)), swap.PAGE_TOKENS, num_device_pages=64, num_host_pages=8
    )
    for contexts in (1, 3):
        speed._loop(executor, contexts)
    swap._slowdown(executor, list(range(4)))
    assert not executor._launched
    assert capsys.readouterr().out.count("FIGURE") == 5
    executor.close()
