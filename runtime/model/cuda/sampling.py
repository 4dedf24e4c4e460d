"""Sampling on the device for generations whose next token needs nothing of the host.

Those are greedy, or drawn with temperature, top-k, top-p and min-p. Everything else (penalties, biases, grammars,
logprobs) is ``model.sampler``'s on the host. The uniform number of an output position is the same hash of
(seed, position) there and here; a token is drawn by inverting the cumulative distribution in vocabulary order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from caesura.runtime.model.cuda.device import Device
from caesura.runtime.model.cuda.kernels import Kernels
from caesura.runtime.model.sampler import uniform
from caesura.runtime.sampling import SamplerState
from torch import Tensor

NOT_FINITE = -1  # instead of a token id
_COLDEST = 1e-3  # below it the likeliest token is as good as certain, and quotients would overflow


@dataclass(frozen=True, slots=True)
class Draw:
    """How n rows are sampled, on the host. ``position`` is each row's place in its output."""

    states: Sequence[SamplerState]
    positions: Sequence[int]

    @property
    def bans(self) -> list[bool]:
        """Rows that may not end yet."""
        return [place < state.params.min_new_tokens for state, place in zip(self.states, self.positions, strict=True)]

    @property
    def is_greedy(self) -> bool:
        return all(state.params.temperature < _COLDEST for state in self.states)


def draw(logits: Tensor, how: Draw, eos_ids: Tensor, kernels: Kernels, device: Device) -> Tensor:
    """Token ids [n] int64 on the device for ``logits`` [n, vocab] float32 (overwritten), NOT_FINITE where a row has no
    finite maximum. ``eos_ids`` are banned from rows below their ``min_new_tokens``."""
    if any(bans := how.bans) and eos_ids.numel():
        banned = _send(device, bans, torch.bool)
        ending = logits[:, eos_ids]
        logits[:, eos_ids] = ending.masked_fill(banned[:, None], float("-inf"))
    top, ids = logits.max(dim=-1)
    if not how.is_greedy:
        drawn, random = _drawn(logits, top, how, kernels, device)
        ids = torch.where(random, drawn, ids)
    return torch.where(torch.isfinite(top), ids, NOT_FINITE)


def _drawn(logits: Tensor, top: Tensor, how: Draw, kernels: Kernels, device: Device) -> tuple[Tensor, Tensor]:
    """Random draws, and which rows are random."""
    params = [state.params for state in how.states]
    vocab = logits.shape[1]
    floats = _send(
        device,
        np.array(
            [
                [max(one.temperature, _COLDEST) for one in params],
                [one.top_p for one in params],
                [one.min_p for one in params],
            ],
            dtype=np.float32,
        ),
        torch.float32,
    )
    numbers = [uniform(state.seed, place) for state, place in zip(how.states, how.positions, strict=True)]
    random = _send(device, [one.temperature >= _COLDEST for one in params], torch.bool)
    probs = torch.softmax(logits / floats[0][:, None], dim=-1)
    kept = probs
    top_k = top_p = None
    if any(0 < one.top_k < vocab for one in params):
        top_k = _send(device, [one.top_k if 0 < one.top_k < vocab else vocab for one in params], torch.int32)
    if any(one.top_p < 1.0 for one in params):
        top_p = floats[1]
    if top_k is not None or top_p is not None:
        kept = torch.where(kernels.keep_top(probs, top_k, top_p), probs, 0.0)
    if any(one.min_p > 0 for one in params):
        kept = torch.where(probs >= floats[2][:, None] * probs.amax(dim=-1, keepdim=True), kept, 0.0)
    cumulative = kept.double().cumsum(dim=-1)
    total = cumulative[:, -1:]
    target = _send(device, numbers, torch.float64)[:, None] * total
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0], random


def _send(device: Device, values: object, dtype: torch.dtype) -> Tensor:
    host = torch.as_tensor(values, dtype=dtype)
    if not device.is_cuda:
        return host
    staged = device.staging(*host.shape, dtype=dtype)
    staged.copy_(host)
    return device.send(staged)
