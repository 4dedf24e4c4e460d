"""Tensor parallelism: what a decoder asks of the other processes, and which part of each weight is whose.

Projections into heads and into the MLP are split by output rows, those back by input columns, so that a layer needs
two sums over all processes. The vocabulary is split by tokens, for embeddings and head alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist
from caesura.runtime.errors import UnsupportedModel
from caesura.runtime.model.config import ModelConfig
from torch import Tensor


class Group(Protocol):
    """The processes that hold one model together. All of them make the same calls in the same order."""

    rank: int
    size: int

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes (in place)."""

    def join(self, values: Tensor) -> Tensor:
        """``values`` [n, part] of all processes side by side: [n, part * size]."""

    def share(self, values: Tensor) -> Tensor:
        """The first process's ``values`` (in place)."""


class Alone:
    """One process holds everything."""

    rank = 0
    size = 1

    def sum(self, values: Tensor) -> Tensor:
        return values

    def join(self, values: Tensor) -> Tensor:
        return values

    def share(self, values: Tensor) -> Tensor:
        return values


class ProcessGroup:
    """Processes joined by ``torch.distributed``: NCCL between GPUs, Gloo between CPUs."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._group = group

    def sum(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self._group)
        return values

    def join(self, values: Tensor) -> Tensor:
        rows, part = values.shape
        parts = values.new_empty(self.size * rows, part)
        dist.all_gather_into_tensor(parts, values.contiguous(), group=self._group)
        return parts.view(self.size, rows, part).transpose(0, 1).reshape(rows, self.size * part)

    def share(self, values: Tensor) -> Tensor:
        dist.broadcast(values, src=0, group=self._group)
        return values


@dataclass(frozen=True, slots=True)
class Shard:
    """Process ``rank``'s part of a model split ``size`` ways. Raises UnsupportedModel where it cannot be split."""

    config: ModelConfig  # of the whole model
    rank: int
    size: int

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "intermediate_size"):
            value = getattr(self.config, name)
            if value % self.size:
                raise UnsupportedModel(
                    f"tensor_parallel is {self.size}; it must divide the model's {name} ({value}): use another number"
                )

    @property
    def local(self) -> ModelConfig:
        """The shape of this process's part; ``vocab_size`` and ``hidden_size`` stay the whole model's."""
        config, size = self.config, self.size
        return replace(
            config,
            num_heads=config.num_heads // size,
            num_kv_heads=config.num_kv_heads // size,
            intermediate_size=config.intermediate_size // size,
        )

    @property
    def vocab_part(self) -> int:
        """Tokens of the vocabulary per process; the last ones may have fewer."""
        return -(-self.config.vocab_size // self.size)

    def ranges(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...] | None:
        """Which part of the checkpoint's tensor ``name`` is this process's: a slice per dimension, None for none."""
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            first = min(shape[0], self.rank * self.vocab_part)
            return slice(first, min(shape[0], first + self.vocab_part)), slice(None)
        part = name.rsplit(".", 2)[-2:]
        if part[0] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            return (self._mine(shape[0]), *(slice(None) for _ in shape[1:]))
        if part[0] in ("o_proj", "down_proj"):
            if part[1] == "weight":
                return slice(None), self._mine(shape[1])
            return (slice(None),) if self.rank == 0 else None  # a bias is added once
        return tuple(slice(None) for _ in shape)

    def _mine(self, extent: int) -> slice:
        each = extent // self.size
        return slice(self.rank * each, (self.rank + 1) * each)


def whole(config: ModelConfig) -> Shard:
    """The part that is everything."""
    return Shard(config, 0, 1)


def pad_vocabulary(logits: Tensor, part: int) -> Tensor:
    """Bring a process's logits [n, at most part] to [n, part]; what is missing is never likely."""
    missing = part - logits.shape[1]
    return logits if not missing else torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
