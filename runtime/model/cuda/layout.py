"""One step's rows laid out on the host: which token, at which position, into which slot, behind which pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from caesura.runtime.errors import BrokenInvariant
from caesura.runtime.executors.base import SliceInput
from caesura.runtime.model.batch import Batch, Piece
from caesura.scheduler.types import TOKEN_TO_COME, ContextId

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Layout:
    """A batch of n pieces (one context's rows each), in slice order. Plain arrays, so that it can be sent to others.

    ``source`` [rows] is -1, or the place of a row's token among those the step before has sampled. ``pages`` are all
    page tables, one after the other; piece i has ``num_pages[i]`` of them, which cover ``starts[i] + counts[i]``
    tokens. ``sampled`` are the rows whose successor is drawn, ``scored`` those whose logits are wanted besides.
    """

    token_ids: Int64s
    positions: Int64s
    source: Int64s
    starts: Int64s
    counts: Int64s
    num_pages: Int64s
    pages: Int32s
    sampled: Int64s
    scored: Int64s
    page_size: int

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    @property
    def num_pieces(self) -> int:
        return len(self.counts)

    @property
    def is_decode(self) -> bool:
        """One row a piece, whose successor is drawn, and nothing else."""
        return self.num_rows == self.num_pieces == len(self.sampled) and not len(self.scored)

    @property
    def page_ends(self) -> Int64s:
        """[n + 1]: where each piece's page table begins in ``pages``, and the end."""
        return np.concatenate((np.zeros(1, np.int64), np.cumsum(self.num_pages)))

    @property
    def row_ends(self) -> Int64s:
        """[n + 1]: where each piece's rows begin, and the end."""
        return np.concatenate((np.zeros(1, np.int64), np.cumsum(self.counts)))

    @property
    def last_page_tokens(self) -> Int64s:
        """Tokens in the last page of each piece, 1 to page size."""
        return (self.starts + self.counts - 1) % self.page_size + 1

    def slots(self, page_slots: int) -> Int64s:
        """Where each row's keys and values go, when page p begins at slot ``p * page_slots``."""
        if self.num_rows == self.num_pieces:
            page = self.pages[self.page_ends[:-1] + self.positions // self.page_size]
        else:
            first = np.repeat(self.page_ends[:-1], self.counts)
            page = self.pages[first + self.positions // self.page_size]
        slots: Int64s = page.astype(np.int64) * page_slots + self.positions % self.page_size
        return slots

    def batch(self, page_scale: int = 1) -> Batch:
        """The same as torch's attention takes it, with pages numbered ``page_scale`` times as high."""
        import torch

        ends, rows = self.page_ends, self.row_ends
        pieces = tuple(
            Piece(
                int(rows[i]),
                int(self.counts[i]),
                int(self.starts[i]),
                self.pages[ends[i] : ends[i + 1]].astype(np.int64) * page_scale,
            )
            for i in range(self.num_pieces)
        )
        ids, positions = torch.from_numpy(self.token_ids), torch.from_numpy(self.positions)
        return Batch(ids, positions, positions, pieces, self.page_size, int(self.positions.max()))

    def encode(self) -> bytes:
        """For another process."""
        arrays = [getattr(self, name).tobytes() for name in _ARRAYS]
        return msgspec.msgpack.encode((self.page_size, arrays))

    @staticmethod
    def decode(data: bytes) -> Layout:
        """What ``encode`` made."""
        page_size, arrays = msgspec.msgpack.decode(data, type=tuple[int, list[bytes]])
        read: dict[str, Any] = {
            name: np.frombuffer(array, np.int32 if name == "pages" else np.int64)
            for name, array in zip(_ARRAYS, arrays, strict=True)
        }
        return Layout(page_size=page_size, **read)


_ARRAYS = ("token_ids", "positions", "source", "starts", "counts", "num_pages", "pages", "sampled", "scored")


class LayoutBuilder:
    """Makes layouts. Keeps each context's page table as an array as long as it stays the same."""

    def __init__(self, page_size: int, num_pages: int, vocab_size: int) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        self.vocab_size = vocab_size
        self._tables: dict[ContextId, tuple[tuple[int, ...], Int32s]] = {}

    def build(self, slices: Sequence[SliceInput], before: Mapping[ContextId, int]) -> Layout:
        """``before``: the place of each context among the tokens sampled by the step before.

        Raises BrokenInvariant for what does not fit: a page table, a page, a token id.
        """
        starts = np.fromiter((piece.start for piece in slices), np.int64, len(slices))
        counts = np.fromiter((len(piece.token_ids) for piece in slices), np.int64, len(slices))
        ids: list[int] = []
        pending: list[tuple[int, int]] = []  # row, and the place of its token
        for piece in slices:
            ids.extend(piece.token_ids)
            if piece.token_ids and piece.token_ids[-1] == TOKEN_TO_COME:
                if piece.context_id not in before:
                    raise BrokenInvariant(f"context {piece.context_id}: its token is to come, but no step samples it")
                pending.append((len(ids) - 1, before[piece.context_id]))
        token_ids = np.array(ids, dtype=np.int64)
        source = np.full(len(ids), -1, dtype=np.int64)
        for row, place in pending:
            source[row], token_ids[row] = place, 0
        tables = [self._table(piece) for piece in slices]
        rows = np.cumsum(counts)
        firsts = np.repeat(rows - counts, counts)
        layout = Layout(
            token_ids=token_ids,
            positions=np.arange(len(ids)) - firsts + np.repeat(starts, counts),
            source=source,
            starts=starts,
            counts=counts,
            num_pages=np.fromiter(map(len, tables), np.int64, len(tables)),
            pages=np.concatenate(tables),
            sampled=rows[[piece.sampler is not None for piece in slices]] - 1,
            scored=_scored(slices, rows - counts),
            page_size=self.page_size,
        )
        self._check(slices, layout)
        if len(self._tables) > 64 + 2 * len(slices):
            here = {piece.context_id for piece in slices}
            self._tables = {context: kept for context, kept in self._tables.items() if context in here}
        return layout

    def _table(self, piece: SliceInput) -> Int32s:
        needed = -(-(piece.start + len(piece.token_ids)) // self.page_size)
        if not piece.token_ids or len(piece.pages) < needed:
            raise BrokenInvariant(
                f"context {piece.context_id}: {len(piece.token_ids)} tokens from {piece.start} need {needed} pages of "
                f"{self.page_size}, the table has {len(piece.pages)}"
            )
        known = self._tables.get(piece.context_id)
        if known is None or known[0] != piece.pages:
            table = np.array(piece.pages, dtype=np.int32)
            if table.min() < 0 or table.max() >= self.num_pages:
                raise BrokenInvariant(
                    f"context {piece.context_id}: a page lies in [{table.min()}, {table.max()}], outside "
                    f"[0, {self.num_pages})"
                )
            known = self._tables[piece.context_id] = (tuple(piece.pages), table)
        return known[1][:needed]

    def _check(self, slices: Sequence[SliceInput], layout: Layout) -> None:
        ids = layout.token_ids
        if ids.min() >= 0 and ids.max() < self.vocab_size:
            return
        wrong = int(np.flatnonzero((ids < 0) | (ids >= self.vocab_size))[0])
        piece = slices[int(np.searchsorted(layout.row_ends, wrong, side="right")) - 1]
        raise BrokenInvariant(
            f"context {piece.context_id}: a token id lies outside [0, {self.vocab_size}): {int(ids[wrong])}"
        )


def _scored(slices: Sequence[SliceInput], first_rows: Int64s) -> Int64s:
    rows: list[int] = []
    for piece, first in zip(slices, first_rows.tolist(), strict=True):
        for row, _ in piece.score_targets:
            if not 0 <= row < len(piece.token_ids):
                raise BrokenInvariant(
                    f"context {piece.context_id}: a score target's row {row} lies outside the slice's "
                    f"{len(piece.token_ids)} rows"
                )
            rows.append(first + row)
    return np.array(rows, dtype=np.int64)
