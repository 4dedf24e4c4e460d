"""One step's rows as index tensors: which token, at which position, into which slot of the arena."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from caesura.runtime.errors import BrokenInvariant
from caesura.runtime.executors.base import SliceInput
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """One slice's place in the batch: rows ``[first_row, first_row + num_rows)`` compute positions from ``start``."""

    first_row: int
    num_rows: int
    start: int
    pages: npt.NDArray[np.int64]  # exactly the pages that cover [0, start + num_rows)

    @property
    def num_tokens(self) -> int:
        """Context length after this step."""
        return self.start + self.num_rows


@dataclass(frozen=True, slots=True)
class Batch:
    """Flat rows of prefill chunks and decodes together, in slice order."""

    token_ids: Tensor  # [rows] int64
    positions: Tensor  # [rows] int64
    slots: Tensor  # [rows] int64: page * page_size + offset, where the row's keys and values go
    pieces: tuple[Piece, ...]
    page_size: int
    max_position: int

    @property
    def num_rows(self) -> int:
        return self.token_ids.shape[0]


def build_batch(slices: Sequence[SliceInput], page_size: int, num_pages: int, vocab_size: int) -> Batch:
    """Lay the slices out as rows. Raises BrokenInvariant when a page table or a token id does not fit."""
    pieces: list[Piece] = []
    ids: list[npt.NDArray[np.int64]] = []
    positions: list[npt.NDArray[np.int64]] = []
    slots: list[npt.NDArray[np.int64]] = []
    row = 0
    for piece in slices:
        count = len(piece.token_ids)
        needed = -(-(piece.start + count) // page_size)
        if count == 0 or len(piece.pages) < needed:
            raise BrokenInvariant(
                f"context {piece.context_id}: {count} tokens from {piece.start} need {needed} pages of {page_size}, "
                f"the table has {len(piece.pages)}"
            )
        pages = np.asarray(piece.pages[:needed], dtype=np.int64)
        where = np.arange(piece.start, piece.start + count, dtype=np.int64)
        pieces.append(Piece(row, count, piece.start, pages))
        ids.append(np.asarray(piece.token_ids, dtype=np.int64))
        positions.append(where)
        slots.append(pages[where // page_size] * page_size + where % page_size)
        _check_range(piece, ids[-1], vocab_size, "token id")
        _check_range(piece, pages, num_pages, "page")
        row += count
    all_positions = np.concatenate(positions)
    return Batch(
        token_ids=torch.from_numpy(np.concatenate(ids)),
        positions=torch.from_numpy(all_positions),
        slots=torch.from_numpy(np.concatenate(slots)),
        pieces=tuple(pieces),
        page_size=page_size,
        max_position=int(all_positions.max()),
    )


def _check_range(piece: SliceInput, values: npt.NDArray[np.int64], limit: int, what: str) -> None:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= limit:
        raise BrokenInvariant(f"context {piece.context_id}: a {what} lies in [{low}, {high}], outside [0, {limit})")
