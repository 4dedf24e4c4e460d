"""What we ask of FlashInfer and of CUDA graphs, without either: against its documented behaviour in plain torch, and
against its real signatures where it is installed."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caesura.runtime.model import load_model
from caesura.runtime.model.cuda import flashinfer_kernels, graphs, runner
from caesura.runtime.model.cuda.flashinfer_kernels import FlashInferAttention, shared_pages
from caesura.runtime.model.cuda.layout import Layout, LayoutBuilder
from caesura.scheduler.types import ContextId, PageId
from torch import Tensor

from tests.integration import fake_flashinfer
from tests.integration.device_executor import make_device_executor
from tests.integration.model_checkpoints import drive, make_executor, make_reference, make_runs, save
from tests.integration.test_device_executor import PROMPTS, llama, tokens_of


def eager_capture() -> graphs.Capture:
    """Instead of a graph: what was captured runs again and fills the same outputs."""

    def capture(run: graphs.Run) -> tuple[Callable[[], None], tuple[Tensor, Tensor]]:
        outputs = run()

        def replay() -> None:
            for kept, new in zip(outputs, run(), strict=True):
                kept.copy_(new)

        return replay, outputs

    return capture


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fake_flashinfer.CALLS.clear()
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer.module())
    monkeypatch.setattr(runner, "refused", lambda *_: None)
    monkeypatch.setattr(runner, "cuda_capture", eager_capture)
    monkeypatch.setattr(graphs, "SIZES", (1, 2, 4, 8))
    monkeypatch.setattr(flashinfer_kernels, "WORKSPACE_BYTES", 1 << 10)
    yield


@pytest.mark.parametrize("name", ["llama3", "llama-biases", "mistral-window", "qwen2-window", "qwen3"])
def test_the_same_tokens_with_and_without_graphs(name: str, tmp_path: Path) -> None:
    model = load_model(save(make_reference(name), tmp_path))
    expected = tokens_of(make_executor(model, 4, native=False))
    assert tokens_of(make_device_executor(model, 4, graphs=False)) == expected
    executor = make_device_executor(model, 4)
    runs = make_runs(PROMPTS, 12, 7, 4)
    assert [[token.token_id for token in sampled] for sampled in drive(executor, runs)] == expected
    assert executor.runner.graphs is not None
    assert executor.runner.graphs.replays > 5
    executor.close()


def test_a_batch_beyond_the_largest_graph_runs_without() -> None:
    prompts = [[5 + number, 9, 33] for number in range(11)]
    expected = tokens_of(make_executor(llama(), 4, native=False), prompts)
    assert tokens_of(make_device_executor(llama(), 4), prompts) == expected


def test_a_prefix_that_all_share_is_read_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_kernels, "CASCADE_TOKENS", 40)
    monkeypatch.setattr(graphs.DecodeGraphs, "size_for", lambda *_: None)
    shared = list(range(20, 44))
    prompts = [[*shared, 5 + number, 9, 33][: 27 - number % 2] for number in range(4)]

    def run(executor: Any) -> list[list[int]]:
        runs = make_runs(prompts, 6, 40, 4)
        for one in runs[1:]:  # the first's pages stand for all, as the radix tree has it
            one.pages = [*runs[0].pages[:6], *one.pages[6:]]
        found = [[token.token_id for token in sampled] for sampled in drive(executor, runs)]
        executor.close()
        return found

    executor = make_device_executor(llama(), 4)
    attention = executor.runner.attention
    assert isinstance(attention, FlashInferAttention)
    assert run(executor) == run(make_executor(llama(), 4, native=False))
    assert attention.cascades > 2


def layout_of(*pieces: tuple[int, int, list[int]]) -> Layout:
    from caesura.runtime.executors.base import SliceInput

    slices = [
        SliceInput(ContextId(number), [1] * count, start, [PageId(page) for page in pages], None)
        for number, (start, count, pages) in enumerate(pieces)
    ]
    return LayoutBuilder(4, 100, 50).build(slices, {})


def test_shared_pages_leave_each_piece_its_own_rows_and_a_page() -> None:
    assert shared_pages(layout_of((9, 1, [3, 4, 5]), (10, 1, [3, 4, 6]))) == 2
    assert shared_pages(layout_of((9, 1, [3, 4, 5]), (10, 1, [3, 7, 6]))) == 1
    assert shared_pages(layout_of((9, 1, [3, 4, 5]), (10, 1, [2, 4, 6]))) == 0
    assert shared_pages(layout_of((9, 1, [3, 4, 5]), (5, 6, [3, 4, 6]))) == 1  # its rows begin within the second page
    assert shared_pages(layout_of((9, 1, [3, 4, 5]))) == 0
    assert shared_pages(layout_of((8, 1, [3, 4, 5]), (8, 1, [3, 4, 5]))) == 2


def test_layouts_survive_the_way_to_another_process() -> None:
    layout = layout_of((9, 1, [3, 4, 5]), (5, 6, [3, 4, 6]))
    again = Layout.decode(layout.encode())
    for name in ("token_ids", "positions", "pages", "row_ends", "page_ends", "last_page_tokens"):
        assert np.array_equal(getattr(again, name), getattr(layout, name))
    assert layout.positions.tolist() == [9, 5, 6, 7, 8, 9, 10]
    assert layout.slots(4).tolist() == [21, 17, 18, 19, 24, 25, 26]
    assert layout.last_page_tokens.tolist() == [2, 3]


def test_every_sampling_argument_reaches_the_kernels_as_they_want_it() -> None:
    cases: list[dict[str, Any]] = [{"top_p": 0.7}, {"top_p": 0.0}, {"top_k": 3}]
    for params in cases:
        found = tokens_of(make_device_executor(llama(), 4), temperature=0.8, **params)
        fallback = make_device_executor(llama(), 4, flashinfer=False)
        assert found == tokens_of(fallback, temperature=0.8, **params)
    names = {name for name, _, _ in fake_flashinfer.CALLS}
    assert {"top_k_renorm_probs", "top_p_renorm_probs"} <= names


PLACES = {
    "rmsnorm": ("norm", None, "rmsnorm"),
    "fused_add_rmsnorm": ("norm", None, "fused_add_rmsnorm"),
    "apply_rope_with_cos_sin_cache_inplace": ("rope", None, "apply_rope_with_cos_sin_cache_inplace"),
    "silu_and_mul": ("activation", None, "silu_and_mul"),
    "top_k_renorm_probs": ("sampling", None, "top_k_renorm_probs"),
    "top_p_renorm_probs": ("sampling", None, "top_p_renorm_probs"),
    "prefill": ("prefill", "BatchPrefillWithPagedKVCacheWrapper", "__init__"),
    "prefill.plan": ("prefill", "BatchPrefillWithPagedKVCacheWrapper", "plan"),
    "decode": ("decode", "BatchDecodeWithPagedKVCacheWrapper", "__init__"),
    "decode.plan": ("decode", "BatchDecodeWithPagedKVCacheWrapper", "plan"),
    "cascade": ("cascade", "MultiLevelCascadeAttentionWrapper", "__init__"),
    "cascade.plan": ("cascade", "MultiLevelCascadeAttentionWrapper", "plan"),
    "cascade.run": ("cascade", "MultiLevelCascadeAttentionWrapper", "run"),
}


def real_signature(folder: Path, module: str, owner: str | None, name: str) -> inspect.Signature:
    """Read from the source: importing it needs a GPU's libraries."""
    file = next(file for file in (folder / f"{module}.py", folder / module / "__init__.py") if file.exists())
    tree: Any = ast.parse(file.read_text())
    body, names = tree.body, [name]
    if owner is not None:
        body = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == owner).body
        names.append(f"_{name}_impl")  # where a version's `plan` takes any keywords, this names them
    found = [node for node in body if isinstance(node, ast.FunctionDef) and node.name in names]
    arguments = found[-1].args  # the last one: overloads come before
    positional = arguments.posonlyargs + arguments.args
    required = len(positional) - len(arguments.defaults)
    kinds = inspect.Parameter
    parameters = [
        kinds(one.arg, kinds.POSITIONAL_OR_KEYWORD, default=kinds.empty if place < required else None)
        for place, one in enumerate(positional)
        if one.arg != "self"
    ]
    if arguments.vararg is not None:
        parameters.append(kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    parameters += [kinds(one.arg, kinds.KEYWORD_ONLY, default=None) for one in arguments.kwonlyargs]
    return inspect.Signature(parameters)


def test_our_calls_fit_the_signatures_of_the_installed_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "flashinfer")
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or spec.origin is None:
        pytest.skip("flashinfer is not installed")
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer.module())
    tokens_of(make_device_executor(llama(), 4), temperature=0.8, top_p=0.7, top_k=3)
    monkeypatch.setattr(flashinfer_kernels, "CASCADE_TOKENS", 4)
    test_a_prefix_that_all_share_is_read_once_for_all(monkeypatch)
    folder = Path(spec.origin).parent
    seen = set()
    for name, args, kwargs in fake_flashinfer.CALLS:
        seen.add(name)
        real_signature(folder, *PLACES[name]).bind(*args, **kwargs)
    assert seen >= set(PLACES) - {"rmsnorm"}
    run = real_signature(folder, "prefill", "BatchPrefillWithPagedKVCacheWrapper", "run")
    run.bind(torch.zeros(1), (torch.zeros(1), torch.zeros(1)), out=torch.zeros(1))
    run = real_signature(folder, "decode", "BatchDecodeWithPagedKVCacheWrapper", "run")
    run.bind(torch.zeros(1), (torch.zeros(1), torch.zeros(1)))
