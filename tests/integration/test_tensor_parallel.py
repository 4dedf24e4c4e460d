"""One model over several real processes (Gloo): the tokens of one process, swaps and scores included."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from caesura.runtime.build_device import build_device, refuse_unsupported
from caesura.runtime.config import EngineConfig
from caesura.runtime.embedded import checkpoint_path
from caesura.runtime.embedded.net import Shape, TinyLlama
from caesura.runtime.embedded.train import export
from caesura.runtime.errors import EngineStopped, InvalidRequest, UnsupportedModel
from caesura.runtime.executors.base import SliceInput
from caesura.runtime.executors.crew import Begin, _obey
from caesura.runtime.executors.torch_cuda import CudaExecutor
from caesura.runtime.model import load_model
from caesura.runtime.model.config import ModelConfig, parse_config
from caesura.runtime.model.cuda.device import Device
from caesura.runtime.model.cuda.loading import load_part
from caesura.runtime.model.cuda.parallel import Shard
from caesura.runtime.model.cuda.runner import Runner
from caesura.runtime.sampling import SamplingParams
from caesura.runtime.service import EngineService
from caesura.runtime.sim import SimTokenizer
from caesura.scheduler.types import ContextId, Move, MoveId, MoveKind, PageId
from tokenizers import Tokenizer

from tests.integration.device_executor import make_device_executor
from tests.integration.model_checkpoints import drive, make_executor, make_reference, make_runs, save
from tests.integration.test_device_executor import PROMPTS, tokens_of
from tests.integration.test_identical_output import tiny_model
from tests.sim.agents import PROFILE


def split(folder: Path, size: int = 2, **options: Any) -> CudaExecutor:
    config = EngineConfig(model=str(folder), tensor_parallel=size, page_size=4, num_threads=1, **options)
    pools = (lambda *_: (192, 16), lambda *_: 0)
    return build_device(config, folder, SimTokenizer(97), *pools)[0]


@pytest.mark.parametrize(
    "name", ["llama-biases", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "qwen2", "llama2"))]
)
def test_two_processes_yield_the_tokens_of_one(name: str, tmp_path: Path) -> None:
    folder = save(make_reference(name), tmp_path)
    expected = tokens_of(make_executor(load_model(folder), 4, native=False))
    executor = split(folder)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a terminal sends them to all; the first one decides
        executor._crew._members[0]._process.send_signal(number)  # type: ignore[union-attr]
    runs = make_runs(PROMPTS, 12, 7, 4)
    assert [[token.token_id for token in sampled] for sampled in drive(executor, runs)] == expected

    # a swap out of the way and into other pages, on all processes alike
    used = runs[0].pages[: -(-runs[0].computed // 4)]
    parked = [PageId(page) for page in range(len(used))]
    moved = [PageId(180 + page) for page in range(len(used))]
    for kind, source, target in ((MoveKind.OUT, used, parked), (MoveKind.IN, parked, moved)):
        executor.begin([Move(MoveId(1), kind, tuple(source), tuple(target))])
        assert executor.acknowledged(wait_s=5.0) == [1]
    tokens = runs[0].tokens
    last = SliceInput(ContextId(0), tokens[runs[0].computed :], runs[0].computed, [*moved, PageId(100)], None)
    score = SliceInput(ContextId(0), last.token_ids, last.start, last.pages, None, [(0, 5), (0, 6)], 2)
    found = executor.execute([score], [Move(MoveId(2), MoveKind.COPY, (PageId(1),), (PageId(99),))]).outputs[0]
    plain = make_executor(load_model(folder), 4, native=False)
    table = [PageId(page) for page in range(20)]
    whole = SliceInput(ContextId(0), tokens, 0, table, None, [(len(tokens) - 1, 5), (len(tokens) - 1, 6)], 2)
    wanted = plain.execute([whole], ()).outputs[0]
    assert found.scores == pytest.approx(wanted.scores, abs=1e-4)
    plain.close()

    with pytest.raises(EngineStopped, match="process 1"):  # a process that is gone is told of, not waited for
        executor._crew._members[0]._process.kill()  # type: ignore[union-attr]
        executor._crew._members[0]._process.wait()  # type: ignore[union-attr]
        for _ in range(3):
            executor.begin([Move(MoveId(3), MoveKind.OUT, (PageId(1),), (PageId(1),))])
    executor.close()
    executor.close()


class Told:
    """A crew, and a member's arena, that remember what they were told."""

    def __init__(self) -> None:
        self.orders: list[tuple[str, list[MoveId]]] = []

    def begin(self, moves: Sequence[Move], done: Sequence[MoveId] = ()) -> None:
        self.orders.append(("begin", [*done]))

    def wait_behind(self, moves: Sequence[MoveId]) -> None:
        self.orders.append(("wait", [*moves]))

    def step(self, layout: object, copies: object, done: Sequence[MoveId]) -> None:
        self.orders.append(("step", [*done]))

    def close(self) -> None: ...


def test_copies_are_begun_behind_those_that_the_first_process_has_seen_end() -> None:
    crew, arena = Told(), Told()
    runner = make_device_executor(tiny_model(), 16, num_device_pages=4, num_host_pages=2, flashinfer=False).runner
    executor = CudaExecutor(runner, eos_ids={2}, crew=crew)
    executor.begin([Move(MoveId(1), MoveKind.OUT, (PageId(3),), (PageId(1),))])
    executor.collect(executor.launch([], []))
    assert executor.acknowledged(wait_s=5.0) == [1]
    again = [Move(MoveId(2), MoveKind.OUT, (PageId(2),), (PageId(1),))]  # into the page that the first one left
    executor.begin(again)
    executor.collect(executor.launch([], []))
    assert crew.orders == [("begin", []), ("step", []), ("begin", [1]), ("step", [])]
    _obey(cast("Runner", SimpleNamespace(arena=arena)), Begin(again, [MoveId(1)]))
    assert arena.orders == [("wait", [1]), ("begin", [])]


def test_a_checkpoint_serves_from_two_processes(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint_path() / "tokenizer.json"))
    torch.manual_seed(1)
    shape = Shape(vocab=tokenizer.get_vocab_size(), hidden=64, layers=2, heads=4, kv_heads=2, intermediate=96)
    export(TinyLlama(shape), tokenizer, tmp_path)

    async def answer(config: EngineConfig) -> list[list[int]]:
        found = []
        with EngineService.start(config) as service:
            for prompt in ("What is 17 + 25?", "Tell me about rivers."):
                context = await service.open()
                await context.append(service.tokenizer.encode(prompt))
                params = SamplingParams(temperature=0.0, max_new_tokens=24)
                found.append([token async for chunk in context.generate(params) for token in chunk.token_ids])
                await context.close()
        return found

    base: dict[str, Any] = {"model": str(tmp_path), "kv_tokens": 1024, "num_threads": 1, "profile": PROFILE}
    one = asyncio.run(answer(EngineConfig(**base)))
    assert asyncio.run(answer(EngineConfig(**base, tensor_parallel=2))) == one
    assert not torch.distributed.is_initialized()


def test_parts_hold_every_weight_once(tmp_path: Path) -> None:
    folder = save(make_reference("llama-biases"), tmp_path)
    whole = load_model(folder)
    parts = [load_part(folder, Device("cpu"), dtype="float32", rank=rank, size=2)[0] for rank in range(2)]
    layer, split_layers = whole.layers[1], [part.layers[1] for part in parts]
    assert torch.equal(torch.cat([part.head for part in parts]), whole.head)
    assert torch.equal(torch.cat([part.embeddings for part in parts]), whole.embeddings)
    assert torch.equal(torch.cat([one.down for one in split_layers], dim=1), layer.down)
    assert torch.equal(torch.cat([one.out for one in split_layers], dim=1), layer.out)
    config = whole.config
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    queries = torch.cat([one.qkv[: heads // 2] for one in split_layers])
    values = torch.cat([one.qkv[-kv // 2 :] for one in split_layers])
    assert torch.equal(queries, layer.qkv[:heads])
    assert torch.equal(values, layer.qkv[-kv:])
    assert layer.out_bias is not None and layer.down_bias is not None
    for name in ("out_bias", "down_bias"):  # added once, whatever the number of processes
        assert torch.equal(sum(getattr(one, name) for one in split_layers), getattr(layer, name))


def config_of(**fields: Any) -> ModelConfig:
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 101,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }
    return parse_config(shape | fields)


def test_a_model_that_cannot_be_split_is_refused_with_the_numbers() -> None:
    with pytest.raises(UnsupportedModel, match=r"tensor_parallel is 3; it must divide the model's num_heads \(4\)"):
        Shard(config_of(), 0, 3)
    with pytest.raises(UnsupportedModel, match=r"num_kv_heads \(2\)"):
        Shard(config_of(), 0, 4)
    with pytest.raises(UnsupportedModel, match=r"intermediate_size \(47\)"):
        Shard(config_of(intermediate_size=47), 0, 2)
    assert [Shard(config_of(), rank, 2).ranges("lm_head.weight", (101, 32)) for rank in range(2)] == [
        (slice(0, 51), slice(None)),
        (slice(51, 101), slice(None)),
    ]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"device": "cuda", "quantization": "int8"}, "quantization is 'int8'"),
        ({"tensor_parallel": 2, "kv_disk": "."}, "kv_disk and tensor_parallel"),
        ({"device": "cuda:1", "tensor_parallel": 2}, "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        refuse_unsupported(EngineConfig(**fields))


def test_a_part_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    folder = save(make_reference("llama2"), tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(EngineStopped, match=r"process 1 of the model could not load its part: .*config.json"):
        split(folder)
