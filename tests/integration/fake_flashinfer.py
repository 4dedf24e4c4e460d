"""FlashInfer's documented behaviour in plain torch, on the CPU, for the part of its interface that we call.

It computes from what it was given (index pointers, page numbers, lengths of last pages, buffers of a graph), so a
wrong plan gives wrong tokens. Every call is kept, to be bound to the real signatures.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []


def _kept(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def keep(*args: Any, **kwargs: Any) -> Any:
        CALLS.append((name, args, kwargs))
        return call(*args, **kwargs)

    return keep


def _rmsnorm(values: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    assert weight.dim() == 1
    wide = values.float()
    return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)).to(values.dtype) * weight


def _fused_add_rmsnorm(values: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> None:
    residual += values
    values.copy_(_rmsnorm(residual, weight, eps))


def _rope(positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor) -> None:
    assert cos_sin_cache.dtype is torch.float32
    cos, sin = cos_sin_cache[positions][:, None].chunk(2, dim=-1)
    for packed in (query, key):
        heads = packed.view(packed.shape[0], -1, head_size)
        first, second = (half.clone() for half in heads.chunk(2, dim=-1))
        heads.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))


def _silu_and_mul(values: Tensor) -> Tensor:
    gate, up = values.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def _top_k(probs: Tensor, top_k: Tensor) -> Tensor:
    assert probs.dtype is torch.float32 and top_k.dtype is torch.int32
    assert bool(((top_k > 0) & (top_k < probs.shape[1])).all()), "documented for (0, num_classes)"
    kept = [torch.where(row >= row.topk(int(k)).values[-1], row, 0.0) for row, k in zip(probs, top_k, strict=True)]
    return torch.stack([row / row.sum() for row in kept])


def _top_p(probs: Tensor, top_p: Tensor) -> Tensor:
    assert top_p.dtype is torch.float32
    assert bool(((top_p > 0) & (top_p < 1)).all()), "documented for (0, 1)"
    rows = []
    for row, limit in zip(probs, top_p, strict=True):
        ordered, ids = row.sort(descending=True, stable=True)
        passes = ordered.double().cumsum(0) - ordered.double() < float(limit)
        passes[0] = True
        rows.append(torch.zeros_like(row).scatter(0, ids[passes], ordered[passes]))
    return torch.stack([row / row.sum() for row in rows])


class Paged:
    """Attention of requests over pages, from index pointers."""

    def __init__(self, workspace: Tensor, kv_layout: str = "NHD", **options: Any) -> None:
        assert workspace.dtype is torch.uint8 and kv_layout == "NHD"
        self._backend = options.get("backend", "auto")
        self.options = options

    def _set(self, qo: Tensor, kv: Tensor, pages: Tensor, last: Tensor, shape: tuple[int, ...], **how: Any) -> None:
        assert self._backend == "fa2", "another kernel would be compiled"
        for host in (qo, kv, last):
            assert host.dtype is torch.int32 and host.device.type == "cpu"
        assert pages.dtype is torch.int32 and len(pages) == int(kv[-1])
        assert len(qo) == len(kv) == len(last) + 1
        assert int(last.min()) >= 1 and int(last.max()) <= shape[3]
        self.qo, self.kv, self.pages, self.last, self.shape, self.how = qo, kv, pages, last, shape, how

    def run(
        self, queries: Tensor, cache: tuple[Tensor, Tensor], out: Tensor | None = None, return_lse: bool = False
    ) -> Any:
        heads, kv_heads, head_dim, page_size = self.shape
        assert queries.shape[1:] == (heads, head_dim) and cache[0].shape[1:] == (page_size, kv_heads, head_dim)
        assert queries.dtype is self.how["q_data_type"] and cache[0].dtype is self.how["kv_data_type"]
        out = torch.empty(queries.shape, dtype=queries.dtype) if out is None else out
        lse = torch.full(queries.shape[:2], float("-inf"))
        for request in range(len(self.last)):
            rows = slice(int(self.qo[request]), int(self.qo[request + 1]))
            pages = self.pages[int(self.kv[request]) : int(self.kv[request + 1])].long()
            length = (len(pages) - 1) * page_size + int(self.last[request])
            keys, values = (side[pages].flatten(0, 1)[:length].float() for side in cache)
            keys, values = (side.repeat_interleave(heads // kv_heads, dim=1) for side in (keys, values))
            scores = torch.einsum("qhd,khd->hqk", queries[rows].float(), keys) * head_dim**-0.5
            count = rows.stop - rows.start
            where = torch.arange(length - count, length)[:, None] - torch.arange(length)[None, :]
            hidden = torch.zeros(count, length, dtype=torch.bool)
            if self.how.get("causal"):
                hidden |= where < 0
            if self.how.get("window_left", -1) >= 0:
                hidden |= where > self.how["window_left"]
            scores = scores.masked_fill(hidden, float("-inf"))
            lse[rows] = scores.logsumexp(-1).T
            out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(queries.dtype)
        return (out, lse) if return_lse else out


class Prefill(Paged):
    def plan(self, qo: Tensor, kv: Tensor, pages: Tensor, last: Tensor, *shape: int, **how: Any) -> None:
        CALLS.append(("prefill.plan", (qo, kv, pages, last, *shape), how))
        self._set(qo, kv, pages, last, shape, **how)


class Decode(Paged):
    """As in graph mode: what runs reads the buffers, whatever was planned before the capture."""

    def plan(self, kv: Tensor, pages: Tensor, last: Tensor, *shape: int, **how: Any) -> None:
        CALLS.append(("decode.plan", (kv, pages, last, *shape), how))
        options = self.options
        assert options["use_cuda_graph"] and options["use_tensor_cores"]
        ends, lasts = options["paged_kv_indptr_buffer"], options["paged_kv_last_page_len_buffer"]
        assert len(last) == len(lasts) == len(ends) - 1, "the batch size is fixed in graph mode"
        ends.copy_(kv)
        lasts.copy_(last)
        options["paged_kv_indices_buffer"][: len(pages)].copy_(pages)
        self._set(torch.arange(len(kv), dtype=torch.int32), kv, pages, last, shape, **how)
        self.kv, self.pages, self.last = ends, options["paged_kv_indices_buffer"], lasts


class Cascade:
    def __init__(self, num_levels: int, workspace: Tensor, kv_layout: str = "NHD") -> None:
        self._batch_prefill_wrappers = [Prefill(workspace, kv_layout) for _ in range(num_levels)]

    def plan(
        self, qo: list[Tensor], kv: list[Tensor], pages: list[Tensor], last: list[Tensor], *shape: int, **how: Any
    ) -> None:
        CALLS.append(("cascade.plan", (qo, kv, pages, last, *shape), how))
        for level, wrapper in enumerate(self._batch_prefill_wrappers):
            causal = how.get("causal", False) and level == len(self._batch_prefill_wrappers) - 1
            wrapper._set(qo[level], kv[level], pages[level], last[level], shape, **{**how, "causal": causal})

    def run(self, queries: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        CALLS.append(("cascade.run", (queries, cache), {}))
        parts = [wrapper.run(queries, cache, return_lse=True) for wrapper in self._batch_prefill_wrappers]
        weights = torch.stack([lse for _, lse in parts]).softmax(0)
        return sum((out * weight[..., None] for (out, _), weight in zip(parts, weights, strict=True)), 0 * parts[0][0])


def _made(name: str, kind: type) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        CALLS.append((name, args, kwargs))
        return kind(*args, **kwargs)

    return make


def module() -> types.ModuleType:
    """The fake, to be put into ``sys.modules``."""
    made = types.ModuleType("flashinfer")
    functions = {
        "rmsnorm": _rmsnorm,
        "fused_add_rmsnorm": _fused_add_rmsnorm,
        "apply_rope_with_cos_sin_cache_inplace": _rope,
        "silu_and_mul": _silu_and_mul,
        "top_k_renorm_probs": _top_k,
        "top_p_renorm_probs": _top_p,
    }
    for name, function in functions.items():
        setattr(made, name, _kept(name, function))
    made.BatchPrefillWithPagedKVCacheWrapper = _made("prefill", Prefill)  # type: ignore[attr-defined]
    made.BatchDecodeWithPagedKVCacheWrapper = _made("decode", Decode)  # type: ignore[attr-defined]
    made.MultiLevelCascadeAttentionWrapper = _made("cascade", Cascade)  # type: ignore[attr-defined]
    return made
