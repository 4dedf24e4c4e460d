"""Checkpoints that cannot be used: one clear error each, before anything is allocated."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from caesura.runtime.errors import BrokenCheckpoint, ModelError, NotEnoughMemory, UnsupportedModel
from caesura.runtime.model import load_model, memory, weights
from caesura.runtime.model.config import parse_config
from safetensors.torch import load_file, save_file

from tests.integration.model_checkpoints import make_reference, save

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_reference("llama2"), tmp_path_factory.mktemp("original"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    for name in ("config.json", WEIGHTS):
        (tmp_path / name).write_bytes((original / name).read_bytes())
    return tmp_path


def _config(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text())
        raw.update(changes)
        (folder / "config.json").write_text(json.dumps(raw))

    return apply


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return apply


def _header(change: Callable[[dict[str, Any]], Any], encoding: str = "utf-8") -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode(encoding)
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])

    return apply


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes())) and None


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def _index(mapping: dict[str, str]) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping})) and None
    )


QKV = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"

TABLE: dict[str, tuple[Callable[[Path], Any], type[ModelError], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), BrokenCheckpoint, "config.json is missing"),
    "config no json": (lambda f: (f / "config.json").write_text("{"), BrokenCheckpoint, "not valid JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), BrokenCheckpoint, "must hold a JSON object"),
    "architecture": (_config(architectures=["MambaForCausalLM"]), UnsupportedModel, "MambaForCausalLM"),
    "remote code": (_config(auto_map={"AutoModel": "x.Y"}), UnsupportedModel, "remote code is never run"),
    "activation": (_config(hidden_act="gelu"), UnsupportedModel, "hidden_act"),
    "rope": (_config(rope_parameters={"rope_type": "longrope"}), UnsupportedModel, "rope_type is 'longrope'"),
    "rope factor": (_config(rope_parameters={"rope_type": "linear"}), UnsupportedModel, "factor is None"),
    "quantised": (_config(quantization_config={"bits": 4}), UnsupportedModel, "quantization_config"),
    "heads": (_config(num_key_value_heads=3), UnsupportedModel, "num_key_value_heads"),
    "huge": (_config(hidden_size=10**12), UnsupportedModel, "hidden_size"),
    "negative": (_config(num_hidden_layers=-1), UnsupportedModel, "num_hidden_layers"),
    "layers": (_config(num_hidden_layers=4), BrokenCheckpoint, "model.layers.3"),
    "fewer layers": (_config(num_hidden_layers=2), BrokenCheckpoint, "gives it no place"),
    "shape": (_config(intermediate_size=80), BrokenCheckpoint, "config.json asks for [80, 64]"),
    "missing tensor": (_tensors(lambda t: t.pop(QKV)), BrokenCheckpoint, f"{QKV} is missing"),
    "extra tensor": (_tensors(lambda t: t.update(x=torch.ones(1))), BrokenCheckpoint, "gives it no place"),
    "integers": (_tensors(lambda t: t.update({NORM: t[NORM].long()})), UnsupportedModel, "dtype I64"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), BrokenCheckpoint, f"{WEIGHTS} is missing"),
    "pickle": (_pickled, UnsupportedModel, "pickle can run code"),
    "truncated": (_bytes(lambda b: b[:-10]), BrokenCheckpoint, "truncated"),
    "cut header": (_bytes(lambda b: b[:100]), BrokenCheckpoint, "truncated"),
    "empty": (_bytes(lambda _: b""), BrokenCheckpoint, "too short"),
    "trailing": (_bytes(lambda b: b + b"x" * 9), BrokenCheckpoint, "belong to no tensor"),
    "header length": (_bytes(lambda b: b"\xff" * 8 + b[8:]), BrokenCheckpoint, "declares a header"),
    "header json": (_bytes(lambda b: b[:8] + b"[" + b[9:]), BrokenCheckpoint, "not valid JSON"),
    "header utf-16": (_header(lambda h: None, "utf-16-le"), BrokenCheckpoint, "not valid JSON"),
    "header nan": (_header(lambda h: h[NORM].update(x=math.nan)), BrokenCheckpoint, "NaN is no number"),
    "metadata": (_header(lambda h: h.update(__metadata__={"step": 1})), BrokenCheckpoint, "object of strings"),
    "metadata a list": (_header(lambda h: h.update(__metadata__=[])), BrokenCheckpoint, "object of strings"),
    "deep header": (
        _bytes(lambda _: struct.pack("<Q", 200_000) + b"[" * 200_000),
        BrokenCheckpoint,
        "not valid JSON",
    ),
    "overlap": (
        _header(lambda h: h[NORM].update(data_offsets=[0, 256])),
        BrokenCheckpoint,
        "overlap or hole",
    ),
    "offsets beyond": (
        _header(lambda h: h[NORM].update(data_offsets=[1 << 40, (1 << 40) + 256])),
        BrokenCheckpoint,
        "truncated",
    ),
    "negative offsets": (_header(lambda h: h[NORM].update(data_offsets=[-256, 0])), BrokenCheckpoint, "natural"),
    "huge shape": (_header(lambda h: h[NORM].update(shape=[1 << 60, 4])), BrokenCheckpoint, "needs"),
    "unknown dtype": (_header(lambda h: h[NORM].update(dtype="F4")), UnsupportedModel, "dtype 'F4'"),
    "index without map": (_index({}), BrokenCheckpoint, "no weight_map"),
    "index path": (_index({NORM: "../other.safetensors"}), BrokenCheckpoint, "names the shard"),
    "missing shard": (_index({NORM: "model-2.safetensors"}), BrokenCheckpoint, "model-2.safetensors is missing"),
    "wrong shard": (_index({"nothing": WEIGHTS}), BrokenCheckpoint, "does not hold it"),
}


@pytest.mark.parametrize("case", list(TABLE))
def test_a_bad_checkpoint_gives_one_clear_error(folder: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    damage, error, says = TABLE[case]
    damage(folder)
    monkeypatch.setattr(weights, "assemble", lambda *_: pytest.fail("weights were touched before the checks"))
    with pytest.raises(error) as caught:
        load_model(folder)
    assert says in str(caught.value)
    assert type(caught.value) is error


def test_a_header_that_only_safetensors_refuses_gives_the_same_error(folder: Path) -> None:
    _header(lambda header: header.update(__metadata__={"half": "\ud800"}))(folder)
    with pytest.raises(BrokenCheckpoint, match=rf"{WEIGHTS} cannot be read"):
        load_model(folder)


def test_too_little_memory_is_said_before_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: 1000)
    for load_format in ("auto", "dummy"):
        with pytest.raises(NotEnoughMemory, match=r"needs .* GiB and .* GiB are available"):
            load_model(folder, load_format=load_format)


def test_sources_that_do_not_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(BrokenCheckpoint, match="neither an existing folder nor a hub id"):
        load_model(tmp_path / "absent")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="could not be fetched"):
        load_model("nobody/absent-model-of-caesura")


def test_dtype_and_format_are_checked(folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match="dtype is 'int8'"):
        load_model(folder, dtype="int8")
    with pytest.raises(UnsupportedModel, match="load_format is 'pickle'"):
        load_model(folder, load_format="pickle")


def test_dummy_weights_depend_on_the_seed_alone(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    first, again, other = (load_model(folder, load_format="dummy", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.layers[1].down, again.layers[1].down)
    assert not torch.equal(first.layers[1].down, other.layers[1].down)
    assert load_model(folder, load_format="dummy", dtype="bfloat16").head.dtype == torch.bfloat16


def test_parameters_are_counted_exactly(tmp_path: Path) -> None:
    for name in ("llama-biases", "qwen2", "qwen3", "smollm2"):
        reference = make_reference(name)
        model = load_model(save(reference, tmp_path / name))
        assert model.config.num_parameters == sum(p.numel() for p in reference.parameters())


def test_generation_config_adds_end_tokens(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert load_model(folder).config.eos_ids == {2, 5, 7}


def test_windows_of_qwen_follow_the_layer_types() -> None:
    raw = {
        "architectures": ["Qwen2ForCausalLM"], "vocab_size": 10, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2,
    }  # fmt: skip
    assert parse_config(raw).windows == (None, None, 5)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert parse_config({**raw, "layer_types": kinds}).windows == (5, None, 5)
    assert parse_config({**raw, "use_sliding_window": False}).windows == (None,) * 3
    with pytest.raises(UnsupportedModel, match="sliding_window is off"):
        parse_config({**raw, "layer_types": kinds, "use_sliding_window": False})


def test_a_differing_head_beside_tied_embeddings_is_refused(tmp_path: Path) -> None:
    folder = save(make_reference("smollm2"), tmp_path)
    _tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(folder)
    load_model(folder)
    _tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))(folder)
    with pytest.raises(BrokenCheckpoint, match="tie_word_embeddings"):
        load_model(folder)
