"""Deterministic (batch-invariant) arithmetic: a row's bits depend on its own context alone.

Three things make a row's floating-point result depend on its neighbours, and each is removed here:

* a matrix product picks its kernel by the number of rows: every product runs on tiles of exactly 32 rows;
* a vectorised exponential uses another routine for the last few elements, and the threads' shares decide where
  "last" is: ``exp`` runs in place over aligned runs, below the size at which work is split;
* attention sums in an order that depends on lengths and chunking: keys are cut into blocks of 64 positions counted
  from the context's start, each block's sum has a fixed shape, and blocks are added first to last. The maximum
  needs no order. A block that is masked for a row adds exact zeros, so other rows may need it freely.

``verify`` checks on the real weights that the math library does treat the rows of a tile alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from caesura.runtime.errors import UnsupportedModel
from caesura.runtime.model.batch import Batch
from caesura.runtime.model.weights import Model
from torch import Tensor

TILE_ROWS = 32
BLOCK_POSITIONS = 64
_RUN_ELEMENTS = 16_384  # below torch's grain for splitting work, and a multiple of every vector width
_GROUP_KEYS = 1 << 16  # rows times positions gathered at once, which bounds the memory of a step


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows attended at once."""

    first_row: int
    slots: Tensor  # [rows * blocks * BLOCK_POSITIONS] int64
    hidden: Tensor  # [rows, 1, 1, blocks, BLOCK_POSITIONS] bool: positions a row must not see


@dataclass(frozen=True, slots=True)
class ExactPlan:
    """How a batch attends under one window."""

    groups: tuple[RowGroup, ...]


def pad_rows(rows: Tensor) -> Tensor:
    """Append zero rows up to a multiple of TILE_ROWS."""
    missing = -rows.shape[0] % TILE_ROWS
    return rows if not missing else torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:])))


def tiles(rows: Tensor) -> list[Tensor]:
    """Views of TILE_ROWS rows each; ``rows`` was padded."""
    return [rows[start : start + TILE_ROWS] for start in range(0, rows.shape[0], TILE_ROWS)]


def exp_(values: Tensor) -> Tensor:
    """exp in place. ``values`` is contiguous and its size a multiple of 32."""
    flat = values.view(-1)
    for start in range(0, flat.shape[0], _RUN_ELEMENTS):
        flat[start : start + _RUN_ELEMENTS].exp_()
    return values


def silu(gate: Tensor) -> Tensor:
    """x / (1 + exp(-x)) of a tile."""
    return gate / (exp_((-gate).contiguous()) + 1.0)


def plan_attention(batch: Batch, window: int | None) -> ExactPlan:
    """Slots and masks of every row, in groups of bounded size."""
    groups: list[RowGroup] = []
    size = batch.page_size
    longest = max(piece.num_tokens for piece in batch.pieces)
    blocks = -(-longest // BLOCK_POSITIONS)
    tables = np.zeros((len(batch.pieces), blocks * BLOCK_POSITIONS), dtype=np.int64)
    owner = np.empty(batch.num_rows, dtype=np.int64)
    for index, piece in enumerate(batch.pieces):
        where = np.arange(piece.num_tokens)
        tables[index] = piece.pages[0] * size  # a slot of the context's own, hidden below
        tables[index, : piece.num_tokens] = piece.pages[where // size] * size + where % size
        owner[piece.first_row : piece.first_row + piece.num_rows] = index
    positions = batch.positions.numpy()[: batch.num_rows]
    step = max(1, _GROUP_KEYS // tables.shape[1])
    for first in range(0, batch.num_rows, step):
        rows = slice(first, min(first + step, batch.num_rows))
        key, query = np.arange(tables.shape[1])[None, :], positions[rows][:, None]
        unseen = key > query
        if window is not None:
            unseen |= key <= query - window
        shape = (-1, 1, 1, blocks, BLOCK_POSITIONS)
        groups.append(
            RowGroup(first, torch.from_numpy(tables[owner[rows]].reshape(-1)), torch.from_numpy(unseen).view(shape))
        )
    return ExactPlan(tuple(groups))


def attend(queries: Tensor, keys: Tensor, values: Tensor, plan: ExactPlan) -> Tensor:
    """Attention of ``queries`` [padded rows, heads, head_dim]; padded rows give zeros: [rows, heads * head_dim]."""
    out = torch.zeros(queries.shape, dtype=queries.dtype)
    for group in plan.groups:
        rows = slice(group.first_row, group.first_row + group.hidden.shape[0])
        out[rows] = _attend_rows(queries[rows], keys, values, group)
    return out.flatten(1)


def _attend_rows(queries: Tensor, keys: Tensor, values: Tensor, group: RowGroup) -> Tensor:
    rows, heads, head_dim = queries.shape
    kv_heads, blocks = keys.shape[2], group.hidden.shape[3]
    # [rows, kv_heads, heads per kv head, blocks, BLOCK_POSITIONS], every score one product and one sum over head_dim
    q = queries.view(rows, kv_heads, -1, 1, head_dim).transpose(2, 3)  # [rows, kv_heads, 1, group, head_dim]
    k = _blocks(keys, group.slots, rows, blocks)
    scores = torch.matmul(q, k.transpose(-1, -2)).transpose(2, 3) * head_dim**-0.5
    scores = scores.masked_fill(group.hidden, float("-inf")).contiguous()
    peak = scores.amax(dim=(-1, -2), keepdim=True)  # finite: a row sees itself
    weights = exp_(scores.sub_(peak))
    sums = weights.sum(-1)  # [rows, kv_heads, group, blocks]
    v = _blocks(values, group.slots, rows, blocks)
    parts = torch.matmul(weights.transpose(2, 3), v)  # [rows, kv_heads, blocks, group, head_dim]
    total, out = torch.zeros_like(sums[..., 0]), torch.zeros_like(parts[:, :, 0])
    for block in range(blocks):
        total += sums[..., block]
        out += parts[:, :, block]
    return (out / total[..., None]).reshape(rows, heads, head_dim)


def _blocks(cache: Tensor, slots: Tensor, rows: int, blocks: int) -> Tensor:
    """Gathered keys or values: [rows, kv_heads, blocks, BLOCK_POSITIONS, head_dim]."""
    flat = cache.flatten(0, 1).flatten(1).index_select(0, slots)
    return flat.view(rows, blocks, BLOCK_POSITIONS, *cache.shape[2:]).permute(0, 3, 1, 2, 4).contiguous()


def verify(model: Model) -> None:
    """Check that this machine's math library gives a row the same bits wherever it stands in a tile.

    Raises UnsupportedModel when it does not: then no deterministic mode can be offered here.
    """
    generator = torch.Generator().manual_seed(0)
    layer = model.layers[0]
    for weight in (layer.qkv, layer.out, layer.gate_up, layer.down, model.head):
        rows = torch.empty(TILE_ROWS, weight.shape[1]).normal_(generator=generator).to(weight.dtype)
        reference = F.linear(rows, weight)
        for shift in (1, 7, 16):
            moved = F.linear(rows.roll(shift, 0), weight).roll(-shift, 0)
            _require_equal(moved, reference, f"a product with a weight of shape {list(weight.shape)}")
    config = model.config
    group, head_dim = config.num_heads // config.num_kv_heads, config.head_dim
    queries = torch.empty(48, group, head_dim).normal_(generator=generator).to(model.dtype)
    keys = torch.empty(48, BLOCK_POSITIONS, head_dim).normal_(generator=generator).to(model.dtype)
    scores, mixed = _both_products(queries, keys)
    for first, last in ((0, 1), (3, 5), (17, 48)):
        part_scores, part_mixed = _both_products(queries[first:last], keys[first:last])
        _require_equal(part_scores, scores[first:last], "a batch of attention scores")
        _require_equal(part_mixed, mixed[first:last], "a batch of attention sums")


def _both_products(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(queries, keys.transpose(-1, -2))
    return scores, torch.matmul(scores, keys)


def _require_equal(found: Tensor, expected: Tensor, what: str) -> None:
    if not torch.equal(found, expected):
        raise UnsupportedModel(
            f"deterministic mode is not available: {what} depends on the batch with this machine's math library"
        )
