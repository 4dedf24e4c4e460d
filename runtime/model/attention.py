"""Paged attention for mixed batches.

Rows that compute one token (decodes) are attended together: their pages are gathered into one padded tensor, the
query heads of a KV group are folded into the query length (faster than repeating keys), and a mask hides padding.
Longer pieces (prefill chunks) are attended one context at a time with a causal mask offset by what is cached.
Index tensors and masks are made once per step and window and used by every layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from caesura.runtime.model.batch import Batch, Piece
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decode rows of similar context length, padded to the longest."""

    rows: Tensor  # [n] int64, rows of the batch
    pages: Tensor  # [n * pages_each] int64
    mask: Tensor | None  # [n, 1, 1, pages_each * page_size], 0 or -inf; None when nothing is padded


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of several rows of one context."""

    first_row: int
    num_rows: int
    pages: Tensor  # [pages] int64
    num_keys: int  # keys seen: the gathered positions up to the piece's end
    mask: Tensor | None  # [num_rows, num_keys], 0 or -inf; None: plain causal from position 0


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How a batch attends under one window."""

    groups: tuple[DecodeGroup, ...]
    chunks: tuple[Chunk, ...]


class Workspace:
    """Two buffers for gathered keys and values, kept between calls: fresh pages cost more than the copy itself."""

    def __init__(self, dtype: torch.dtype, device: torch.device | None = None) -> None:
        self._buffers = [torch.empty(0, dtype=dtype, device=device) for _ in range(2)]

    def gather(self, which: int, cache: Tensor, pages: Tensor) -> Tensor:
        """Rows ``pages`` of ``cache`` [num_pages, page_size, kv_heads, head_dim], in buffer ``which`` (0 or 1)."""
        flat = cache.flatten(1)  # [num_pages, page_size * kv_heads * head_dim]
        count = pages.shape[0] * flat.shape[1]
        if self._buffers[which].numel() < count:
            self._buffers[which] = cache.new_empty(count + count // 4)
        target = self._buffers[which][:count].view(pages.shape[0], flat.shape[1])
        torch.index_select(flat, 0, pages, out=target)
        return target.view(-1, *cache.shape[1:])


def plan_attention(batch: Batch, window: int | None, dtype: torch.dtype) -> AttentionPlan:
    """Sort the batch's pieces into decode groups and chunks for layers with this ``window``."""
    single = [piece for piece in batch.pieces if piece.num_rows == 1]
    groups = [_group(bucket, batch.page_size, window, dtype) for bucket in _buckets(single, batch.page_size, window)]
    chunks = [_chunk(piece, batch.page_size, window, dtype) for piece in batch.pieces if piece.num_rows > 1]
    return AttentionPlan(tuple(groups), tuple(chunks))


def attend(queries: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan, workspace: Workspace) -> Tensor:
    """Attention of ``queries`` [rows, heads, head_dim] over the paged cache: [rows, heads * head_dim].

    ``keys`` and ``values`` are one layer's cache [num_pages, page_size, kv_heads, head_dim] and already hold this
    step's rows.
    """
    out = torch.empty_like(queries)
    for group in plan.groups:
        out[group.rows] = _attend_group(queries[group.rows], keys, values, group, workspace)
    for chunk in plan.chunks:
        rows = slice(chunk.first_row, chunk.first_row + chunk.num_rows)
        out[rows] = _attend_chunk(queries[rows], keys, values, chunk, workspace)
    return out.flatten(1)


def _attend_group(queries: Tensor, keys: Tensor, values: Tensor, group: DecodeGroup, space: Workspace) -> Tensor:
    count, heads, head_dim = queries.shape
    kv_heads = keys.shape[2]
    # [n, keys, kv_heads, head_dim] -> [n, kv_heads, keys, head_dim]
    k = space.gather(0, keys, group.pages).view(count, -1, kv_heads, head_dim).transpose(1, 2)
    v = space.gather(1, values, group.pages).view(count, -1, kv_heads, head_dim).transpose(1, 2)
    # query heads of one KV head become query rows: [n, kv_heads, heads / kv_heads, head_dim]
    folded = queries.view(count, kv_heads, heads // kv_heads, head_dim)
    return F.scaled_dot_product_attention(folded, k, v, attn_mask=group.mask).reshape(count, heads, head_dim)


def _attend_chunk(queries: Tensor, keys: Tensor, values: Tensor, chunk: Chunk, space: Workspace) -> Tensor:
    kv_heads, head_dim = keys.shape[2:]
    # [pages, page_size, kv_heads, head_dim] -> [1, kv_heads, keys, head_dim]
    k = space.gather(0, keys, chunk.pages).view(-1, kv_heads, head_dim)[: chunk.num_keys].transpose(0, 1)[None]
    v = space.gather(1, values, chunk.pages).view(-1, kv_heads, head_dim)[: chunk.num_keys].transpose(0, 1)[None]
    out = F.scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        k,
        v,
        attn_mask=chunk.mask,
        is_causal=chunk.mask is None,
        enable_gqa=queries.shape[1] != kv_heads,
    )
    return out[0].transpose(0, 1)  # [rows, heads, head_dim]


def _first_page(start: int, page_size: int, window: int | None) -> int:
    """The first page that a token at ``start`` still sees."""
    return 0 if window is None else max(0, start - window + 1) // page_size


def _buckets(single: list[Piece], page_size: int, window: int | None) -> list[list[Piece]]:
    """Decodes by falling number of visible pages; a bucket ends where padding would double the work."""
    buckets: list[list[Piece]] = []
    longest = 0

    def visible(piece: Piece) -> int:
        return len(piece.pages) - _first_page(piece.start, page_size, window)

    for piece in sorted(single, key=visible, reverse=True):
        if not buckets or visible(piece) * 2 < longest:
            buckets.append([])
            longest = visible(piece)
        buckets[-1].append(piece)
    return buckets


def _group(bucket: list[Piece], page_size: int, window: int | None, dtype: torch.dtype) -> DecodeGroup:
    first = np.array([_first_page(piece.start, page_size, window) for piece in bucket], dtype=np.int64)
    last = np.array([len(piece.pages) for piece in bucket], dtype=np.int64)
    width = int((last - first).max())
    pages = np.empty((len(bucket), width), dtype=np.int64)
    for index, piece in enumerate(bucket):
        table = piece.pages[first[index] :]
        pages[index, : len(table)] = table
        pages[index, len(table) :] = table[-1]  # padding reads the context's own page, never another's
    positions = (first * page_size)[:, None] + np.arange(width * page_size)
    end = np.array([piece.num_tokens for piece in bucket])[:, None]
    visible = positions < end
    if window is not None:
        visible &= positions >= end - window
    mask = None if visible.all() else _additive(visible, dtype)[:, None, None, :]
    rows = torch.tensor([piece.first_row for piece in bucket])
    return DecodeGroup(rows, torch.from_numpy(pages.reshape(-1)), mask)


def _chunk(piece: Piece, page_size: int, window: int | None, dtype: torch.dtype) -> Chunk:
    first = _first_page(piece.start, page_size, window)
    offset = first * page_size
    num_keys = piece.num_tokens - offset
    pages = torch.from_numpy(piece.pages[first:].copy())
    if piece.start == 0 and (window is None or piece.num_rows <= window):
        return Chunk(piece.first_row, piece.num_rows, pages, num_keys, None)
    key = np.arange(offset, piece.num_tokens)[None, :]
    query = np.arange(piece.start, piece.num_tokens)[:, None]
    visible = key <= query
    if window is not None:
        visible &= key > query - window
    return Chunk(piece.first_row, piece.num_rows, pages, num_keys, _additive(visible, dtype))


def _additive(visible: npt.NDArray[np.bool_], dtype: torch.dtype) -> Tensor:
    """0 where visible, -inf elsewhere."""
    mask = torch.zeros(visible.shape, dtype=dtype)
    return mask.masked_fill_(torch.from_numpy(~visible), float("-inf"))
