"""A checkpoint's `config.json` as one frozen value, checked field by field.

Four families share one decoder: Llama (and SmolLM2), Mistral, Qwen2/2.5 and Qwen3, all dense. What differs between
them is data here (biases, QK-norm, windows, RoPE), so nothing downstream asks for an architecture's name.
Absent fields take the defaults of the family's reference implementation (Hugging Face transformers).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from caesura.runtime.errors import BrokenCheckpoint, UnsupportedModel

MAX_CONFIG_BYTES = 4 << 20

_FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_ROPE_KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding. Fields that ``kind`` does not use keep their defaults."""

    theta: float
    kind: str = "default"  # one of default, linear, llama3, yarn
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    truncate: bool = True  # yarn: round the correction range to whole dimensions


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape and the options of one dense decoder."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context_tokens: int
    rms_norm_eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]  # per layer: how many positions, itself included, a token sees; None is all
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_id: int | None = None
    eos_ids: frozenset[int] = frozenset()

    @property
    def kv_values_per_token(self) -> int:
        """Numbers one token stores over all layers, keys and values."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Weights held in memory (a tied head counts once)."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q_rows, kv_rows = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer = hidden * (q_rows + 2 * kv_rows) + q_rows * hidden + 3 * hidden * inner + 2 * hidden
        layer += (q_rows + 2 * kv_rows) * self.qkv_bias + hidden * self.out_bias
        layer += (2 * inner + hidden) * self.mlp_bias + 2 * self.head_dim * self.qk_norm
        embeddings = self.vocab_size * hidden * (1 if self.tie_embeddings else 2)
        return embeddings + self.num_layers * layer + hidden


def read_config(path: Path) -> ModelConfig:
    """Read ``config.json`` (a file, or a folder that holds one); `generation_config.json` beside it adds EOS ids.

    Raises BrokenCheckpoint for a missing or unreadable file and UnsupportedModel for what the decoder cannot do.
    """
    file = path / "config.json" if path.is_dir() else path
    raw = read_json_object(file)
    config = parse_config(raw)
    generation = file.with_name("generation_config.json")
    if not generation.is_file():
        return config
    extra = _token_ids(read_json_object(generation), "eos_token_id", config.vocab_size)
    return replace(config, eos_ids=config.eos_ids | extra)


def read_json_object(file: Path) -> dict[str, Any]:
    """Parse a small JSON file that must hold an object. Raises BrokenCheckpoint."""
    if not file.is_file():
        raise BrokenCheckpoint(f"{file.name} is missing in {file.parent}; point to a Hugging Face model folder")
    size_bytes = file.stat().st_size
    if size_bytes > MAX_CONFIG_BYTES:
        raise BrokenCheckpoint(f"{file.name} has {size_bytes} bytes; at most {MAX_CONFIG_BYTES} are read")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BrokenCheckpoint(f"{file.name} in {file.parent} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise BrokenCheckpoint(f"{file.name} in {file.parent} must hold a JSON object, not {type(raw).__name__}")
    return raw


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Check and translate a parsed ``config.json``. Raises UnsupportedModel naming the field."""
    family = _family(raw)
    _refuse_unsupported(raw)
    hidden = _int(raw, "hidden_size", high=1 << 17)
    layers = _int(raw, "num_hidden_layers", high=1024)
    heads = _int(raw, "num_attention_heads", high=4096)
    kv_heads = _int(raw, "num_key_value_heads", high=4096, default=heads if family == "llama" else None)
    if heads % kv_heads:
        raise UnsupportedModel(f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})")
    head_dim = _int(raw, "head_dim", high=1024, default=128 if family == "qwen3" else max(1, hidden // heads))
    if head_dim % 2:
        raise UnsupportedModel(f"head_dim is {head_dim}; rotary embedding needs an even number")
    vocab = _int(raw, "vocab_size", high=1 << 24)
    max_context = _int(raw, "max_position_embeddings", high=1 << 28)
    attention_bias = _bool(raw, "attention_bias", False)
    bos = _token_ids(raw, "bos_token_id", vocab)
    return ModelConfig(
        family=family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=_int(raw, "intermediate_size", high=1 << 20),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_context_tokens=max_context,
        rms_norm_eps=_float(raw, "rms_norm_eps", 1e-6),
        rope=_rope(raw, max_context),
        windows=_windows(raw, family, layers),
        tie_embeddings=_bool(raw, "tie_word_embeddings", False),
        qkv_bias=family == "qwen2" or (attention_bias and family in ("llama", "qwen3")),
        out_bias=attention_bias and family in ("llama", "qwen3"),
        mlp_bias=family == "llama" and _bool(raw, "mlp_bias", False),
        qk_norm=family == "qwen3",
        bos_id=min(bos) if bos else None,
        eos_ids=_token_ids(raw, "eos_token_id", vocab),
    )


def _family(raw: Mapping[str, Any]) -> str:
    if raw.get("auto_map"):
        raise UnsupportedModel(
            "auto_map asks for Python code from the checkpoint to be run; remote code is never run. "
            f"Supported architectures: {', '.join(_FAMILIES)}"
        )
    architectures = raw.get("architectures")
    if isinstance(architectures, list) and architectures:
        family = _FAMILIES.get(str(architectures[0]))
        named = f"architectures is {architectures[0]!r}"
    else:
        model_type = raw.get("model_type")
        family = model_type if model_type in _FAMILIES.values() else None
        named = f"model_type is {model_type!r}"
    if family is None:
        raise UnsupportedModel(f"{named}; supported architectures: {', '.join(_FAMILIES)}")
    return family


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    """Options that change the arithmetic and that the decoder does not implement."""
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModel(f"hidden_act is {activation!r}; only 'silu' is supported")
    if raw.get("quantization_config"):
        raise UnsupportedModel("quantization_config is set; only unquantised float checkpoints are supported")
    if raw.get("rope_interleaved"):
        raise UnsupportedModel("rope_interleaved is true; only the half-rotation layout is supported")
    partial = raw.get("partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        raise UnsupportedModel(f"partial_rotary_factor is {partial}; only 1.0 is supported")
    if raw.get("num_experts") or raw.get("num_local_experts"):
        raise UnsupportedModel("num_experts is set; mixtures of experts are not supported")


def _windows(raw: Mapping[str, Any], family: str, layers: int) -> tuple[int | None, ...]:
    full: tuple[int | None, ...] = (None,) * layers
    if family == "llama":
        return full
    if family == "mistral":
        value = raw.get("sliding_window", 4096)
        return full if value is None else (_int(raw, "sliding_window", high=1 << 28, default=4096),) * layers
    kinds = raw.get("layer_types")
    window: int | None = None
    if _bool(raw, "use_sliding_window", False) and raw.get("sliding_window", 4096) is not None:
        window = _int(raw, "sliding_window", high=1 << 28, default=4096)
    if kinds is None:
        first = _int(raw, "max_window_layers", low=0, high=1 << 20, default=28)
        return tuple(window if layer >= first else None for layer in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise UnsupportedModel(f"layer_types must list {layers} layers")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModel(f"layer_types holds {kind!r}; full_attention and sliding_attention are supported")
    if window is None and "sliding_attention" in kinds:
        raise UnsupportedModel("layer_types asks for sliding_attention but sliding_window is off")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(raw: Mapping[str, Any], max_context: int) -> RopeConfig:
    """Both spellings: ``rope_scaling`` beside ``rope_theta``, and the newer ``rope_parameters`` that holds all."""
    field = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    params = raw.get(field) or {}
    if not isinstance(params, dict):
        raise UnsupportedModel(f"{field} must be an object")
    nested = [value for value in params.values() if isinstance(value, dict)]
    if nested:
        if any(value != nested[0] for value in nested):
            raise UnsupportedModel(f"{field} differs between layer types; one rotary embedding is supported")
        params = nested[0]
    theta = _float(params, "rope_theta", _float(raw, "rope_theta", 10_000.0))
    kind = params.get("rope_type", params.get("type", "default"))
    if kind not in _ROPE_KINDS:
        raise UnsupportedModel(f"{field}.rope_type is {kind!r}; supported: {', '.join(_ROPE_KINDS)}")
    if params.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UnsupportedModel(f"{field}.partial_rotary_factor must be 1.0")
    if kind == "default":
        return RopeConfig(theta)
    original = _int(
        {**params, **_present(raw, "original_max_position_embeddings")},
        "original_max_position_embeddings",
        high=1 << 28,
        default=max_context,
    )
    if kind == "yarn":
        return _yarn(params, theta, original, max_context)
    factor = _float(params, "factor", None)
    if kind == "linear":
        return RopeConfig(theta, kind, factor)
    low, high = _float(params, "low_freq_factor", None), _float(params, "high_freq_factor", None)
    if low >= high:
        raise UnsupportedModel(f"{field}.low_freq_factor ({low}) must be below high_freq_factor ({high})")
    return RopeConfig(theta, kind, factor, original, low_freq_factor=low, high_freq_factor=high)


def _yarn(params: Mapping[str, Any], theta: float, original: int, max_context: int) -> RopeConfig:
    factor = _float(params, "factor", max_context / original)
    mscale, mscale_all = params.get("mscale"), params.get("mscale_all_dim")
    if params.get("attention_factor") is not None:
        attention_factor = _float(params, "attention_factor", None)
    elif mscale and mscale_all:
        attention_factor = _yarn_mscale(factor, float(mscale)) / _yarn_mscale(factor, float(mscale_all))
    else:
        attention_factor = _yarn_mscale(factor, 1.0)
    return RopeConfig(
        theta,
        "yarn",
        factor,
        original,
        beta_fast=float(params.get("beta_fast") or 32.0),
        beta_slow=float(params.get("beta_slow") or 1.0),
        attention_factor=attention_factor,
        truncate=_bool(params, "truncate", True),
    )


def _yarn_mscale(scale: float, weight: float) -> float:
    """Attention temperature of YaRN (Peng et al. 2023, eq. 22): 0.1 ln(s) + 1."""
    return 1.0 if scale <= 1.0 else 0.1 * weight * math.log(scale) + 1.0


def _present(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {name: raw[name]} if raw.get(name) is not None else {}


def _int(raw: Mapping[str, Any], name: str, *, low: int = 1, high: int, default: int | None = None) -> int:
    value = raw.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UnsupportedModel(f"{name} is {value!r}; it must be an integer between {low} and {high}")
    return value


def _float(raw: Mapping[str, Any], name: str, default: float | None) -> float:
    value = raw.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < 1e18:
        raise UnsupportedModel(f"{name} is {value!r}; it must be a positive number")
    return float(value)


def _bool(raw: Mapping[str, Any], name: str, default: bool) -> bool:
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise UnsupportedModel(f"{name} is {value!r}; it must be true or false")
    return value


def _token_ids(raw: Mapping[str, Any], name: str, vocab_size: int) -> frozenset[int]:
    """An id, a list of ids or nothing; ids outside the vocabulary cannot be produced and are dropped."""
    value = raw.get(name)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) for item in values):
        raise UnsupportedModel(f"{name} is {value!r}; it must be a token id or a list of them")
    return frozenset(item for item in values if 0 <= item < vocab_size)
