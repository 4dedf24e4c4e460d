"""Logits and greedy tokens against Hugging Face transformers, on every supported architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from caesura.runtime.model import load_model

from tests.integration.model_checkpoints import (
    CHECKPOINTS,
    VOCAB,
    drive,
    make_executor,
    make_reference,
    make_runs,
    save,
)

NEW_TOKENS = 64
PROMPT_LENGTHS = (1, 37, 5, 64, 18)
LOGIT_TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=sorted(CHECKPOINTS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A reference model and the same weights loaded by us."""
    reference = make_reference(request.param)
    folder = save(reference, tmp_path_factory.mktemp("checkpoint"))
    return reference, load_model(folder)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


@torch.no_grad()
def reference_greedy(reference: Any, prompt: list[int]) -> tuple[torch.Tensor, list[int]]:
    """Logits after the prompt and the greedy continuation, by plain full forward passes over a growing cache."""
    result = reference(torch.tensor([prompt]), use_cache=True)
    first, tokens = result.logits[0, -1], []
    while len(tokens) < NEW_TOKENS:
        tokens.append(int(result.logits[0, -1].argmax()))
        result = reference(torch.tensor([tokens[-1:]]), past_key_values=result.past_key_values, use_cache=True)
    return first, tokens


def test_logits_and_greedy_tokens_match_transformers(pair: tuple[Any, Any]) -> None:
    reference, model = pair
    expected = [reference_greedy(reference, prompt) for prompt in prompts()]
    varied = {token for _, tokens in expected for token in tokens}
    assert len(varied) > 5  # otherwise equality would say little
    for page_size in (1, 16):
        for chunk in (1, 7, 64):
            executor = make_executor(model, page_size, deterministic=False)
            logits: list[torch.Tensor] = []
            original = executor._decoder.logits
            executor._decoder.logits = lambda hidden: _keep(original(hidden), logits)  # type: ignore[method-assign]  # noqa: B023
            runs = make_runs(prompts(), NEW_TOKENS, chunk, page_size)
            sampled = drive(executor, runs)
            for index, (first, tokens) in enumerate(expected):
                where = f"page size {page_size}, chunk {chunk}, prompt of {PROMPT_LENGTHS[index]}"
                assert [token.token_id for token in sampled[index]] == tokens, where
                closest = min(float((row - first).abs().max()) for step in logits for row in step)
                assert closest < LOGIT_TOLERANCE, where
            executor.close()


def _keep(logits: torch.Tensor, kept: list[torch.Tensor]) -> torch.Tensor:
    kept.append(logits.clone())
    return logits


def test_deterministic_mode_matches_transformers_too(pair: tuple[Any, Any]) -> None:
    reference, model = pair
    executor = make_executor(model, 16, deterministic=True)
    sampled = drive(executor, make_runs(prompts(), NEW_TOKENS, 64, 16))
    for prompt, tokens in zip(prompts(), sampled, strict=True):
        assert [token.token_id for token in tokens] == reference_greedy(reference, prompt)[1]
    executor.close()


def test_bfloat16_stays_close_to_float32(tmp_path: Path) -> None:
    reference = make_reference("qwen3")
    folder = save(reference, tmp_path)
    results = []
    for dtype in ("float32", "bfloat16"):
        executor = make_executor(load_model(folder, dtype=dtype), 16)
        sampled = drive(executor, make_runs(prompts(), 1, 64, 16, logprobs=1))
        results.append([token[0].logprob for token in sampled])
        executor.close()
    for wide, narrow in zip(*results, strict=True):
        assert wide is not None
        assert narrow is not None
        assert abs(wide - narrow) < 0.35


def test_the_older_rope_spelling_means_the_same(tmp_path: Path) -> None:
    import json

    folder = save(make_reference("llama3"), tmp_path)
    new = load_model(folder).config
    raw = json.loads((folder / "config.json").read_text())
    params = raw.pop("rope_parameters")
    raw["rope_theta"] = params.pop("rope_theta")
    params["type"] = params.pop("rope_type")
    raw["rope_scaling"] = params
    (folder / "config.json").write_text(json.dumps(raw))
    assert load_model(folder).config == new


def test_sharded_and_bare_checkpoints_load_alike(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    reference = make_reference("qwen2.5-yarn")
    whole = load_model(save(reference, tmp_path / "whole"))
    shards = save(reference, tmp_path / "shards", max_shard_size="40KB")
    assert (shards / "model.safetensors.index.json").is_file()
    split = load_model(shards)
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    bare = save(reference, tmp_path / "bare")
    save_file({name.removeprefix("model."): value for name, value in tensors.items()}, bare / "model.safetensors")
    for other in (split, load_model(bare)):
        assert torch.equal(whole.head, other.head)
        for left, right in zip(whole.layers, other.layers, strict=True):
            assert torch.equal(left.qkv, right.qkv)
            assert torch.equal(left.gate_up, right.gate_up)
