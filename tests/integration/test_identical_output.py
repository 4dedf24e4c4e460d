"""The strongest test: whatever is decided about a paused context's KV, the answer is the same, token by token.

500 random programs (pauses, forks, rollbacks, shared prefixes, preemption under a pool for about one of them and a
half) on a real model, in C for the worlds with pages of 16 tokens and in deterministic torch for the others, under
every policy, with the prefix cache on and off, one context or eight at a time - against a run with ample memory, one
context at a time and no cache. The default policy runs all programs in all four ways, every other one all programs
with the ways taking turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import pytest
import torch
from caesura.runtime.executors.base import ExecOutput, SliceInput
from caesura.runtime.executors.torch_cpu import TorchExecutor
from caesura.runtime.model.config import parse_config
from caesura.runtime.model.weights import Model, dummy_model
from caesura.scheduler.policies import DEFAULT_POLICY, POLICIES
from caesura.scheduler.types import Move

from tests.sim.agents import PROFILE, VOCAB, World, populate

PROGRAMS = 500
WORLDS = 10  # programs are spread over worlds, so that memory is short in each


@lru_cache(maxsize=1)
def tiny_model() -> Model:
    config = parse_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
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
        page_size=world.page_size,
        num_device_pages=world.device_pages,
        num_host_pages=world.host_pages,
        eos_ids=(),
        deterministic=True,
    )
    executor.world = world
    return executor


WAYS = [(share, batch) for share in (True, False) for batch in (1, 8)]  # prefix cache, contexts at a time


def transcripts(policy: str, ways: Sequence[tuple[bool, int]], *, ample: bool = False) -> dict[str, list[int]]:
    """All programs' tokens; the worlds take the ways in turn."""
    found: dict[str, list[int]] = {}
    pressure = 0
    for number in range(WORLDS):
        share, batch = ways[number % len(ways)]
        page_size = (4, 16)[number % 2]
        tokens = 4096 if ample else 160
        world = World(
            policy,
            seed=number,
            page_size=page_size,
            device_pages=tokens // page_size,
            host_pages=(0, 96 // page_size, 2048 // page_size)[number % 3],
            max_step_tokens=(17, 64)[number % 2],
            max_running=batch,
            share=share,
            check_every=20,
            make_executor=on_model,
        )
        populate(world, PROGRAMS // WORLDS, within_s=2.0)
        world.settle()
        world.engine.executor.close()
        found |= world.transcripts
        account = world.engine.scheduler.meter
        pressure += account.tokens_recomputed + account.pages_in + account.preemptions
    assert ample or pressure > 100, "the pool was never short: the test would show nothing"
    return found


@lru_cache(maxsize=1)
def reference() -> dict[str, list[int]]:
    return transcripts("preserve", [(False, 1)], ample=True)


def turned(by: int) -> list[tuple[bool, int]]:
    """The ways, begun at another one for each policy."""
    return [*WAYS[by % len(WAYS) :], *WAYS[: by % len(WAYS)]]


CASES = [pytest.param(DEFAULT_POLICY, [way], id=f"{DEFAULT_POLICY}-{way}") for way in WAYS] + [
    pytest.param(name, turned(number), id=name)
    for number, name in enumerate(sorted(POLICIES))
    if name != DEFAULT_POLICY
]


@pytest.mark.parametrize(("policy", "ways"), CASES)
def test_same_tokens_whatever_is_decided(policy: str, ways: Sequence[tuple[bool, int]]) -> None:
    torch.set_num_threads(1)
    expected = reference()
    assert len(expected) >= PROGRAMS  # forks come on top
    found = transcripts(policy, ways)
    assert found.keys() == expected.keys()
    wrong = [name for name in expected if found[name] != expected[name]]
    assert not wrong, f"{len(wrong)} of {len(expected)} programs differ, first {wrong[0]}"
