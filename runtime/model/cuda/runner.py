"""One process's share of every step: pages copied, rows computed, logits of the rows that want them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from caesura.runtime.kv.device_arena import DeviceArena, PagedCache
from caesura.runtime.model import exact
from caesura.runtime.model.cuda.attention import Attention, ExactAttention, TorchAttention
from caesura.runtime.model.cuda.decoder import DeviceDecoder
from caesura.runtime.model.cuda.device import PASSED, Device
from caesura.runtime.model.cuda.flashinfer_kernels import FlashInferAttention, FlashInferKernels, refused
from caesura.runtime.model.cuda.graphs import DecodeGraphs, cuda_capture, filled
from caesura.runtime.model.cuda.kernels import ExactKernels, Kernels, TorchKernels
from caesura.runtime.model.cuda.layout import Layout
from caesura.runtime.model.cuda.parallel import Alone, Group, Shard
from caesura.runtime.model.weights import Model
from caesura.scheduler.types import Move
from torch import Tensor

MOST_SAMPLED = 4096  # rows of a step
SCORE_ROWS = 128  # logits held at once while scoring long prompts


@dataclass(frozen=True, slots=True)
class Options:
    """How a runner computes."""

    flashinfer: bool = True  # where it can be had
    graphs: bool = True  # with FlashInfer
    deterministic: bool = False  # bits that depend on a row's context alone; torch's kernels, slow
    max_rows: int = 256  # of a decode step with a graph


def arena_for(
    model: Model,
    device: Device,
    page_size: int,
    num_device_pages: int,
    num_host_pages: int,
    disk_folder: Path | None = None,
    num_disk_pages: int = 0,
) -> DeviceArena:
    """Pages for this model, or its part."""
    config = model.config
    return DeviceArena(
        device,
        num_layers=config.num_layers,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=page_size,
        num_device_pages=num_device_pages,
        num_host_pages=num_host_pages,
        dtype=model.dtype,
        disk_folder=disk_folder,
        num_disk_pages=num_disk_pages,
    )


@dataclass(frozen=True, slots=True)
class Rows:
    """What a step computed, on the device. ``logits`` [sampled rows, vocab] float32 are good until the next step."""

    logits: Tensor
    finite: Tensor  # [rows] bool: the row's hidden state is all finite numbers
    hidden: Tensor | None  # [rows, hidden]; None from a graph


class Runner:
    """Owns a model (or its part), the arena and the kernels of one device. Knows no sampling and no context."""

    def __init__(
        self, model: Model, shard: Shard, arena: DeviceArena, device: Device, group: Group | None, options: Options
    ) -> None:
        """Raises UnsupportedModel for ``deterministic`` where the device's library cannot do it."""
        config = model.config
        self.group = group or Alone()
        self.device, self.arena = device, arena
        self.flashinfer_refused = refused(config, model.dtype, device) if options.flashinfer else "it is switched off"
        if options.deterministic:
            exact.verify(model)
            self.flashinfer_refused = "deterministic computation has kernels of its own"
        self.cache = PagedCache(arena.pages)
        positions = min(config.max_context_tokens, arena.num_device_pages * self.cache.page_size)
        self.kernels, self.attention = self._choose(model, positions, options)
        self.decoder = DeviceDecoder(model, shard, self.kernels, self.group)
        self.sampled = torch.zeros(MOST_SAMPLED, dtype=torch.int64, device=device.torch)
        self.graphs: DecodeGraphs | None = None
        self._taken = PASSED  # the last step's inputs have been read
        if options.graphs and isinstance(self.attention, FlashInferAttention):
            with torch.inference_mode():
                self.graphs = DecodeGraphs(
                    self.decoder,
                    self.attention,
                    self.cache,
                    self.sampled,
                    device,
                    cuda_capture(),
                    max_rows=options.max_rows,
                    max_pages_each=-(-positions // self.cache.page_size),
                )

    def _choose(self, model: Model, positions: int, options: Options) -> tuple[Kernels, Attention]:
        config, device = model.config, self.device
        if options.deterministic:
            return ExactKernels(config, model.dtype, positions, device.torch), ExactAttention(config, device.torch)
        if self.flashinfer_refused is None:
            attention = FlashInferAttention(config, self.cache.page_size, model.dtype, device)
            return FlashInferKernels(config, positions, device.torch), attention
        kernels = TorchKernels(config, model.dtype, positions, device.torch)
        return kernels, TorchAttention(config, model.dtype, device.torch)

    def run(self, layout: Layout, copies: Sequence[Move]) -> Rows:
        """Begin a step: ``copies`` on the device, then all rows. Returns when everything is given to the device."""
        self._taken.synchronize()  # staged inputs and plans of the last step may be written over
        self.arena.copy_within(copies)
        size = self.graphs.size_for(layout) if self.graphs is not None else None
        if self.graphs is not None and size is not None:
            captured = self.graphs.prepare(layout, size)
            self._taken = self.device.record()  # before the replay: the next step must not wait for this one's end
            captured.replay()
            rows = layout.num_rows
            return Rows(captured.logits[:rows], captured.finite[:rows], None)
        return self._run_plainly(layout)

    def _run_plainly(self, layout: Layout) -> Rows:
        device = self.device
        staged = device.staging(4, layout.num_rows, dtype=torch.int64)
        arrays = (layout.token_ids, layout.positions, layout.slots(self.cache.page_slots), layout.source)
        for row, array in enumerate(arrays):
            staged[row] = torch.from_numpy(array)
        token_ids, positions, slots, source = device.send(staged)
        attend = self.attention.plan(layout, self.cache)
        self._taken = device.record()
        if (layout.source >= 0).any():
            token_ids = filled(token_ids, source, self.sampled)
        hidden = self.decoder.forward(token_ids, positions, slots, attend, self.cache)
        finite = torch.isfinite(hidden).all(dim=-1)
        self.cache.keep_finite(slots, finite)
        count = len(layout.sampled)
        wanted = hidden if count == layout.num_rows else hidden[self._sent(layout.sampled)]
        logits = self.decoder.logits(wanted) if count else hidden.new_empty(0, 1, dtype=torch.float32)
        return Rows(logits, finite, hidden)

    def score_logits(self, layout: Layout, rows: Rows) -> Iterator[Tensor]:
        """Logits [n, vocab] of the scored rows, a bounded number at a time."""
        for first in range(0, len(layout.scored), SCORE_ROWS):
            assert rows.hidden is not None
            yield self.decoder.logits(rows.hidden[self._sent(layout.scored[first : first + SCORE_ROWS])])

    def keep(self, ids: Tensor) -> None:
        """The tokens drawn in this step, in the order of ``layout.sampled``: the next one's inputs may be among them.

        With several processes the first one's count for all.
        """
        if self.group.size > 1:
            ids = self.group.share(ids)
        self.sampled[: len(ids)].copy_(ids.clamp(min=0))

    def close(self) -> None:
        """Wait for the device and free what it holds. Idempotent."""
        self.device.synchronize()
        self.arena.close()
        for part in ("graphs", "cache", "attention", "decoder", "kernels"):  # for whoever still knows this runner
            vars(self).pop(part, None)
        self.device.release()

    def _sent(self, rows: object) -> Tensor:
        found = torch.as_tensor(rows)
        staged = self.device.staging(*found.shape, dtype=found.dtype)
        staged.copy_(found)
        return self.device.send(staged)
