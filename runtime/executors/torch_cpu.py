"""The executor on a CPU: torch computes the slices, a background thread moves the pages."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from caesura.runtime.errors import BrokenInvariant, UnsupportedModel
from caesura.runtime.executors.base import ExecOutput, SampledToken, SliceInput, SliceOutput
from caesura.runtime.kv.arena import KvArena
from caesura.runtime.model.batch import Batch, build_batch
from caesura.runtime.model.sampler import SampleFailure, sample
from caesura.runtime.model.transformer import Decoder
from caesura.runtime.model.weights import Model
from caesura.runtime.native.decoder import NativeDecoder, unsupported
from caesura.scheduler.types import Move, MoveId
from torch import Tensor

_Tops = tuple[tuple[tuple[int, float], ...], ...]
_SCORE_ROWS = 128  # logits held at once while scoring long prompts
_NOT_FINITE = "the model produced hidden states that are not finite numbers"


class TorchExecutor:
    """Implements :class:`caesura.runtime.executors.base.Executor` on torch for CPUs."""

    def __init__(
        self,
        model: Model,
        *,
        page_size: int,
        num_device_pages: int,
        num_host_pages: int,
        eos_ids: Iterable[int],
        deterministic: bool = False,
        num_threads: int | None = None,
        vocab_limit: int | None = None,
        native: bool = True,
        quantization: str | None = None,
        kv_disk: Path | None = None,
        num_disk_pages: int = 0,
    ) -> None:
        """Allocate the arenas.

        ``native`` uses the C decoder where it can be had (``native_refused`` says why not). ``quantization`` "int8"
        gives it 8-bit weights; without it that is refused, never ignored.

        ``eos_ids`` are banned until a generation's ``min_new_tokens``. ``deterministic`` makes every row's bits
        independent of batch, chunking and page size (slower in torch, always so in C). ``vocab_limit``: ids from here
        on are never sampled; give the tokenizer's size when the model's vocabulary is padded beyond it.
        ``kv_disk`` is the folder of the file that holds ``num_disk_pages`` below the host pages.
        Raises NotEnoughMemory when the pools do not fit, UnsupportedModel for a quantization that cannot be had.
        """
        self.native_refused = unsupported(model, page_size) if native else "the option `native` is off"
        if quantization and self.native_refused is not None:
            raise UnsupportedModel(f"quantization {quantization} needs the C decoder: {self.native_refused}")
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        config = model.config
        self.arena = KvArena(
            num_layers=config.num_layers,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            page_size=page_size,
            num_device_pages=num_device_pages,
            num_host_pages=num_host_pages,
            dtype=model.dtype,
            disk_folder=kv_disk,
            num_disk_pages=num_disk_pages,
        )
        self.page_size = page_size
        self.page_bytes = self.arena.page_bytes
        self.num_device_pages = num_device_pages
        self.num_host_pages = num_host_pages
        self.num_disk_pages = self.arena.num_disk_pages
        self.max_context_tokens = config.max_context_tokens
        self._decoder: Decoder | NativeDecoder
        if self.native_refused is None:
            self._decoder = NativeDecoder(model, num_threads=num_threads, quantization=quantization)
        else:
            self._decoder = Decoder(model, deterministic=deterministic)
        self._eos_ids = frozenset(eos_ids)
        self._vocab_limit = min(vocab_limit or config.vocab_size, config.vocab_size)
        self._known_threads = threading.local()

    def begin(self, moves: Sequence[Move]) -> None:
        """See the protocol."""
        self.arena.begin(moves)

    def acknowledged(self, *, wait_s: float = 0.0) -> list[MoveId]:
        """See the protocol."""
        return self.arena.acknowledged(wait_s=wait_s)

    def take_failed(self) -> frozenset[MoveId]:
        """See the protocol."""
        return self.arena.take_failed()

    def close(self) -> None:
        """See the protocol."""
        self.arena.close()

    @torch.inference_mode()
    def execute(self, slices: Sequence[SliceInput], copies: Sequence[Move]) -> ExecOutput:
        """See the protocol. Raises BrokenInvariant for page tables or token ids out of range."""
        started = time.perf_counter()
        if self.native_refused is None and not hasattr(self._known_threads, "here"):
            self._known_threads.here = True
            if threading.current_thread() is not threading.main_thread():  # which is the program's, not the engine's
                keep_operators_here()
        self.arena.copy_within(copies)
        outputs: tuple[SliceOutput, ...] = ()
        if slices:
            vocab_size = self._decoder.config.vocab_size
            batch = build_batch(slices, self.page_size, self.num_device_pages, vocab_size)
            hidden = self._decoder.forward(batch, self.arena.layers)
            broken = self._broken_slices(batch, hidden)
            scores, tops = self._score(slices, batch, hidden)
            sampled = self._sample(slices, batch, hidden)
            outputs = tuple(
                _output(piece, sampled.get(index), scores[index], tops[index], index in broken)
                for index, piece in enumerate(slices)
            )
        return ExecOutput(time.perf_counter() - started, outputs)

    def _sample(
        self, slices: Sequence[SliceInput], batch: Batch, hidden: Tensor
    ) -> dict[int, SampledToken | SampleFailure]:
        """Outcomes by slice index, for the slices that sample."""
        chosen = [(index, piece.sampler) for index, piece in enumerate(slices) if piece.sampler is not None]
        if not chosen:
            return {}
        rows = [batch.pieces[index].first_row + batch.pieces[index].num_rows - 1 for index, _ in chosen]
        logits = self._decoder.logits(_picked(hidden, rows))[:, : self._vocab_limit]
        outcomes = sample(logits, [sampler for _, sampler in chosen], self._eos_ids)
        return {index: outcome for (index, _), outcome in zip(chosen, outcomes, strict=True)}

    def _score(
        self, slices: Sequence[SliceInput], batch: Batch, hidden: Tensor
    ) -> tuple[list[tuple[float, ...]], list[_Tops]]:
        """Logprobs (temperature 1) of the slices' ``score_targets``, in their order, and the likeliest instead."""
        rows: list[int] = []
        tokens: list[int] = []
        for index, piece in enumerate(slices):
            placed = batch.pieces[index]
            for row, token in piece.score_targets:
                if not (0 <= row < placed.num_rows and 0 <= token < self._decoder.config.vocab_size):
                    raise BrokenInvariant(
                        f"context {piece.context_id}: score target ({row}, {token}) lies outside the slice's "
                        f"{placed.num_rows} rows or the vocabulary"
                    )
                rows.append(placed.first_row + row)
                tokens.append(token)
        values: list[float] = []
        likeliest: list[tuple[tuple[int, float], ...]] = []
        count_top = max((piece.score_top for piece in slices), default=0)
        for first in range(0, len(rows), _SCORE_ROWS):
            part = slice(first, first + _SCORE_ROWS)
            logits = self._decoder.logits(_picked(hidden, rows[part]))  # [n, vocab]
            picked = logits.gather(1, torch.tensor(tokens[part])[:, None])[:, 0]
            norm = logits.logsumexp(dim=-1)
            values += (picked - norm).tolist()
            if count_top:
                top = (logits[:, : self._vocab_limit] - norm[:, None]).topk(min(count_top, self._vocab_limit), dim=-1)
                pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
                likeliest += [tuple(zip(ids, logprobs, strict=True)) for ids, logprobs in pairs]
        scores: list[tuple[float, ...]] = []
        tops: list[_Tops] = []
        first = 0
        for piece in slices:
            last = first + len(piece.score_targets)
            scores.append(tuple(values[first:last]))
            tops.append(tuple(row[: piece.score_top] for row in likeliest[first:last]) if piece.score_top else ())
            first = last
        return scores, tops

    def _broken_slices(self, batch: Batch, hidden: Tensor) -> frozenset[int]:
        """Slices with NaN or infinity; their keys and values are zeroed, lest a page's next owner inherits them."""
        if _all_finite(hidden):
            return frozenset()
        broken: set[int] = set()
        for index, piece in enumerate(batch.pieces):
            rows = slice(piece.first_row, piece.first_row + piece.num_rows)
            if not bool(torch.isfinite(hidden[rows]).all()):
                broken.add(index)
                self._decoder.erase(self.arena.layers, batch.slots[rows])
        return frozenset(broken)


def keep_operators_here() -> None:
    """torch's operators of the calling thread run on it alone from now on.

    The C decoder has threads of its own, and torch's would spin for milliseconds after each operator that is large
    enough to be shared out, on the decoder's cores: a step of 16 contexts took twice its time.
    """
    others = torch.get_num_threads()
    torch.set_num_threads(1)
    # That was also noted for threads to come; a call from one that ends at once takes this back, and only this.
    restorer = threading.Thread(target=torch.set_num_threads, args=(others,))
    restorer.start()
    restorer.join()


def _picked(hidden: Tensor, rows: list[int]) -> Tensor:
    """Rows of ``hidden`` [all, hidden]: [rows, hidden]."""
    if hidden.dtype == torch.float32:  # see sampler._greedy for why not torch
        return torch.from_numpy(hidden.numpy()[rows])
    return hidden[rows]


def _all_finite(hidden: Tensor) -> bool:
    if hidden.dtype == torch.float32:  # see sampler._greedy for why not torch
        return bool(np.isfinite(hidden.numpy()).all())
    return bool(torch.isfinite(hidden).all())


def _output(
    piece: SliceInput,
    outcome: SampledToken | SampleFailure | None,
    scores: tuple[float, ...],
    tops: _Tops,
    broken: bool,
) -> SliceOutput:
    if broken:
        return SliceOutput(piece.context_id, None, failure=_NOT_FINITE)
    if isinstance(outcome, SampleFailure):
        return SliceOutput(piece.context_id, None, scores, outcome.reason, tops)
    return SliceOutput(piece.context_id, outcome, scores, score_tops=tops)
