"""Random tiny checkpoints of every supported architecture, in Hugging Face layout, and a driver for the executor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from caesura.runtime.executors.base import SampledToken, SliceInput
from caesura.runtime.executors.torch_cpu import TorchExecutor
from caesura.runtime.sampling import SamplerState, SamplingParams
from caesura.scheduler.types import ContextId, PageId

VOCAB = 97
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _llama(**options: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**_SHAPE, **options}))


def _mistral(**options: Any) -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**{**_SHAPE, **options}))


def _qwen2(**options: Any) -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{**_SHAPE, **options}))


def _qwen3(**options: Any) -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**_SHAPE, "head_dim": 16, **options}))


CHECKPOINTS: dict[str, Callable[[], Any]] = {
    "llama2": lambda: _llama(num_key_value_heads=4),
    "llama3": lambda: _llama(rope_parameters=_LLAMA3),
    "llama-linear": lambda: _llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}),
    "llama-biases": lambda: _llama(attention_bias=True, mlp_bias=True, head_dim=32),
    "llama-odd": lambda: _llama(attention_bias=True, mlp_bias=True, hidden_size=48, head_dim=20),
    "smollm2": lambda: _llama(
        tie_word_embeddings=True,
        num_attention_heads=3,
        num_key_value_heads=1,
        hidden_size=48,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    ),
    "mistral": lambda: _mistral(sliding_window=None),
    "mistral-window": lambda: _mistral(sliding_window=9),
    "qwen2": lambda: _qwen2(tie_word_embeddings=True),
    "qwen2.5-yarn": lambda: _qwen2(rope_parameters=_YARN),
    "qwen2-window": lambda: _qwen2(use_sliding_window=True, sliding_window=11, max_window_layers=1),
    "qwen3": lambda: _qwen3(tie_word_embeddings=True),
    "qwen3-yarn": lambda: _qwen3(
        rope_parameters={**_YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}, attention_bias=True
    ),
}


def make_reference(name: str, seed: int = 0) -> Any:
    """A Hugging Face model with weights large enough that its greedy output is varied."""
    torch.manual_seed(seed)
    model = CHECKPOINTS[name]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre, spread = (1.0, 0.2) if name.endswith("norm.weight") else (0.0, 0.2)
            parameter.normal_(centre, spread)
    return model


def save(reference: Any, folder: Path, **options: Any) -> Path:
    """Write a reference model as a checkpoint folder."""
    reference.save_pretrained(folder, **options)
    return folder


GREEDY = SamplingParams(temperature=0.0, max_new_tokens=64)


@dataclass
class Run:
    """One context driven through an executor: its tokens so far and how many are computed."""

    context_id: ContextId
    tokens: list[int]
    pages: list[PageId]
    goal: int
    chunk: int
    sampler: SamplerState
    computed: int = 0

    def next_slice(self) -> SliceInput:
        count = min(self.chunk, len(self.tokens) - self.computed)
        samples = self.computed + count == len(self.tokens)
        return SliceInput(
            self.context_id,
            self.tokens[self.computed : self.computed + count],
            self.computed,
            self.pages,
            self.sampler if samples else None,
        )

    @property
    def finished(self) -> bool:
        return self.sampler.num_generated >= self.goal


def make_runs(prompts: Sequence[Sequence[int]], goal: int, chunk: int, page_size: int, **params: Any) -> list[Run]:
    """Contexts with interleaved pages, so that no table is a plain range."""
    settings = SamplingParams(**{"temperature": 0.0, "max_new_tokens": goal, **params})
    needed = max(-(-(len(prompt) + goal) // page_size) for prompt in prompts)
    return [
        Run(
            ContextId(index),
            list(prompt),
            [PageId(1 + index + len(prompts) * page) for page in range(needed)],
            goal,
            chunk,
            SamplerState(settings, seed=index, prompt_ids=frozenset(prompt)),
        )
        for index, prompt in enumerate(prompts)
    ]


def drive(executor: TorchExecutor, runs: Sequence[Run], max_batch: int = 64) -> list[list[SampledToken]]:
    """Step all runs to their goals, prefill chunks and decodes mixed; the sampled tokens of each."""
    sampled: list[list[SampledToken]] = [[] for _ in runs]
    step = 0
    while waiting := [index for index, run in enumerate(runs) if not run.finished]:
        step += 1
        # contexts join one by one, so that decodes share their steps with the prefills of later ones
        chosen = [index for index in waiting if index < step * 2][:max_batch]
        pieces = [runs[index].next_slice() for index in chosen]
        result = executor.execute(pieces, [])
        for index, piece, output in zip(chosen, pieces, result.outputs, strict=True):
            run = runs[index]
            assert output.failure is None
            run.computed += len(piece.token_ids)
            if output.sampled is not None:
                run.sampler.accept(output.sampled.token_id)
                run.tokens.append(output.sampled.token_id)
                sampled[index].append(output.sampled)
    return sampled


def make_executor(model: Any, page_size: int, num_tokens: int = 2048, **options: Any) -> TorchExecutor:
    """An executor whose pool holds ``num_tokens``."""
    return TorchExecutor(
        model,
        page_size=page_size,
        num_device_pages=-(-num_tokens // page_size) + 64,
        num_host_pages=options.pop("num_host_pages", 4),
        eos_ids={2},
        **options,
    )
