"""FlashInfer's kernels behind ``Kernels`` and ``Attention``. The one module that imports it, and at first use only.

One attention kernel serves prefill, mixed batches, decodes and shared prefixes ("fa2" over pages, tensor cores for
decodes too), so that one instantiation is compiled, once per head size, and cached by FlashInfer under the user's home.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from caesura.runtime.kv.device_arena import PagedCache
from caesura.runtime.model.config import ModelConfig
from caesura.runtime.model.cuda.attention import Attend
from caesura.runtime.model.cuda.device import Device
from caesura.runtime.model.cuda.kernels import rotary_tables
from caesura.runtime.model.cuda.layout import Int32s, Layout
from torch import Tensor

BACKEND = "fa2"
WORKSPACE_BYTES = 512 << 20  # partial sums of long contexts cut into parts
HEAD_SIZES = (64, 128, 256)
CASCADE_TOKENS = 1 << 16  # reading so many tokens less is worth a step without a CUDA graph
LEAST_MASS = 2.0**-24  # the likeliest token has more


def refused(config: ModelConfig, dtype: torch.dtype, device: Device) -> str | None:
    """Why FlashInfer cannot be used for this model on this device, None when it can."""
    if not device.is_cuda:
        return f"the device is {device.torch}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"its kernels do not compute in {str(dtype).removeprefix('torch.')}"
    if config.head_dim not in HEAD_SIZES:
        return f"head size {config.head_dim} is none of {HEAD_SIZES}"
    if importlib.util.find_spec("flashinfer") is None:
        return "it is not installed (pip install 'caesura[cuda]')"
    return None


class FlashInferKernels:
    """Norms, rotary embedding, activation and top-k/top-p thresholds, each one launch."""

    def __init__(self, config: ModelConfig, num_positions: int, device: torch.device) -> None:
        import flashinfer

        self._flashinfer = flashinfer
        self._head_dim = config.head_dim
        self._cos_sin = torch.cat(rotary_tables(config, torch.float32, num_positions, device), dim=-1)

    def linear(self, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(values, weight, bias)

    def norm(self, values: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed: Tensor = self._flashinfer.rmsnorm(values, weight, eps)
        return normed

    def add_norm(self, update: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        self._flashinfer.fused_add_rmsnorm(update, residual, weight, eps)
        return update

    def head_norm(self, heads: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed: Tensor = self._flashinfer.rmsnorm(heads, weight, eps)
        return normed

    def rotate(self, queries: Tensor, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        rows = queries.shape[0]
        self._flashinfer.apply_rope_with_cos_sin_cache_inplace(
            positions=positions,
            query=queries.view(rows, -1),
            key=keys.view(rows, -1),
            head_size=self._head_dim,
            cos_sin_cache=self._cos_sin,
        )
        return queries, keys

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        activated: Tensor = self._flashinfer.silu_and_mul(gate_up)
        return activated

    def keep_top(self, probs: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
        kept = torch.ones_like(probs, dtype=torch.bool)
        vocab = probs.shape[1]  # both thresholds are defined between their bounds alone
        if top_k is not None:
            by_count: Tensor = self._flashinfer.top_k_renorm_probs(probs, top_k.clamp(max=vocab - 1))
            kept = (by_count > 0) | (top_k >= vocab)[:, None]
        if top_p is not None:
            by_mass: Tensor = self._flashinfer.top_p_renorm_probs(probs, top_p.clamp(LEAST_MASS, 1.0 - LEAST_MASS))
            kept = kept & ((by_mass > 0) | (top_p >= 1.0)[:, None])
        return kept


class FlashInferAttention:
    """Attention over pages where they lie, for any batch."""

    def __init__(self, config: ModelConfig, page_size: int, dtype: torch.dtype, device: Device) -> None:
        import flashinfer

        self._config, self._page_size, self._dtype, self._device = config, page_size, dtype, device
        self.workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device.torch)
        self._wrappers: dict[int | None, Any] = {
            window: flashinfer.BatchPrefillWithPagedKVCacheWrapper(self.workspace, "NHD", backend=BACKEND)
            for window in set(config.windows)
        }
        self._cascade: Any = None
        self.cascades = 0  # steps so far that read a shared prefix once

    def plan(self, layout: Layout, cache: PagedCache) -> Attend:
        shared = shared_pages(layout) if set(self._config.windows) == {None} else 0
        if shared * self._page_size * (layout.num_pieces - 1) >= CASCADE_TOKENS:
            return self._plan_cascade(layout, shared, cache)
        pages = self._indices(layout.pages)
        for window, wrapper in self._wrappers.items():
            wrapper.plan(
                _host(layout.row_ends),
                _host(layout.page_ends),
                pages,
                _host(layout.last_page_tokens),
                *self._shape(),
                causal=True,
                window_left=-1 if window is None else window - 1,
                q_data_type=self._dtype,
                kv_data_type=self._dtype,
            )
        windows = self._config.windows

        def attend(layer: int, queries: Tensor) -> Tensor:
            out = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
            self._wrappers[windows[layer]].run(queries, (cache.keys(layer), cache.values(layer)), out=out)
            return out.flatten(1)

        return attend

    def _plan_cascade(self, layout: Layout, shared: int, cache: PagedCache) -> Attend:
        """All pieces begin with the same ``shared`` pages: read them once for all rows, then each piece's own."""
        if self._cascade is None:
            import flashinfer

            self._cascade = flashinfer.MultiLevelCascadeAttentionWrapper(2, self.workspace, "NHD")
            for wrapper in self._cascade._batch_prefill_wrappers:
                wrapper._backend = BACKEND  # it has no argument for it, and another one would be compiled
        self.cascades += 1
        ends = layout.page_ends
        own = np.concatenate([layout.pages[ends[i] + shared : ends[i + 1]] for i in range(layout.num_pieces)])
        self._cascade.plan(
            [_host(np.array([0, layout.num_rows])), _host(layout.row_ends)],
            [_host(np.array([0, shared])), _host(ends - shared * np.arange(len(ends)))],
            [self._indices(layout.pages[:shared]), self._indices(own)],
            [_host(np.array([self._page_size])), _host(layout.last_page_tokens)],
            *self._shape(),
            causal=True,
            q_data_type=self._dtype,
            kv_data_type=self._dtype,
        )

        def attend(layer: int, queries: Tensor) -> Tensor:
            out: Tensor = self._cascade.run(queries, (cache.keys(layer), cache.values(layer)))
            return out.flatten(1)

        return attend

    def _shape(self) -> tuple[int, int, int, int]:
        return self._config.num_heads, self._config.num_kv_heads, self._config.head_dim, self._page_size

    def _indices(self, pages: Int32s) -> Tensor:
        """Page numbers on the device; from the host ``plan`` would copy them and wait."""
        staged = self._device.staging(len(pages), dtype=torch.int32)
        staged.numpy()[:] = pages
        return self._device.send(staged)


class GraphAttention:
    """Decode attention of a fixed number of rows, planned outside a CUDA graph and run inside it."""

    def __init__(self, owner: FlashInferAttention, config: ModelConfig, rows: int, indices: Tensor) -> None:
        """``indices`` [most pages of a batch] int32 may be shared by the sizes: one of them is planned at a time."""
        import flashinfer

        self._config, self._owner, self._rows = config, owner, rows
        device = indices.device

        def make() -> Any:
            return flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                owner.workspace,
                "NHD",
                use_cuda_graph=True,
                use_tensor_cores=True,
                paged_kv_indptr_buffer=torch.zeros(rows + 1, dtype=torch.int32, device=device),
                paged_kv_indices_buffer=indices,
                paged_kv_last_page_len_buffer=torch.ones(rows, dtype=torch.int32, device=device),
                backend=BACKEND,
            )

        self._wrappers: dict[int | None, Any] = {window: make() for window in set(config.windows)}

    def plan(self, page_ends: Int32s, pages: Tensor, last_page_tokens: Int32s) -> None:
        """For exactly the fixed number of rows; ``pages`` on the device."""
        owner, config = self._owner, self._config
        for window, wrapper in self._wrappers.items():
            wrapper.plan(
                torch.from_numpy(page_ends),
                pages,
                torch.from_numpy(last_page_tokens),
                config.num_heads,
                config.num_kv_heads,
                config.head_dim,
                owner._page_size,
                window_left=-1 if window is None else window - 1,
                q_data_type=owner._dtype,
                kv_data_type=owner._dtype,
            )

    def attend(self, cache: PagedCache) -> Attend:
        """To be captured."""
        windows = self._config.windows

        def attend(layer: int, queries: Tensor) -> Tensor:
            out: Tensor = self._wrappers[windows[layer]].run(queries, (cache.keys(layer), cache.values(layer)))
            return out.flatten(1)

        return attend


def shared_pages(layout: Layout) -> int:
    """How many leading pages all pieces have in common, leaving each at least one page and all its rows to itself."""
    if layout.num_pieces < 2:
        return 0
    ends = layout.page_ends
    most = min(int(layout.num_pages.min()) - 1, int(layout.starts.min()) // layout.page_size)
    if most < 1:
        return 0
    same = np.ones(most, dtype=bool)
    first = layout.pages[:most]
    for begin in ends[1:-1]:
        same &= layout.pages[begin : begin + most] == first
        if not same[0]:
            return 0
    return most if same.all() else int(np.argmin(same))


def _host(values: np.ndarray[Any, Any]) -> Tensor:
    """As int32 on the host: FlashInfer reads lengths there, and copies them by itself."""
    return torch.from_numpy(values.astype(np.int32))
