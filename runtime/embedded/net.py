"""A small trainable Llama whose parameter names are Hugging Face's, so that its state is the checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from caesura.runtime.embedded.attention import attend
from safetensors.torch import load_file, save
from torch import Tensor, nn

INIT_STD = 0.02
EMBEDDING_STD = 0.2  # large beside what layers add, so that a token can be told from what stands there, layers up


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the network."""

    vocab: int = 1536
    hidden: int = 160
    layers: int = 6
    heads: int = 5
    kv_heads: int = 5
    intermediate: int = 448
    max_positions: int = 2048
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


@dataclass(slots=True)
class Cache:
    """Keys and values of one sequence: per layer [1, kv_heads, length, head_dim] each."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def length_tokens(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0

    def crop(self, length_tokens: int) -> None:
        """Forget every position from ``length_tokens`` on."""
        self.keys = [k[:, :, :length_tokens] for k in self.keys]
        self.values = [v[:, :, :length_tokens] for v in self.values]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Spelled out: F.rms_norm falls back to slow kernels on CPUs.
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def rope_tables(shape: Shape) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, [max_positions, head_dim], half-split layout."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = torch.outer(torch.arange(shape.max_positions, dtype=torch.float32), shape.rope_theta**-exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [batch, heads, length, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, query, bias=False)
        self.k_proj = nn.Linear(shape.hidden, kv, bias=False)
        self.v_proj = nn.Linear(shape.hidden, kv, bias=False)
        self.o_proj = nn.Linear(query, shape.hidden, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None, layer: int, wanted: Tensor | None
    ) -> Tensor:
        batch, length, _ = x.shape
        head_dim = self.shape.head_dim
        # [batch, length, heads * head_dim] -> [batch, heads, length, head_dim]
        q = rotate(self.q_proj(x).view(batch, length, -1, head_dim).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(batch, length, -1, head_dim).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(batch, length, -1, head_dim).transpose(1, 2)
        mask = None
        if cache is not None:
            if layer < len(cache.keys):
                k, v = torch.cat((cache.keys[layer], k), 2), torch.cat((cache.values[layer], v), 2)
                cache.keys[layer], cache.values[layer] = k, v
            else:
                cache.keys.append(k)
                cache.values.append(v)
            past = k.shape[2] - length
            mask = torch.ones(length, k.shape[2], dtype=torch.bool).tril(past)
        grouped = self.shape.heads != self.shape.kv_heads
        if self.training and not grouped and mask is None:
            out = attend(q.contiguous(), k.contiguous(), v.contiguous())
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        return _project(self.o_proj, _picked(out.transpose(1, 2).reshape(batch, length, -1), wanted))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return _project(self.down_proj, F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, both residual."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.mlp = FeedForward(shape)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None, layer: int, wanted: Tensor | None
    ) -> Tensor:
        """[batch, length, hidden] -> the same, or [len(wanted), hidden]: all positions are read, those are computed."""
        attended = _project(self.self_attn, self.input_layernorm(x), cos, sin, cache, layer, wanted)
        x = _picked(x, wanted) + attended
        return x + _project(self.mlp, self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and the final norm (Hugging Face's ``model.`` prefix)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.norm_eps)


class TinyLlama(nn.Module):
    """The decoder with its head tied to the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        cos, sin = rope_tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        residual_std = INIT_STD / (2 * shape.layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = residual_std if last else EMBEDDING_STD if "embed" in name else INIT_STD
                nn.init.normal_(parameter, std=std)
        nn.init.constant_(self.model.norm.weight, INIT_STD / EMBEDDING_STD)  # so that logits begin small

    def hidden_states(self, ids: Tensor, cache: Cache | None = None, wanted: Tensor | None = None) -> Tensor:
        """[batch, length] ids -> [batch, length, hidden]; with a cache (batch 1), ids follow what it holds.

        ``wanted`` are flat indices in [batch, length]: their hidden states alone, [len(wanted), hidden].
        """
        start = cache.length_tokens if cache is not None else 0
        end = start + ids.shape[1]
        cos, sin = self.get_buffer("cos")[start:end], self.get_buffer("sin")[start:end]
        x: Tensor = self.model.embed_tokens(ids)
        for index, layer in enumerate(self.model.layers):
            last = index == self.shape.layers - 1
            x = _project(layer, x, cos, sin, cache, index, wanted if last else None)
        return _project(self.model.norm, x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocab]."""
        return F.linear(hidden, self.model.embed_tokens.weight)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def _project(module: nn.Module, *args: Any) -> Tensor:
    """Call a module; its result is a tensor (nn.Module's call is untyped)."""
    out: Tensor = module(*args)
    return out


def _picked(x: Tensor, wanted: Tensor | None) -> Tensor:
    """[batch, length, size] -> [len(wanted), size], positions counted over the whole batch; without any, as it is."""
    return x if wanted is None else x.flatten(0, 1).index_select(0, wanted)


def hf_config(shape: Shape, *, eos_id: int, pad_id: int) -> dict[str, Any]:
    """``config.json`` for LlamaForCausalLM."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "vocab_size": shape.vocab,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": INIT_STD,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def save_weights(model: TinyLlama, folder: Path) -> None:
    """Write ``model.safetensors``."""
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    (folder / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))


def load_net(folder: Path) -> TinyLlama:
    """The network of a checkpoint folder, in evaluation mode."""
    config = json.loads((folder / "config.json").read_text())
    shape = Shape(
        vocab=config["vocab_size"],
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        intermediate=config["intermediate_size"],
        max_positions=config["max_position_embeddings"],
        rope_theta=config["rope_theta"],
        norm_eps=config["rms_norm_eps"],
    )
    model = TinyLlama(shape)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()
