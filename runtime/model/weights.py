"""A model's weights in memory: loaded from safetensors or drawn at random, with QKV and gate/up fused.

Every check (names, shapes, dtypes, file lengths, memory) happens before the first tensor is allocated, so a load
either succeeds or fails with one error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from caesura.runtime.errors import BrokenCheckpoint, ModelError, UnsupportedModel
from caesura.runtime.model.config import ModelConfig, read_config
from caesura.runtime.model.memory import require_memory
from caesura.runtime.model.tensorfile import TensorEntry, read_entries
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.jinja", "*.txt"]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. q_rows = heads * head_dim, kv_rows = kv_heads * head_dim."""

    input_norm: Tensor  # [hidden]
    qkv: Tensor  # [q_rows + 2 * kv_rows, hidden]
    qkv_bias: Tensor | None
    qk_norm: Tensor | None  # [heads + kv_heads, head_dim]: the query norm repeated, then the key norm
    out: Tensor  # [hidden, q_rows]
    out_bias: Tensor | None
    mlp_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 * intermediate, hidden]
    gate_up_bias: Tensor | None
    down: Tensor  # [hidden, intermediate]
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder that can be run: its config and its weights, all of one dtype."""

    config: ModelConfig
    dtype: torch.dtype
    embeddings: Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [hidden]
    head: Tensor  # [vocab, hidden]; the embeddings themselves when tied

    @property
    def weight_bytes(self) -> int:
        return self.config.num_parameters * self.dtype.itemsize


def load(source: str | Path, *, dtype: str, load_format: str, seed: int, revision: str | None = None) -> Model:
    """See :func:`caesura.runtime.model.load_model`."""
    if dtype not in DTYPES:
        raise UnsupportedModel(f"dtype is {dtype!r}; supported: {', '.join(DTYPES)}")
    if load_format not in ("auto", "safetensors", "dummy"):
        raise UnsupportedModel(f"load_format is {load_format!r}; supported: auto, safetensors, dummy")
    path = resolve_source(source, revision)
    config = read_config(path)
    if load_format == "dummy":
        return dummy_model(config, dtype=dtype, seed=seed)
    with open_tensors(config, path) as read:
        _require_memory(config, DTYPES[dtype])
        return assemble(config, DTYPES[dtype], read)


Ranges = tuple[slice, ...]  # a part of a tensor: a slice for each dimension


class Read(Protocol):
    """Reads a tensor, or a part of it, by the name that ``tensor_shapes`` gives it."""

    def __call__(self, name: str, ranges: Ranges | None = None) -> Tensor: ...


@contextmanager
def open_tensors(config: ModelConfig, path: Path) -> Iterator[Read]:
    """A checkpoint's tensors, after all checks but memory's. Raises BrokenCheckpoint, UnsupportedModel."""
    entries = _select(config, read_entries(path))
    rename = _prefixed(entries)
    with ExitStack() as stack:
        files: dict[Path, Any] = {}

        def read(name: str, ranges: Ranges | None = None) -> Tensor:
            name = rename(name)
            file = entries[name].file
            if file not in files:
                files[file] = stack.enter_context(_opened(file))
            tensor: Tensor = files[file].get_tensor(name) if ranges is None else files[file].get_slice(name)[ranges]
            return tensor

        head = "lm_head.weight"
        if config.tie_embeddings and head in entries and not torch.equal(read(head), read("model.embed_tokens.weight")):
            raise BrokenCheckpoint("tie_word_embeddings is true, but lm_head.weight differs from the embeddings")
        yield read


def _opened(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except SafetensorError as error:
        raise BrokenCheckpoint(f"{file.name} cannot be read: {error}") from error


def dummy_model(config: ModelConfig, *, dtype: str = "float32", seed: int = 0) -> Model:
    """Random weights from a config alone: normal with standard deviation 1 / sqrt(fan in), norms at one.

    At this scale the layers, not the embedding, decide the logits, so greedy output is not a repetition of the
    prompt's last token. The same seed gives the same weights.
    """
    _require_memory(config, DTYPES[dtype])
    return assemble(config, DTYPES[dtype], dummy_tensors(config, seed))


def dummy_tensors(config: ModelConfig, seed: int, device: torch.device | None = None) -> Read:
    """Draws the tensors of a dummy model, to be read in one order. Each device has its own numbers."""
    generator = torch.Generator(device or "cpu").manual_seed(seed)
    shapes = tensor_shapes(config)

    def read(name: str, ranges: Ranges | None = None) -> Tensor:
        shape = shapes[name]
        if name.endswith("norm.weight"):
            drawn = torch.ones(shape, device=device)
        else:
            scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.02
            drawn = torch.empty(shape, device=device).normal_(0.0, scale, generator=generator)
        return drawn if ranges is None else drawn[ranges]

    return read


def resolve_source(source: str | Path, revision: str | None = None) -> Path:
    """A local folder or `config.json`, or a hub id ("owner/name"), which is downloaded or found in the local cache.

    The network is used only when nothing exists at the path; HF_HUB_OFFLINE is respected. Raises ModelError.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    text = str(source)
    if not _HUB_ID.fullmatch(text):
        raise BrokenCheckpoint(f"{text!r} is neither an existing folder nor a hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client has no common base for network, cache and access errors
        raise ModelError(f"{text} is no local folder and could not be fetched from the hub: {error}") from error


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the decoder needs, by its name in the checkpoint."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        base = f"model.layers.{layer}."
        rows = {"q": (q_rows, hidden), "k": (kv_rows, hidden), "v": (kv_rows, hidden), "o": (hidden, q_rows)}
        for letter, shape in rows.items():
            shapes[f"{base}self_attn.{letter}_proj.weight"] = shape
            if config.out_bias if letter == "o" else config.qkv_bias:
                shapes[f"{base}self_attn.{letter}_proj.bias"] = shape[:1]
        for part, shape in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
            shapes[f"{base}mlp.{part}_proj.weight"] = shape
            if config.mlp_bias:
                shapes[f"{base}mlp.{part}_proj.bias"] = shape[:1]
        shapes[f"{base}input_layernorm.weight"] = (hidden,)
        shapes[f"{base}post_attention_layernorm.weight"] = (hidden,)
        if config.qk_norm:
            shapes[f"{base}self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{base}self_attn.k_norm.weight"] = (config.head_dim,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def _prefixed(entries: Mapping[str, TensorEntry]) -> Callable[[str], str]:
    """Checkpoints saved from the bare decoder leave the "model." prefix away."""
    bare = "embed_tokens.weight" in entries
    return lambda name: name.removeprefix("model.") if bare else name


def _select(config: ModelConfig, entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Compare the checkpoint's tensors with the config's, both ways. Raises BrokenCheckpoint, UnsupportedModel."""
    rename = _prefixed(entries)
    shapes = {rename(name): shape for name, shape in tensor_shapes(config).items()}
    missing = [name for name in shapes if name not in entries]
    if missing:
        raise BrokenCheckpoint(f"{missing[0]} is missing from the checkpoint ({len(missing)} of {len(shapes)} missing)")
    for name, shape in shapes.items():
        if entries[name].shape != shape:
            raise BrokenCheckpoint(f"{name} has shape {list(entries[name].shape)}; config.json asks for {list(shape)}")
        if not entries[name].is_float:
            raise UnsupportedModel(f"{name} has dtype {entries[name].dtype}; only float weights are supported")
    for name in entries:
        known = name in shapes or name.endswith("rotary_emb.inv_freq")
        if not known and not (config.tie_embeddings and name == "lm_head.weight"):
            raise BrokenCheckpoint(f"{name} is in the checkpoint, but config.json gives it no place")
    return entries


def _require_memory(config: ModelConfig, dtype: torch.dtype) -> None:
    needed = config.num_parameters * dtype.itemsize + config.vocab_size * config.hidden_size * 4
    require_memory(
        needed,
        f"loading {config.num_parameters / 1e6:.0f}M weights as {str(dtype).removeprefix('torch.')}",
        "use a smaller model or --dtype bfloat16",
    )


def assemble(
    config: ModelConfig, dtype: torch.dtype, read: Callable[[str], Tensor], device: torch.device | None = None
) -> Model:
    """A model of the tensors that ``read`` gives, each asked for once."""

    def take(*names: str) -> Tensor:
        """The named tensors, one below the other, in one allocation of the target dtype."""
        parts = [read(name) for name in names]
        rows = sum(part.shape[0] for part in parts)
        target = torch.empty((rows, *parts[0].shape[1:]), dtype=dtype, device=device)
        row = 0
        for part in parts:
            target[row : row + part.shape[0]].copy_(part)
            row += part.shape[0]
        return target

    embeddings = take("model.embed_tokens.weight")
    return Model(
        config=config,
        dtype=dtype,
        embeddings=embeddings,
        layers=tuple(_layer(config, f"model.layers.{index}.", take) for index in range(config.num_layers)),
        norm=take("model.norm.weight"),
        head=embeddings if config.tie_embeddings else take("lm_head.weight"),
    )


def _layer(config: ModelConfig, base: str, take: Callable[..., Tensor]) -> LayerWeights:
    attn, mlp = f"{base}self_attn.", f"{base}mlp."
    qk_norm = None
    if config.qk_norm:
        query = take(f"{attn}q_norm.weight").expand(config.num_heads, -1)
        key = take(f"{attn}k_norm.weight").expand(config.num_kv_heads, -1)
        qk_norm = torch.cat((query, key))  # [heads + kv_heads, head_dim]
    return LayerWeights(
        input_norm=take(f"{base}input_layernorm.weight"),
        qkv=take(*(f"{attn}{letter}_proj.weight" for letter in "qkv")),
        qkv_bias=take(*(f"{attn}{letter}_proj.bias" for letter in "qkv")) if config.qkv_bias else None,
        qk_norm=qk_norm,
        out=take(f"{attn}o_proj.weight"),
        out_bias=take(f"{attn}o_proj.bias") if config.out_bias else None,
        mlp_norm=take(f"{base}post_attention_layernorm.weight"),
        gate_up=take(f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"),
        gate_up_bias=take(f"{mlp}gate_proj.bias", f"{mlp}up_proj.bias") if config.mlp_bias else None,
        down=take(f"{mlp}down_proj.weight"),
        down_bias=take(f"{mlp}down_proj.bias") if config.mlp_bias else None,
    )
