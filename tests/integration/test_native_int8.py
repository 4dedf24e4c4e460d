"""8-bit weights: exact sums on any instruction set, bits that depend on the row alone, and a quality with bounds."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from caesura.runtime.embedded import checkpoint_path
from caesura.runtime.errors import UnsupportedModel
from caesura.runtime.model import load_model
from caesura.runtime.model.weights import Model, dummy_model
from caesura.runtime.native import library as native
from caesura.runtime.native.decoder import NativeDecoder, _declared
from caesura.runtime.native.packing import INT8, RowCodes, Weights

from benchmarks.int8 import NativeNet, chance, compare, conversations
from tests.integration.model_checkpoints import drive, make_executor, make_runs
from tests.integration.test_native import SHAPES, empty_cache, layout, make_model, own_pages

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


class Products:
    """The C library's product, by itself."""

    def __init__(self, library: ctypes.CDLL, weights: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._library = _declared(library)
        self._weights = Weights(self._library, INT8)
        self._linear = self._weights.linear(weights, bias)
        self._codes = RowCodes(weights.shape[1])

    def of(self, rows: torch.Tensor, threads: int = 1) -> torch.Tensor:
        out = torch.empty(rows.shape[0], self._linear.outer)
        coded = self._codes.for_rows(rows.shape[0])
        pool = self._library.caesura_open(threads)
        self._library.caesura_linear(
            pool, ctypes.byref(self._linear), rows.data_ptr(), out.data_ptr(), rows.shape[0], ctypes.byref(coded), None
        )
        self._library.caesura_pool_close(pool)
        return out


def has(flag: str) -> bool:
    try:
        return flag in Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False


VARIANTS = {
    "this machine": None,
    "avx512 vnni": (("-march=x86-64-v4", "-mavx512vnni"), ("avx512f", "avx512_vnni")),
    "avx vnni": (("-march=x86-64-v3", "-mavxvnni"), ("avx2", "avx_vnni")),
    "avx2": (("-march=x86-64-v3",), ("avx2",)),
    "plain": ((), ()),
}


@pytest.fixture(scope="module", params=list(VARIANTS))
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library as other processors would have it."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    chosen = VARIANTS[request.param]
    if chosen is None:
        return native.native_library()
    flags, needed = chosen
    if needed and (platform.machine() != "x86_64" or not all(map(has, needed))):
        pytest.skip("this processor cannot run it")
    file = tmp_path_factory.mktemp("variant") / "decoder.so"
    source = Path(native.__file__).parent / "decoder.c"
    kept = [flag for flag in native.FLAGS if not flag.startswith(("-march", "-O"))]
    command = ["cc", *kept, "-O1", *flags, "-o", str(file), str(source), *native.LIBRARIES]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    return ctypes.CDLL(str(file))


def whole_rows(draw: np.random.Generator, rows: int, inner: int) -> npt.NDArray[np.int64]:
    """Rows that are coded without loss: whole numbers from -100 to 155, both of them present."""
    made = draw.integers(-100, 156, (rows, inner))
    made[:, 0], made[:, -1] = -100, 155
    return made


@pytest.mark.parametrize("inner", [2, 3, 24, 40, 257, 1000])
def test_sums_are_exact_on_any_instruction_set(variant: ctypes.CDLL, inner: int) -> None:
    """Whole numbers lose nothing when they are coded, so every product equals the one of whole numbers."""
    draw = np.random.default_rng(inner)
    weights = draw.integers(-127, 128, (70, inner))
    weights[:, 0] = 127
    weights[3], weights[4] = 127, -127  # the largest sums there are
    products = Products(variant, torch.from_numpy(weights).float())
    for rows in (1, 2, 3, 5, 6, 7, 12, 13, 30, 50, 290):
        x = whole_rows(draw, rows, inner)
        x[0, 1:] = 155
        expected = torch.from_numpy(x @ weights.T).float()
        assert torch.equal(products.of(torch.from_numpy(x).float()), expected), f"{rows} rows"


@needs_compiler
def test_a_row_has_the_same_bits_in_any_company() -> None:
    generator = torch.Generator().manual_seed(1)
    weights, bias = torch.randn(100, 72, generator=generator), torch.randn(100, generator=generator)
    rows = torch.randn(40, 72, generator=generator) * torch.logspace(-3, 3, 40)[:, None]
    products = Products(native.native_library(), weights, bias[: weights.shape[0]])
    alone = torch.cat([products.of(rows[row : row + 1].clone()) for row in range(40)])
    for count in range(1, 41):
        assert torch.equal(products.of(rows[:count].clone()), alone[:count])
    for threads in (2, 3):
        assert torch.equal(products.of(rows, threads), alone)


@needs_compiler
def test_odd_rows_and_columns_come_out_as_they_should() -> None:
    """Zeros are zero, one-sided and tiny rows are coded, infinities and NaN are seen, in their own rows alone."""
    weights = torch.randn(33, 20, generator=torch.Generator().manual_seed(2))
    weights[7] = 0.0
    products = Products(native.native_library(), weights)
    rows = torch.rand(8, 20, generator=torch.Generator().manual_seed(3)) + 1.0
    rows[1], rows[2] = 0.0, -rows[2]
    rows[3] *= 1e-20
    rows[4, 5], rows[5, 0], rows[6, 19] = torch.inf, torch.nan, 1e37
    found = products.of(rows)
    assert torch.equal(found[1], torch.zeros(33)) and bool((found[[0, 2, 3, 7], 7] == 0).all())
    for row in (0, 2, 3, 7):
        error = (found[row] - rows[row] @ weights.T).norm() / (rows[row].norm() * weights.norm(dim=1).mean())
        assert error < 0.03, f"row {row}"
    assert bool(found[4].isnan().all()) and bool(found[5].isnan().all())
    assert bool(found[6].isfinite().all())


@needs_compiler
@pytest.mark.parametrize("shape", ["grouped", "biases", "query norms", "wide window"])
def test_a_decoder_has_the_same_bits_alone_in_company_in_chunks_and_on_any_number_of_threads(shape: str) -> None:
    model = make_model(**SHAPES[shape])
    together = layout([(0, 300, own_pages(0)), (0, 90, own_pages(1)), (0, 5, own_pages(2))])
    with torch.inference_mode():
        alone, cache = NativeDecoder(model, num_threads=1, quantization=INT8), empty_cache(model)
        reference = alone.forward(layout([(0, 300, own_pages(0))]), cache).clone()
        after = alone.forward(layout([(300, 1, own_pages(0))]), cache).clone()
        logits = alone.logits(reference)
        for threads in (2, 3):
            decoder, cache = NativeDecoder(model, num_threads=threads, quantization=INT8), empty_cache(model)
            assert torch.equal(decoder.forward(together, cache)[:300], reference)
            company = layout([(90, 1, own_pages(1)), (300, 1, own_pages(0)), (0, 40, own_pages(6))])
            assert torch.equal(decoder.forward(company, cache)[1:2], after)
            assert torch.equal(decoder.logits(reference[7:9]), logits[7:9])
            chunked, start = empty_cache(model), 0
            for size in (1, 100, 33, 166):
                part = decoder.forward(layout([(start, size, own_pages(0))]), chunked)
                assert torch.equal(part, reference[start : start + size])
                start += size


# -- quality --------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_random_models_stay_near_float32(shape: str) -> None:
    """Small random models are the hardest case: nothing averages the errors out."""
    model = make_model(**SHAPES[shape])
    found = compare(model, chance(model.config.vocab_size, 2, 150))
    assert found[None].logit_error == 0.0 and found[None].agreement == 1.0
    assert 0.0 < found[INT8].logit_error < 0.05
    assert found[INT8].agreement > 0.9
    assert found[INT8].perplexity < 1.02 * found[None].perplexity


@needs_compiler
def test_the_embedded_model_keeps_its_quality() -> None:
    found = compare(load_model(checkpoint_path()), conversations(60))
    assert 1.1 < found[None].perplexity < 5.0, "it knows all or nothing: the test would show nothing"
    assert found[INT8].perplexity < 1.01 * found[None].perplexity
    assert found[INT8].agreement > 0.98
    assert 0.0 < found[INT8].logit_error < 0.03


@needs_compiler
def test_the_embedded_model_still_solves_its_tasks() -> None:
    from caesura.runtime.embedded.evaluate import ask_each
    from caesura.runtime.embedded.tasks import Split, make_tasks
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint_path() / "tokenizer.json"))
    net = NativeNet(load_model(checkpoint_path()), INT8)
    assert ask_each(net, tokenizer, make_tasks(77, 40, Split.HELD_OUT), "held-out").right >= 36


# -- when it cannot be had ------------------------------------------------------------------------------------


@needs_compiler
def test_every_weight_product_is_quantised() -> None:
    """None is left in float32 by oversight: with codes of weights that have two values nothing but the rows is lost."""
    model = make_model(**SHAPES["biases"])
    decoder = NativeDecoder(model, quantization=INT8)
    products = [decoder._head]
    for layer in decoder._layers:
        products += [layer.qkv, layer.out, layer.gate_up, layer.down]
    assert all(one.codes and not one.packed for one in products)


def refuse(match: str, model: Model, page_size: int = 16, **options: Any) -> None:
    with pytest.raises(UnsupportedModel, match=match):
        make_executor(model, page_size, quantization=INT8, **options)


def test_what_cannot_run_is_refused_never_run_in_float(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refuse("needs the C decoder: page_size is 8", make_model(), 8)
    refuse("needs the C decoder: .*bfloat16", dummy_model(make_model().config, dtype="bfloat16"))
    refuse("the option `native` is off", make_model(), native=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    native.native_library.cache_clear()
    try:
        refuse("no C compiler", make_model())
    finally:
        native.native_library.cache_clear()


@needs_compiler
def test_too_many_inputs_for_exact_sums_are_refused() -> None:
    refuse("at most 65536 products", make_model(intermediate_size=65552, vocab_size=32, num_layers=1, windows=(None,)))


@needs_compiler
def test_an_executor_generates_with_it() -> None:
    prompts = [[3, 5, 7, 9] * 5, [11, 13] * 20]
    executors = [make_executor(make_model(), 16, quantization=INT8) for _ in range(2)]
    outputs = [
        drive(executor, make_runs(prompts, 10, chunk, 16)) for executor, chunk in zip(executors, (7, 64), strict=True)
    ]
    for executor in executors:
        executor.close()
    assert outputs[0] == outputs[1] and all(len(tokens) == 10 for tokens in outputs[0])
