"""The decoder: flat rows in, hidden states and logits out, keys and values written into the paged cache.

Plain functions over tensors, inference only. In deterministic mode the same functions run on tiles of exactly 32
rows (see ``exact``), which makes a row's bits independent of the batch around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from caesura.runtime.model import exact
from caesura.runtime.model.attention import Workspace, attend, plan_attention
from caesura.runtime.model.batch import Batch
from caesura.runtime.model.config import ModelConfig
from caesura.runtime.model.rotary import RotaryTable, rotate
from caesura.runtime.model.weights import LayerWeights, Model
from torch import Tensor

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Decoder:
    """Runs one model. Holds no KV: the cache is passed in."""

    def __init__(self, model: Model, *, deterministic: bool = False) -> None:
        self.model = model
        self.config = model.config
        self.deterministic = deterministic
        self._rotary = RotaryTable(model.config, model.dtype)
        self._workspace = Workspace(model.dtype)
        if deterministic:
            exact.verify(model)

    def forward(self, batch: Batch, cache: Sequence[Tensor]) -> Tensor:
        """Hidden states after the last norm: [rows, hidden].

        ``cache`` holds one tensor per layer, [2, num_pages, page_size, kv_heads, head_dim]; the rows' keys and
        values are written at ``batch.slots`` before any row attends.
        """
        rows = batch.num_rows
        token_ids, positions = batch.token_ids, batch.positions
        if self.deterministic:
            token_ids, positions = exact.pad_rows(token_ids), exact.pad_rows(positions)
        cos, sin = self._rotary.lookup(positions, batch.max_position)
        mix = self._attention(batch)
        hidden = F.embedding(token_ids, self.model.embeddings)  # [rows, hidden]
        for index, layer in enumerate(self.model.layers):
            q, k, v = self._project(layer, hidden, cos, sin)
            keys, values = cache[index].unbind(0)
            keys.flatten(0, 1).index_copy_(0, batch.slots, k[:rows])  # [slots, kv_heads, head_dim]
            values.flatten(0, 1).index_copy_(0, batch.slots, v[:rows])
            hidden = self._finish(layer, hidden, mix(index, q, keys, values))
        return rms_norm(hidden[:rows], self.model.norm, self.model.config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits of ``hidden`` [n, hidden]: [n, vocab]."""
        if not self.deterministic:
            return F.linear(hidden, self.model.head).float()
        padded = exact.pad_rows(hidden)
        parts = [F.linear(tile, self.model.head) for tile in exact.tiles(padded)]
        return torch.cat(parts)[: hidden.shape[0]].float()

    def erase(self, cache: Sequence[Tensor], slots: Tensor) -> None:
        """Zero the keys and values of these slots [n]."""
        for layer in cache:
            layer.flatten(1, 2).index_fill_(1, slots, 0.0)  # [2, slots, kv_heads, head_dim]

    def _attention(self, batch: Batch) -> Attend:
        """The step's attention, with index tensors and masks made once for all layers of a window."""
        windows = self.model.config.windows
        if self.deterministic:
            exact_plans = {window: exact.plan_attention(batch, window) for window in set(windows)}
            return lambda layer, q, keys, values: exact.attend(q, keys, values, exact_plans[windows[layer]])
        plans = {window: plan_attention(batch, window, self.model.dtype) for window in set(windows)}
        return lambda layer, q, keys, values: attend(q, keys, values, plans[windows[layer]], self._workspace)

    def _project(self, layer: LayerWeights, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        if not self.deterministic:
            return project(self.model.config, layer, hidden, cos, sin)
        tiles = zip(*map(exact.tiles, (hidden, cos, sin)), strict=True)
        parts = [project(self.model.config, layer, *tile) for tile in tiles]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def _finish(self, layer: LayerWeights, hidden: Tensor, mixed: Tensor) -> Tensor:
        if not self.deterministic:
            return finish(self.model.config, layer, hidden, mixed, F.silu)
        tiles = zip(exact.tiles(hidden), exact.tiles(mixed), strict=True)
        parts = [finish(self.model.config, layer, *tile, exact.silu) for tile in tiles]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def project(
    config: ModelConfig, layer: LayerWeights, hidden: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries [rows, heads, head_dim], rotated keys and values [rows, kv_heads, head_dim]."""
    normed = rms_norm(hidden, layer.input_norm, config.rms_norm_eps)
    fused = F.linear(normed, layer.qkv, layer.qkv_bias)
    heads = fused.view(hidden.shape[0], -1, config.head_dim)  # [rows, heads + 2 * kv_heads, head_dim]
    turning = config.num_heads + config.num_kv_heads
    rotating = heads[:, :turning]
    if layer.qk_norm is not None:
        rotating = rms_norm(rotating, layer.qk_norm, config.rms_norm_eps)
    rotated = rotate(rotating, cos, sin)
    return rotated[:, : config.num_heads], rotated[:, config.num_heads :], heads[:, turning:]


def finish(
    config: ModelConfig, layer: LayerWeights, hidden: Tensor, mixed: Tensor, silu: Callable[[Tensor], Tensor]
) -> Tensor:
    """Output projection and MLP with their residuals. ``mixed`` is [rows, heads * head_dim]."""
    hidden = hidden + F.linear(mixed, layer.out, layer.out_bias)
    normed = rms_norm(hidden, layer.mlp_norm, config.rms_norm_eps)
    gate, up = F.linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)  # two of [rows, intermediate]
    return hidden + F.linear(silu(gate) * up, layer.down, layer.down_bias)


def rms_norm(values: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, in float32 as the reference implementations do it."""
    wide = values.float()
    scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
    return (wide * scale).to(values.dtype) * weight
