"""A row's bits do not depend on the batch, the chunking or the page size: in C always, in torch when asked for."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from caesura.runtime.errors import UnsupportedModel
from caesura.runtime.executors.base import SampledToken
from caesura.runtime.model import exact, load_model

from tests.integration.model_checkpoints import VOCAB, drive, make_executor, make_reference, make_runs, save

NATIVE_OR_NOT = pytest.mark.parametrize(
    "native",
    [False, pytest.param(True, marks=pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler"))],
    ids=["torch", "native"],
)
LENGTHS = (3, 70, 33, 129, 1, 64, 20, 9)
NEW_TOKENS = 20


@pytest.fixture(scope="module", params=["llama3", "smollm2", "qwen2-window", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(save(make_reference(request.param), tmp_path_factory.mktemp("checkpoint")))


def prompts() -> list[list[int]]:
    draw = random.Random(5)
    return [[draw.randrange(3, VOCAB) for _ in range(length)] for length in LENGTHS]


def outputs(
    model: Any, chunk: int, page_size: int, only: int | None = None, *, native: bool = False
) -> list[list[SampledToken]]:
    """Sampled tokens with their logprobs: of all prompts in one batch, or of one prompt alone."""
    executor = make_executor(model, page_size, deterministic=True, native=native)
    assert native == (executor.native_refused is None), executor.native_refused
    chosen = prompts() if only is None else [prompts()[only]]
    runs = make_runs(chosen, NEW_TOKENS, chunk, page_size, logprobs=3)
    try:
        return drive(executor, runs)
    finally:
        executor.close()


@NATIVE_OR_NOT
def test_bits_are_the_same_in_any_batch_chunk_and_page_size(model: Any, native: bool) -> None:
    reference = outputs(model, chunk=64, page_size=16, native=native)
    assert len({token.token_id for tokens in reference for token in tokens}) > 5
    sizes = (16, 32, 64, 48) if native else (16, 1, 1, 7)
    for chunk, page_size in zip((1, 7, 64, 200), sizes, strict=True):
        assert outputs(model, chunk, page_size, native=native) == reference, (chunk, page_size)
    for only in range(len(LENGTHS)):
        assert outputs(model, 33, 16, only, native=native) == [reference[only]], f"prompt {only} alone"


@NATIVE_OR_NOT
@pytest.mark.parametrize("threads", [1, 2])
def test_hidden_states_are_the_same_bits_whatever_the_neighbours(model: Any, threads: int, native: bool) -> None:
    before = torch.get_num_threads()
    executor = make_executor(model, 16, deterministic=True, num_threads=threads, native=native)
    seen: list[torch.Tensor] = []
    original = executor._decoder.forward
    executor._decoder.forward = lambda batch, cache: _keep(original(batch, cache), seen)  # type: ignore[method-assign]
    try:
        alone = make_runs([prompts()[3]], 0, 129, 16)[0]
        executor.execute([alone.next_slice()], [])
        together = make_runs(prompts(), 0, 200, 16)
        executor.execute([run.next_slice() for run in together], [])
        start = sum(LENGTHS[:3])
        assert torch.equal(seen[0], seen[1][start : start + LENGTHS[3]])
    finally:
        executor.close()
        torch.set_num_threads(before)


def _keep(hidden: torch.Tensor, kept: list[torch.Tensor]) -> torch.Tensor:
    kept.append(hidden.clone())
    return hidden


def test_a_math_library_that_depends_on_the_batch_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.nn.functional.linear

    def uneven(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        result = original(rows, weight, bias)
        result[0] += 1e-6 * result[0].abs()
        return result

    monkeypatch.setattr(exact.F, "linear", uneven)
    with pytest.raises(UnsupportedModel, match="deterministic mode is not available"):
        exact.verify(model)


def test_exp_is_exact_in_every_position() -> None:
    values = torch.randn(33 * 64 * 50, generator=torch.Generator().manual_seed(1)) * 5
    whole = exact.exp_(values.clone())
    for start in (64, 32 * 7, 16_384 - 32):
        assert torch.equal(exact.exp_(values[start : start + 96].clone()), whole[start : start + 96])


def test_odd_sizes(tmp_path: Path) -> None:
    """Widths that are no multiple of a vector."""
    reference = make_reference("llama-odd")
    model = load_model(save(reference, tmp_path))
    assert outputs(model, 7, 1) == outputs(model, 200, 16)
