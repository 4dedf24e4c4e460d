"""The decoder's layer loop over ``Kernels``, ``Attention`` and ``Group``: the same on a GPU, on a CPU, in a shard."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from caesura.runtime.kv.device_arena import PagedCache
from caesura.runtime.model.cuda.attention import Attend
from caesura.runtime.model.cuda.kernels import Kernels
from caesura.runtime.model.cuda.parallel import Group, Shard, pad_vocabulary
from caesura.runtime.model.weights import LayerWeights, Model
from torch import Tensor


class DeviceDecoder:
    """Runs one model, or one process's part of it. ``model.config`` is the part's, ``shard.config`` the whole's."""

    def __init__(self, model: Model, shard: Shard, kernels: Kernels, group: Group) -> None:
        self.model = model
        self.config = model.config
        self._shard, self._kernels, self._group = shard, kernels, group
        self._first_token = min(shard.config.vocab_size, shard.rank * shard.vocab_part)

    def forward(self, token_ids: Tensor, positions: Tensor, slots: Tensor, attend: Attend, cache: PagedCache) -> Tensor:
        """Hidden states after the last norm: [rows, hidden]. All inputs [rows] int64 on the device.

        The rows' keys and values are written at ``slots`` before any row attends.
        """
        kernels, group, eps = self._kernels, self._group, self.config.rms_norm_eps
        layers = self.model.layers
        residual = self._embed(token_ids)
        normed = kernels.norm(residual, layers[0].input_norm, eps)
        for index, layer in enumerate(layers):
            queries, keys, values = self._project(layer, normed, positions)
            cache.write(index, slots, keys, values)
            mixed = attend(index, queries)  # [rows, heads * head_dim]
            update = group.sum(kernels.linear(mixed, layer.out, layer.out_bias))
            normed = kernels.add_norm(update, residual, layer.mlp_norm, eps)
            inner = kernels.silu_mul(kernels.linear(normed, layer.gate_up, layer.gate_up_bias))
            update = group.sum(kernels.linear(inner, layer.down, layer.down_bias))
            following = layers[index + 1].input_norm if index + 1 < len(layers) else self.model.norm
            normed = kernels.add_norm(update, residual, following, eps)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits of ``hidden`` [n, hidden]: [n, vocab]."""
        own = self._kernels.linear(hidden, self.model.head, None).float()
        if self._group.size == 1:
            return own
        joined = self._group.join(pad_vocabulary(own, self._shard.vocab_part))
        return joined[:, : self._shard.config.vocab_size]

    def _embed(self, token_ids: Tensor) -> Tensor:
        if self._group.size == 1:
            return F.embedding(token_ids, self.model.embeddings)
        count = self.model.embeddings.shape[0]
        own = token_ids - self._first_token
        mine = (own >= 0) & (own < count)
        rows = F.embedding(own.clamp(0, max(0, count - 1)), self.model.embeddings)
        return self._group.sum(torch.where(mine[:, None], rows, torch.zeros_like(rows)))  # all but one are zero: exact

    def _project(self, layer: LayerWeights, normed: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [rows, heads, head_dim], rotated keys and values [rows, kv_heads, head_dim]."""
        config, kernels = self.config, self._kernels
        fused = kernels.linear(normed, layer.qkv, layer.qkv_bias)
        heads = fused.view(normed.shape[0], -1, config.head_dim)  # [rows, heads + 2 * kv_heads, head_dim]
        turning = config.num_heads + config.num_kv_heads
        queries, keys, values = heads[:, : config.num_heads], heads[:, config.num_heads : turning], heads[:, turning:]
        if layer.qk_norm is not None:
            queries = kernels.head_norm(queries, layer.qk_norm[0], config.rms_norm_eps)
            keys = kernels.head_norm(keys, layer.qk_norm[-1], config.rms_norm_eps)
        queries, keys = kernels.rotate(queries, keys, positions)
        return queries, keys, values
