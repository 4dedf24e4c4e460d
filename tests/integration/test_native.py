"""The decoder in C against the one in torch: same numbers, and the same bits whatever stands beside a row."""

from __future__ import annotations

import random
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caesura.runtime.model.batch import Batch, Piece
from caesura.runtime.model.config import ModelConfig, RopeConfig
from caesura.runtime.model.transformer import Decoder
from caesura.runtime.model.weights import Model, dummy_model
from caesura.runtime.native import library
from caesura.runtime.native.decoder import NativeDecoder, unsupported
from caesura.runtime.native.library import NoNativeLibrary, native_library

from tests.integration.model_checkpoints import make_executor, make_runs

PAGE = 16
NUM_PAGES = 400

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


def make_model(seed: int = 0, **fields: Any) -> Model:
    """Two layers; the second one sees a window where ``fields`` asks for it."""
    shape: dict[str, Any] = {
        "family": "qwen3",
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 88,
        "num_layers": 2,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 32,
        "max_context_tokens": 4096,
        "rms_norm_eps": 1e-5,
        "rope": RopeConfig(1e4),
        "windows": (None, None),
    }
    return dummy_model(ModelConfig(**{**shape, **fields}), seed=seed)


SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "biases": {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "query norms": {"qk_norm": True, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16},
    "one window": {"windows": (None, 40)},
    "wide window": {"windows": (300, 300)},
    "wide heads": {"head_dim": 112, "num_heads": 2, "num_kv_heads": 1},
    "many heads": {"num_heads": 20, "num_kv_heads": 1, "head_dim": 16},
}


def layout(pieces: list[tuple[int, int, list[int]]], seed: int = 0) -> Batch:
    """(start, rows, pages) each; token ids follow from position and page, so equal pages mean equal KV."""
    placed: list[Piece] = []
    ids, positions, slots = [], [], []
    row = 0
    for start, count, pages in pieces:
        where = np.arange(start, start + count)
        table = np.asarray(pages[: -(-(start + count) // PAGE)], dtype=np.int64)
        placed.append(Piece(row, count, start, table))
        positions.append(where)
        slots.append(table[where // PAGE] * PAGE + where % PAGE)
        ids.append((table[where // PAGE] * 31 + where * 7 + seed) % 101)
        row += count
    every = np.concatenate(positions)
    return Batch(
        torch.from_numpy(np.concatenate(ids)),
        torch.from_numpy(every),
        torch.from_numpy(np.concatenate(slots)),
        tuple(placed),
        PAGE,
        int(every.max()),
    )


def empty_cache(model: Model) -> list[torch.Tensor]:
    config = model.config
    shape = (2, NUM_PAGES, PAGE, config.num_kv_heads, config.head_dim)
    return [torch.zeros(shape) for _ in range(config.num_layers)]


def own_pages(index: int, count: int = 50) -> list[int]:
    return list(range(1 + index * count, 1 + (index + 1) * count))


@pytest.fixture(params=sorted(SHAPES))
def model(request: pytest.FixtureRequest) -> Model:
    made = make_model(**SHAPES[request.param])
    if (reason := unsupported(made, PAGE)) is not None:
        pytest.skip(reason)
    return made


@needs_compiler
def test_hidden_states_and_logits_match_torch(model: Model) -> None:
    """Prompts in chunks, then decodes of very different lengths together with another chunk."""
    native, plain = NativeDecoder(model), Decoder(model)
    ours, theirs = empty_cache(model), empty_cache(model)
    lengths = (600, 255, 256, 17, 1)
    steps = [layout([(0, length, own_pages(index)) for index, length in enumerate(lengths)])]
    steps.append(layout([(length, 1, own_pages(index)) for index, length in enumerate(lengths)]))
    steps.append(layout([(601, 1, own_pages(0)), (256, 90, own_pages(1)), (18, 1, own_pages(3)), (2, 3, own_pages(4))]))
    with torch.inference_mode():
        for batch in steps:
            found, expected = native.forward(batch, ours), plain.forward(batch, theirs)
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(native.logits(found[:3]), plain.logits(expected[:3]), atol=2e-4, rtol=1e-4)


@needs_compiler
def test_a_row_has_the_same_bits_alone_in_company_in_chunks_and_on_any_number_of_threads(model: Model) -> None:
    tail = own_pages(6)
    together = layout([(0, 700, own_pages(0)), (0, 300, own_pages(1)), (0, 5, own_pages(2))])
    with torch.inference_mode():
        alone = NativeDecoder(model, num_threads=1)
        cache = empty_cache(model)
        reference = alone.forward(layout([(0, 700, own_pages(0))]), cache).clone()
        after = alone.forward(layout([(700, 1, own_pages(0))]), cache).clone()
        for threads in (2, 3):
            decoder, cache = NativeDecoder(model, num_threads=threads), empty_cache(model)
            assert torch.equal(decoder.forward(together, cache)[:700], reference)
            company = layout([(300, 1, own_pages(1)), (700, 1, own_pages(0)), (0, 40, tail), (5, 1, own_pages(2))])
            assert torch.equal(decoder.forward(company, cache)[1:2], after)
            chunked, start = empty_cache(model), 0
            for size in (1, 100, 33, 300, 266):
                part = decoder.forward(layout([(start, size, own_pages(0))]), chunked)
                assert torch.equal(part, reference[start : start + size])
                start += size


@needs_compiler
def test_contexts_that_share_pages_are_read_once_and_come_out_the_same(model: Model) -> None:
    """Shared for two whole segments and a bit, then apart; each as when it is alone."""
    shared = own_pages(0, 36)
    tables = [shared + list(range(100 + 20 * index, 120 + 20 * index)) for index in range(5)]
    ends = [590, 620, 700, 640, 600]
    with torch.inference_mode():
        decoder, cache = NativeDecoder(model), empty_cache(model)
        decoder.forward(layout([(0, 36 * PAGE, shared)]), cache)
        for table, end in zip(tables, ends, strict=True):
            decoder.forward(layout([(36 * PAGE, end - 36 * PAGE, table)]), cache)
        batch = layout([(end, 1, table) for table, end in zip(tables, ends, strict=True)])
        together = decoder.forward(batch, cache).clone()
        for index, (table, end) in enumerate(zip(tables, ends, strict=True)):
            assert torch.equal(decoder.forward(layout([(end, 1, table)]), cache)[0], together[index])


@needs_compiler
def test_what_lies_behind_a_context_is_never_seen(model: Model) -> None:
    """Stale numbers in the rest of a page, and in all other pages, change nothing."""
    batch, step = layout([(0, 70, own_pages(0))]), layout([(70, 1, own_pages(0))])
    with torch.inference_mode():
        decoder = NativeDecoder(model)
        clean, dirty = empty_cache(model), [layer.fill_(1e9) for layer in empty_cache(model)]
        for each in (batch, step):
            assert torch.equal(decoder.forward(each, clean).clone(), decoder.forward(each, dirty))


@needs_compiler
def test_erased_slots_are_zero_and_no_other_changes(model: Model) -> None:
    with torch.inference_mode():
        decoder, cache, kept = NativeDecoder(model), empty_cache(model), empty_cache(model)
        batch = layout([(0, 40, own_pages(0)), (0, 20, own_pages(1))])
        decoder.forward(batch, cache)
        decoder.forward(layout([(0, 40, own_pages(0))]), kept)
        decoder.erase(cache, batch.slots[40:])
        assert all(torch.equal(layer, other) for layer, other in zip(cache, kept, strict=True))


@needs_compiler
def test_generation_goes_on_after_a_swap_into_other_pages() -> None:
    """The page layout is the decoder's own: whole pages move, and nobody has to know it."""
    from caesura.scheduler.types import Move, MoveId, MoveKind, PageId

    from tests.integration.model_checkpoints import drive

    prompt = [random.Random(3).randrange(101) for _ in range(70)]
    executor = make_executor(make_model(), PAGE, num_tokens=512, num_host_pages=24)
    assert executor.native_refused is None
    expected = drive(executor, make_runs([prompt], 8, 64, PAGE))[0]
    run = make_runs([prompt], 8, 64, PAGE)[0]
    run.goal = 3
    tokens = drive(executor, [run])[0]
    used = run.pages[: -(-run.computed // PAGE)]
    parked = [PageId(page) for page in range(3, 3 + len(used))]
    executor.begin([Move(MoveId(1), MoveKind.OUT, tuple(used), tuple(parked))])
    while not executor.acknowledged(wait_s=5.0):
        pass
    executor.arena.device[:, :, used] = 7.0
    moved = [PageId(20 + 2 * index) for index in range(len(run.pages))]
    executor.begin([Move(MoveId(2), MoveKind.IN, tuple(parked), tuple(moved[: len(used)]))])
    while not executor.acknowledged(wait_s=5.0):
        pass
    run.pages, run.goal = moved, 8
    tokens += drive(executor, [run])[0]
    executor.close()
    assert tokens == expected


@needs_compiler
def test_a_thread_that_steps_keeps_torchs_operators_to_itself_and_no_other_thread_notices() -> None:
    from tests.integration.model_checkpoints import drive

    executor = make_executor(make_model(), PAGE)
    runs = make_runs([[5, 6, 7]], 4, 64, PAGE, temperature=0.7)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(1) as stepping, ThreadPoolExecutor(1) as another:
            stepping.submit(drive, executor, runs).result()
            assert stepping.submit(torch.get_num_threads).result() == 1
            assert another.submit(torch.get_num_threads).result() == 3
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
        executor.close()


@needs_compiler
def test_products_of_floats_are_as_exact_as_float32_allows() -> None:
    """Against float64, for values of very different sizes; on matrix tiles each float is three smaller numbers."""
    draw = torch.Generator().manual_seed(4)
    model = make_model(hidden_size=1040, vocab_size=77)
    model.head.copy_(torch.randn(model.head.shape, generator=draw) * torch.logspace(-6, 6, 77)[:, None])
    decoder = NativeDecoder(model, num_threads=2)
    for count in (1, 16, 17, 33, 100, 300):
        rows = torch.randn(count, 1040, generator=draw) * torch.logspace(-9, 9, count)[:, None]
        scale = rows.double().norm(dim=1)[:, None] * model.head.double().norm(dim=1)
        exact = rows.double() @ model.head.double().T
        assert float(((decoder.logits(rows).double() - exact).abs() / scale).max()) < 3e-7
    rows[5, 3], rows[7, 1039] = torch.inf, torch.nan
    found = decoder.logits(rows).isfinite().all(dim=1)
    assert not found[5] and not found[7] and int(found.sum()) == len(rows) - 2


# -- when it cannot be had ------------------------------------------------------------------------------------


@pytest.fixture
def forgetful() -> Iterator[None]:
    native_library.cache_clear()
    yield
    native_library.cache_clear()


def test_models_it_cannot_run_are_told_why() -> None:
    assert "page_size is 8" in str(unsupported(make_model(), 8))
    assert "bfloat16" in str(unsupported(dummy_model(make_model().config, dtype="bfloat16"), PAGE))
    assert "head size 20" in str(unsupported(make_model(head_dim=20), PAGE))
    assert "query heads" in str(unsupported(make_model(num_heads=49, num_kv_heads=1, head_dim=16), PAGE))


@pytest.mark.usefixtures("forgetful")
def test_without_a_compiler_torch_does_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    executor = make_executor(make_model(), PAGE)
    assert "no C compiler" in str(executor.native_refused)
    executor.close()


@needs_compiler
@pytest.mark.usefixtures("forgetful")
def test_a_failing_compiler_and_an_open_cache_folder_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failing = tmp_path / "cc"
    failing.write_text("#!/bin/sh\necho 'out of coffee' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", str(failing))
    with pytest.raises(NoNativeLibrary, match="out of coffee"):
        native_library()
    folder = tmp_path / "caesura" / "native"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(folder.iterdir()) == []
    folder.chmod(0o777)
    with pytest.raises(NoNativeLibrary, match="writable by nobody else"):
        native_library()


@needs_compiler
@pytest.mark.usefixtures("forgetful")
def test_it_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native_library()
    built = list((tmp_path / "caesura" / "native").iterdir())
    assert len(built) == 1
    native_library.cache_clear()
    monkeypatch.setattr(library, "_compile", lambda *_: pytest.fail("compiled again"))
    native_library()
