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

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from caesura.runtime.errors import UnsupportedModel
from caesura.runtime.model.batch import Batch, Piece
from caesura.runtime.model.weights import Model
from torch import Tensor

TILE_ROWS = 32
BLOCK_POSITIONS = 64
_RUN_ELEMENTS = 16_384  # below torch's grain for splitting work, and a multiple of every vector width
_GROUP_KEYS = 1 << 16  # rows times positions at once, which bounds the memory of a step
_SHARING_ROWS = 48  # from here on a context's rows are worth their own calls over shared keys


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows attended at once: of one context, which then share its gathered keys, or each with keys of its own."""

    first_row: int
    shared: bool
    slots: Tensor  # int64: [blocks * BLOCK_POSITIONS] when shared, else [rows * blocks * BLOCK_POSITIONS]
    unseen: Tensor  # [rows, blocks, 1, BLOCK_POSITIONS] bool: positions a row must not see


@dataclass(frozen=True, slots=True)
class ExactPlan:
    """How a batch attends under one window."""

    groups: tuple[RowGroup, ...]

    def to(self, device: torch.device) -> ExactPlan:
        """The same on another device."""
        moved = [replace(group, slots=group.slots.to(device), unseen=group.unseen.to(device)) for group in self.groups]
        return ExactPlan(tuple(moved))


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
    """Slots and masks of every row, in groups of bounded size. How rows are grouped does not change their bits."""
    groups: list[RowGroup] = []
    apart: list[Piece] = []  # neighbouring pieces whose rows are few: one gather for all costs fewer calls
    for piece in batch.pieces:
        if piece.num_rows >= _SHARING_ROWS:
            groups += _own_groups(apart, batch, window)
            apart = []
            groups += _shared_groups(piece, batch, window)
        else:
            apart.append(piece)
    return ExactPlan(tuple(groups + _own_groups(apart, batch, window)))


def _shared_groups(piece: Piece, batch: Batch, window: int | None) -> list[RowGroup]:
    blocks = -(-piece.num_tokens // BLOCK_POSITIONS)
    slots = _slots(piece, batch.page_size, blocks)
    step = max(1, _GROUP_KEYS // len(slots))
    groups = []
    for first in range(0, piece.num_rows, step):
        queries = np.arange(piece.start + first, piece.start + min(first + step, piece.num_rows))
        unseen = _unseen(queries, blocks, window)
        groups.append(RowGroup(piece.first_row + first, True, torch.from_numpy(slots), unseen))
    return groups


def _own_groups(pieces: list[Piece], batch: Batch, window: int | None) -> list[RowGroup]:
    if not pieces:
        return []
    blocks = -(-max(piece.num_tokens for piece in pieces) // BLOCK_POSITIONS)
    tables = np.stack([_slots(piece, batch.page_size, blocks) for piece in pieces])
    owner = np.repeat(np.arange(len(pieces)), [piece.num_rows for piece in pieces])
    queries = np.concatenate([np.arange(piece.start, piece.num_tokens) for piece in pieces])
    step = max(1, _GROUP_KEYS // tables.shape[1])
    groups = []
    for first in range(0, len(queries), step):
        rows = slice(first, first + step)
        slots = torch.from_numpy(tables[owner[rows]].reshape(-1))
        groups.append(RowGroup(pieces[0].first_row + first, False, slots, _unseen(queries[rows], blocks, window)))
    return groups


def _slots(piece: Piece, page_size: int, blocks: int) -> npt.NDArray[np.int64]:
    """The slot of every position up to the last block's end; past the context, a slot of its own that is unseen."""
    where = np.arange(piece.num_tokens)
    slots = np.full(blocks * BLOCK_POSITIONS, piece.pages[0] * page_size, dtype=np.int64)
    slots[: piece.num_tokens] = piece.pages[where // page_size] * page_size + where % page_size
    return slots


def _unseen(queries: npt.NDArray[np.int64], blocks: int, window: int | None) -> Tensor:
    """For query positions [rows]: [rows, blocks, 1, BLOCK_POSITIONS]."""
    keys = np.arange(blocks * BLOCK_POSITIONS)[None, :]
    unseen = keys > queries[:, None]
    if window is not None:
        unseen |= keys <= queries[:, None] - window
    return torch.from_numpy(unseen).view(len(queries), blocks, 1, BLOCK_POSITIONS)


def attend(queries: Tensor, keys: Tensor, values: Tensor, plan: ExactPlan) -> Tensor:
    """Attention of ``queries`` [padded rows, heads, head_dim]; padded rows give zeros: [rows, heads * head_dim]."""
    out = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    for group in plan.groups:
        rows = slice(group.first_row, group.first_row + group.unseen.shape[0])
        out[rows] = _attend_rows(queries[rows], keys, values, group)
    return out.flatten(1)


def _attend_rows(queries: Tensor, keys: Tensor, values: Tensor, group: RowGroup) -> Tensor:
    """Every product multiplies one row's query heads of one KV head with one block, whatever the grouping."""
    rows, heads, head_dim = queries.shape
    kv_heads, blocks = keys.shape[2], group.unseen.shape[1]
    folded = queries.view(rows, kv_heads, 1, heads // kv_heads, head_dim)
    gathered = keys.flatten(0, 1).index_select(0, group.slots)  # [(rows *) blocks * positions, kv_heads, head_dim]
    scores = queries.new_empty(kv_heads, rows, blocks, heads // kv_heads, BLOCK_POSITIONS)
    for head in range(kv_heads):
        side = gathered[:, head].view(-1, BLOCK_POSITIONS, head_dim).transpose(1, 2)
        scores[head] = _products(folded[:, head].expand(-1, blocks, -1, -1), side, group.shared)
    scores.mul_(head_dim**-0.5).masked_fill_(group.unseen, float("-inf"))
    weights = exp_(scores.sub_(scores.amax(dim=(2, 4), keepdim=True)))  # the maximum is finite: a row sees itself
    sums = weights.sum(-1)  # [kv_heads, rows, blocks, group]
    gathered = values.flatten(0, 1).index_select(0, group.slots)
    total = queries.new_zeros(kv_heads, rows, heads // kv_heads, 1)
    out = queries.new_zeros(kv_heads, rows, heads // kv_heads, head_dim)
    for head in range(kv_heads):
        side = gathered[:, head].view(-1, BLOCK_POSITIONS, head_dim)
        parts = _products(weights[head], side, group.shared)  # [rows, blocks, group, head_dim]
        for block in range(blocks):  # first to last, for every row
            total[head] += sums[head, :, block, :, None]
            out[head] += parts[:, block]
    return (out / total).transpose(0, 1).reshape(rows, heads, head_dim)


def _products(left: Tensor, right: Tensor, shared: bool) -> Tensor:
    """``left`` [rows, blocks, group, inner] times each block's matrix: [rows, blocks, group, outer].

    ``right`` is [blocks, inner, outer] when shared by all rows, else [rows * blocks, inner, outer]. Both ways multiply
    matrices of one shape; sharing only saves copying ``right`` for every row.
    """
    rows, blocks, group, inner = left.shape
    if not shared:
        return torch.bmm(left.reshape(-1, group, inner), right).view(rows, blocks, group, -1)
    out = left.new_empty(rows, blocks, group, right.shape[2])
    for block in range(blocks):
        out[:, block] = torch.bmm(left[:, block], right[block].expand(rows, -1, -1))
    return out


def verify(model: Model) -> None:
    """Check that this machine's math library gives a row the same bits wherever it stands in a tile.

    Raises UnsupportedModel when it does not: then no deterministic mode can be offered here.
    """
    generator = torch.Generator().manual_seed(0)
    layer = model.layers[0]
    for weight in (layer.qkv, layer.out, layer.gate_up, layer.down, model.head):
        rows = torch.empty(TILE_ROWS, weight.shape[1]).normal_(generator=generator).to(weight)
        reference = F.linear(rows, weight)
        for shift in (1, 7, 16):
            moved = F.linear(rows.roll(shift, 0), weight).roll(-shift, 0)
            _require_equal(moved, reference, f"a product with a weight of shape {list(weight.shape)}")
    config = model.config
    group, head_dim = config.num_heads // config.num_kv_heads, config.head_dim
    queries = torch.empty(48, group, head_dim).normal_(generator=generator).to(model.head)
    keys = torch.empty(48, BLOCK_POSITIONS, head_dim).normal_(generator=generator).to(model.head)
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
