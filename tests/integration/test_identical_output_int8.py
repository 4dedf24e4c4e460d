"""The strongest test with 8-bit weights: the same tokens under every policy, cache on and off, alone or in company."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import pytest
import torch
from caesura.runtime.executors.base import ExecOutput, SliceInput
from caesura.runtime.executors.torch_cpu import TorchExecutor
from caesura.runtime.model.config import parse_config
from caesura.runtime.model.weights import Model, dummy_model
from caesura.runtime.native.decoder import unsupported
from caesura.scheduler.policies import POLICIES
from caesura.scheduler.types import Move

from tests.sim.agents import PROFILE, VOCAB, World, populate

PAGE = 16
PROGRAMS = 25  # in each world
WORLDS = ((True, 8, 0), (False, 8, 6), (True, 1, 128))  # prefix cache, contexts at a time, host pages


@lru_cache(maxsize=1)
def tiny_model() -> Model:
    config = parse_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "intermediate_size": 72,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
        }
    )
    return dummy_model(config, seed=3)


class ClockedExecutor(TorchExecutor):
    """A real model on virtual time: a step takes what the cost profile says, whatever this machine needs for it."""

    world: World

    def execute(self, slices: Sequence[SliceInput], copies: Sequence[Move]) -> ExecOutput:
        output = super().execute(slices, copies)
        duration_s = PROFILE.forward_s(sum(len(piece.token_ids) for piece in slices))
        self.world.clock.advance(duration_s)
        return ExecOutput(duration_s, output.outputs)


def on_model(world: World) -> ClockedExecutor:
    executor = ClockedExecutor(
        tiny_model(),
        page_size=PAGE,
        num_device_pages=world.device_pages,
        num_host_pages=world.host_pages,
        eos_ids=(),
        quantization="int8",
    )
    executor.world = world
    return executor


def transcripts(policy: str, *, ample: bool = False) -> dict[str, list[int]]:
    """All programs' tokens, by name."""
    found: dict[str, list[int]] = {}
    pressure = 0
    for number, (share, batch, host_pages) in enumerate(WORLDS):
        world = World(
            policy,
            seed=number,
            page_size=PAGE,
            device_pages=256 if ample else 10,
            host_pages=0 if ample else host_pages,
            max_step_tokens=64 if ample else (17, 40, 64)[number],
            max_running=1 if ample else batch,
            share=share and not ample,
            check_every=20,
            make_executor=on_model,
        )
        populate(world, PROGRAMS, within_s=1.0)
        world.settle()
        world.engine.executor.close()
        found |= world.transcripts
        account = world.engine.scheduler.meter
        pressure += account.tokens_recomputed + account.pages_in + account.preemptions
    assert ample or pressure > 30, "the pool was never short: the test would show nothing"
    return found


@lru_cache(maxsize=1)
def reference() -> dict[str, list[int]]:
    return transcripts("preserve", ample=True)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_same_tokens_whatever_is_decided(policy: str) -> None:
    if (reason := unsupported(tiny_model(), PAGE)) is not None:
        pytest.skip(reason)
    torch.set_num_threads(1)
    expected = reference()
    assert len(expected) >= PROGRAMS * len(WORLDS)
    assert len({token for tokens in expected.values() for token in tokens}) > 5
    found = transcripts(policy)
    wrong = [name for name in expected if found.get(name) != expected[name]]
    assert not wrong, f"{len(wrong)} of {len(expected)} programs differ, first {wrong[0]}"
