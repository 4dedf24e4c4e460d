"""The small operations between matrix products, behind one protocol: torch's own, exact ones, FlashInfer's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from caesura.runtime.model import exact
from caesura.runtime.model.config import ModelConfig
from caesura.runtime.model.rotary import RotaryTable, rotate
from torch import Tensor


class Kernels(Protocol):
    """Shapes: ``values`` [rows, hidden], ``heads`` [rows, heads, head_dim]. A row never depends on another one."""

    def linear(self, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def norm(self, values: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm over the last dimension."""

    def add_norm(self, update: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Add ``update`` to ``residual`` in place and return the norm of the sum (``update`` may be overwritten)."""

    def head_norm(self, heads: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The norm of each head, with one weight [head_dim] for all of them."""

    def rotate(self, queries: Tensor, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary embedding (in place where that is faster)."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu of the first half of the columns, times the second half."""

    def keep_top(self, probs: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
        """Which tokens of ``probs`` [rows, vocab] pass both top-k [rows] int32 and top-p [rows]: a bool mask. None, but
        not for both, where no row has such a bound."""


def rotary_tables(
    config: ModelConfig, dtype: torch.dtype, num_positions: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin of every position there will be: two of [positions, head_dim / 2] on the device."""
    cos, sin = RotaryTable(config, dtype).tables(num_positions - 1)
    return cos[:num_positions].to(device), sin[:num_positions].to(device)


class TorchKernels:
    """Plain torch, on any device and in any dtype."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, num_positions: int, device: torch.device) -> None:
        self._cos, self._sin = rotary_tables(config, dtype, num_positions, device)

    def linear(self, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(values, weight, bias)

    def norm(self, values: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = values.float()
        scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
        return (wide * scale).to(values.dtype) * weight

    def add_norm(self, update: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.norm(residual.add_(update), weight, eps)

    def head_norm(self, heads: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.norm(heads, weight, eps)

    def rotate(self, queries: Tensor, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._cos[positions], self._sin[positions]
        return rotate(queries, cos, sin), rotate(keys, cos, sin)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def keep_top(self, probs: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
        ordered, ids = torch.sort(probs, dim=-1, descending=True, stable=True)
        before = ordered.double().cumsum(-1) - ordered.double()  # mass of likelier tokens
        rank = torch.arange(probs.shape[1], device=probs.device)
        passes = torch.ones_like(probs, dtype=torch.bool)
        if top_p is not None:
            passes = (before < top_p[:, None]) | (rank == 0)
        if top_k is not None:
            passes = passes & (rank < top_k[:, None])
        return torch.zeros_like(passes).scatter_(1, ids, passes)


class ExactKernels(TorchKernels):
    """The same on tiles of exactly 32 rows, so that a row's bits do not depend on the batch (see ``exact``)."""

    def linear(self, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _tiled(lambda tile: F.linear(tile, weight, bias), values)

    def norm(self, values: Tensor, weight: Tensor, eps: float) -> Tensor:
        return _tiled(lambda tile: super(ExactKernels, self).norm(tile, weight, eps), values)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        def one(tile: Tensor) -> Tensor:
            gate, up = tile.chunk(2, dim=-1)
            return exact.silu(gate) * up

        return _tiled(one, gate_up)


def _tiled(operation: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    parts = [operation(tile) for tile in exact.tiles(exact.pad_rows(rows))]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[: rows.shape[0]]
