"""Attention over the paged cache, planned once per step: torch's, which needs nothing but torch, and the protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from caesura.runtime.kv.device_arena import PagedCache
from caesura.runtime.model import exact
from caesura.runtime.model.attention import AttentionPlan, Workspace, attend, plan_attention
from caesura.runtime.model.config import ModelConfig
from caesura.runtime.model.cuda.layout import Layout
from torch import Tensor

Attend = Callable[[int, Tensor], Tensor]  # layer, queries [rows, heads, head_dim] -> [rows, heads * head_dim]


class Attention(Protocol):
    """Plans how a step's rows attend. ``cache`` already holds the step's keys and values when the plan is used."""

    def plan(self, layout: Layout, cache: PagedCache) -> Attend: ...


class TorchAttention:
    """Torch's fused attention over gathered pages: the fallback, and the reference for the kernels."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._config, self._dtype, self._device = config, dtype, device
        self._workspace = Workspace(dtype, device)

    def plan(self, layout: Layout, cache: PagedCache) -> Attend:
        windows = self._config.windows
        batch = layout.batch()
        plans = {window: _moved(plan_attention(batch, window, self._dtype), self._device) for window in set(windows)}
        return lambda layer, queries: attend(
            queries, cache.keys(layer), cache.values(layer), plans[windows[layer]], self._workspace
        )


def _moved(plan: AttentionPlan, device: torch.device) -> AttentionPlan:
    if device.type == "cpu":
        return plan

    def there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, non_blocking=True)

    groups = [
        replace(group, rows=group.rows.to(device), pages=group.pages.to(device), mask=there(group.mask))
        for group in plan.groups
    ]
    chunks = [replace(chunk, pages=chunk.pages.to(device), mask=there(chunk.mask)) for chunk in plan.chunks]
    return AttentionPlan(tuple(groups), tuple(chunks))


class ExactAttention:
    """Attention whose sums have one order (see ``exact``), for tests of the strongest kind."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._config, self._device = config, device

    def plan(self, layout: Layout, cache: PagedCache) -> Attend:
        windows = self._config.windows
        batch = layout.batch(page_scale=cache.page_slots // cache.page_size)
        plans = {window: exact.plan_attention(batch, window).to(self._device) for window in set(windows)}

        def attend_exactly(layer: int, queries: Tensor) -> Tensor:
            keys, values = (cache.side(layer, side)[None] for side in range(2))
            return exact.attend(queries, keys, values, plans[windows[layer]])

        return attend_exactly
