"""What the C decoder is told of a batch: its pieces, and the items of attention work they are cut into."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from caesura.runtime.model.batch import Batch, Piece

SEGMENT = 256  # positions; as in attention.h
MAX_QUERIES = 48  # as in attention.h

Ints = npt.NDArray[np.int64]
Ints32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Arrays in the layout of attention.h; ``tables`` backs the pointers in ``pieces``."""

    pieces: Ints  # [pieces, 4]: first row, rows, start, address of the page table
    items: Ints32  # [items, 4]: segment (-1: a chunk), rows, piece, offset
    members: Ints32
    decodes: Ints32
    offsets: Ints  # [pieces]: a decode's first partial
    num_partials: int
    tables: Ints32


def plan_attention(batch: Batch, query_group: int) -> AttentionPlan:
    """Cut the batch's attention into items. ``query_group``: query heads that share a KV head."""
    rows_each = MAX_QUERIES // query_group
    tables = np.concatenate([piece.pages for piece in batch.pieces]).astype(np.int32)
    starts = np.cumsum([0] + [len(piece.pages) for piece in batch.pieces[:-1]])
    pieces = np.array([(piece.first_row, piece.num_rows, piece.start, 0) for piece in batch.pieces], dtype=np.int64)
    pieces[:, 3] = tables.ctypes.data + starts * tables.itemsize
    decodes = [index for index, piece in enumerate(batch.pieces) if piece.num_rows == 1]
    segments = np.array([-(-piece.num_tokens // SEGMENT) if piece.num_rows == 1 else 0 for piece in batch.pieces])
    offsets = np.cumsum(segments, dtype=np.int64) - segments
    items = sorted(_chunk_items(batch.pieces, rows_each), key=lambda item: -item[3])  # the longest first
    members: list[int] = []
    for segment, sharers in _shared_segments(batch, decodes):
        for first in range(0, len(sharers), rows_each):
            part = sharers[first : first + rows_each]
            items.append((segment, len(part), 0, len(members)))
            members += part
    return AttentionPlan(
        pieces,
        np.array(items, dtype=np.int32).reshape(-1, 4),
        np.array(members, dtype=np.int32),
        np.array(decodes, dtype=np.int32),
        offsets,
        int(segments.sum()),
        tables,
    )


def _chunk_items(pieces: tuple[Piece, ...], rows_each: int) -> Iterator[tuple[int, int, int, int]]:
    for index, piece in enumerate(pieces):
        if piece.num_rows > 1:
            for first in range(0, piece.num_rows, rows_each):
                yield -1, min(rows_each, piece.num_rows - first), index, first


def _shared_segments(batch: Batch, decodes: list[int]) -> list[tuple[int, list[int]]]:
    """Each segment of the decodes with all whose pages there are the same, so that it is read once for them."""
    found: dict[tuple[int, bytes | int], list[int]] = {}
    for index in decodes:
        piece = batch.pieces[index]
        for segment in range(-(-piece.num_tokens // SEGMENT)):
            first, last = segment * SEGMENT, (segment + 1) * SEGMENT
            key: bytes | int = index  # an unfinished segment is its context's own
            if last <= piece.num_tokens and len(decodes) > 1:
                key = piece.pages[first // batch.page_size : -(-last // batch.page_size)].tobytes()
            found.setdefault((segment, key), []).append(index)
    return [(segment, sharers) for (segment, _), sharers in found.items()]
