"""Decode steps as CUDA graphs: one per padded number of rows, replayed with new inputs in the same buffers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from caesura.runtime.kv.device_arena import PagedCache
from caesura.runtime.model.cuda.decoder import DeviceDecoder
from caesura.runtime.model.cuda.device import Device
from caesura.runtime.model.cuda.flashinfer_kernels import FlashInferAttention, GraphAttention
from caesura.runtime.model.cuda.layout import Layout
from torch import Tensor

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
MOST_PAGES = 1 << 22  # of a batch; longer ones run without a graph
_INPUTS = 4  # token ids, positions, slots, sources


Run = Callable[[], tuple[Tensor, Tensor]]  # computes logits and flags from buffers that stay where they are
Capture = Callable[[Run], tuple[Callable[[], None], tuple[Tensor, Tensor]]]  # -> replay, and the outputs it fills


def cuda_capture() -> Capture:
    """Captures into CUDA graphs of one memory pool: the outputs of one are good until another one is replayed.

    In a stream of the current device: torch's own is of the one on which this process captured first.
    """
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def capture(run: Run) -> tuple[Callable[[], None], tuple[Tensor, Tensor]]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            outputs = run()
        return graph.replay, outputs

    return capture


@dataclass(frozen=True, slots=True)
class Captured:
    """One size's graph with what goes in and comes out."""

    replay: Callable[[], None]
    attention: GraphAttention
    inputs: Tensor  # [_INPUTS, rows] int64
    logits: Tensor  # [rows, vocab] float32
    finite: Tensor  # [rows] bool


class DecodeGraphs:
    """All sizes' graphs."""

    def __init__(
        self,
        decoder: DeviceDecoder,
        attention: FlashInferAttention,
        cache: PagedCache,
        sampled: Tensor,
        device: Device,
        capture: Capture,
        *,
        max_rows: int,
        max_pages_each: int,
    ) -> None:
        """Capture every size up to ``max_rows``. ``sampled`` [rows] int64 holds the tokens of the step before."""
        self._device, self._cache = device, cache
        self.sizes = [size for size in SIZES if size <= max_rows] or [1]
        self.most_pages = min(MOST_PAGES, self.sizes[-1] * max_pages_each + self.sizes[-1])
        self._indices = torch.zeros(self.most_pages, dtype=torch.int32, device=device.torch)
        self.replays = 0
        self._captured: dict[int, Captured] = {}
        for size in reversed(self.sizes):  # the largest first: the others fit into its memory
            self._captured[size] = self._record(decoder, attention, sampled, size, capture)

    def size_for(self, layout: Layout) -> int | None:
        """The smallest graph that holds this batch, None when it has to run without."""
        if not layout.is_decode or layout.num_rows > self.sizes[-1]:
            return None
        size = self.sizes[bisect_left(self.sizes, layout.num_rows)]
        return size if len(layout.pages) + size <= self.most_pages else None

    def prepare(self, layout: Layout, size: int) -> Captured:
        """Send a decode batch's inputs; ``replay`` of what is returned runs it. The first rows are the batch's."""
        captured = self._captured[size]
        rows, padding = layout.num_rows, size - layout.num_rows
        scratch = self._cache.scratch_page
        staged = self._device.staging(_INPUTS, size, dtype=torch.int64)
        inputs = staged.numpy()
        inputs[:, rows:] = [[0], [0], [scratch * self._cache.page_slots], [-1]]
        inputs[:, :rows] = (layout.token_ids, layout.positions, layout.slots(self._cache.page_slots), layout.source)
        captured.inputs.copy_(staged, non_blocking=True)
        pages = self._device.staging(len(layout.pages) + padding, dtype=torch.int32)
        pages.numpy()[: len(layout.pages)] = layout.pages
        pages.numpy()[len(layout.pages) :] = scratch
        ends = np.concatenate((layout.page_ends, layout.page_ends[-1] + 1 + np.arange(padding))).astype(np.int32)
        last = np.concatenate((layout.last_page_tokens, np.ones(padding, np.int64))).astype(np.int32)
        captured.attention.plan(ends, self._device.send(pages), last)
        self.replays += 1
        return captured

    def _record(
        self, decoder: DeviceDecoder, attention: FlashInferAttention, sampled: Tensor, size: int, capture: Capture
    ) -> Captured:
        device, cache = self._device, self._cache
        graph_attention = GraphAttention(attention, decoder.config, size, self._indices)
        inputs = torch.zeros(_INPUTS, size, dtype=torch.int64, device=device.torch)
        inputs[2].fill_(cache.scratch_page * cache.page_slots)
        inputs[3].fill_(-1)
        scratch = torch.full((size,), cache.scratch_page, dtype=torch.int32, device=device.torch)
        graph_attention.plan(np.arange(size + 1, dtype=np.int32), scratch, np.ones(size, np.int32))
        attend = graph_attention.attend(cache)

        def run() -> tuple[Tensor, Tensor]:
            token_ids = filled(inputs[0], inputs[3], sampled)
            hidden = decoder.forward(token_ids, inputs[1], inputs[2], attend, cache)
            finite = torch.isfinite(hidden).all(dim=-1)
            cache.keep_finite(inputs[2], finite)
            return decoder.logits(hidden), finite

        replay, (logits, finite) = capture(run)
        return Captured(replay, graph_attention, inputs, logits, finite)


def filled(token_ids: Tensor, source: Tensor, sampled: Tensor) -> Tensor:
    """``token_ids`` [rows], with those of the step before where ``source`` says which of them."""
    return torch.where(source >= 0, sampled[source.clamp(min=0)], token_ids)
