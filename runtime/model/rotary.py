"""Rotary position embedding: inverse frequencies of the four kinds and a table of cos and sin by position."""

from __future__ import annotations

import math

import torch
from caesura.runtime.model.config import ModelConfig, RopeConfig
from torch import Tensor

_BLOCK_POSITIONS = 2048  # the table grows by whole blocks, so a position's bits never depend on when it was needed


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position for each pair of dimensions: [head_dim / 2], float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inverse = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return inverse / rope.factor
    if rope.kind == "llama3":
        return _llama3(inverse, rope)
    if rope.kind == "yarn":
        return _yarn(inverse, rope, head_dim)
    return inverse


def _llama3(inverse: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1: long waves are divided by the factor, short ones kept, those between blended."""
    wavelength = 2.0 * math.pi / inverse
    original = float(rope.original_max_positions)
    blend = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1.0 - blend) * inverse / rope.factor + blend * inverse
    scaled = torch.where(wavelength > original / rope.low_freq_factor, inverse / rope.factor, blended)
    return torch.where(wavelength < original / rope.high_freq_factor, inverse, scaled)


def _yarn(inverse: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    """YaRN (Peng et al. 2023, section 3.2): a ramp over dimensions from extrapolation to interpolation."""

    def dimension(rotations: float) -> float:
        turns = rope.original_max_positions / (rotations * 2.0 * math.pi)
        return head_dim * math.log(turns) / (2.0 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / span).clamp(0.0, 1.0)
    return inverse / rope.factor * ramp + inverse * (1.0 - ramp)


class RotaryTable:
    """cos and sin for every position seen so far, in the model's dtype; grows on demand."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self._inverse = inverse_frequencies(config.rope, config.head_dim)
        self._scale = config.rope.attention_factor
        self._dtype = dtype
        self._cos = torch.empty(0, config.head_dim // 2, dtype=dtype)
        self._sin = torch.empty(0, config.head_dim // 2, dtype=dtype)

    def lookup(self, positions: Tensor, max_position: int) -> tuple[Tensor, Tensor]:
        """cos and sin of ``positions`` [rows], none above ``max_position``: two of [rows, head_dim / 2]."""
        cos, sin = self.tables(max_position)
        return cos[positions], sin[positions]

    def tables(self, max_position: int) -> tuple[Tensor, Tensor]:
        """cos and sin of all positions up to ``max_position`` and beyond: two of [positions, head_dim / 2]."""
        while self._cos.shape[0] <= max_position:
            self._grow()
        return self._cos, self._sin

    def _grow(self) -> None:
        start = self._cos.shape[0]
        positions = torch.arange(start, start + _BLOCK_POSITIONS, dtype=torch.float32)
        angles = positions[:, None] * self._inverse  # [block, head_dim / 2]
        self._cos = torch.cat((self._cos, (angles.cos() * self._scale).to(self._dtype)))
        self._sin = torch.cat((self._sin, (angles.sin() * self._scale).to(self._dtype)))


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``heads`` [rows, heads, head_dim] by each row's angle; halves are paired, as in Hugging Face layouts."""
    half = heads.shape[-1] // 2
    first, second = heads[..., :half], heads[..., half:]
    cos, sin = cos[:, None, :], sin[:, None, :]  # [rows, 1, head_dim / 2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
