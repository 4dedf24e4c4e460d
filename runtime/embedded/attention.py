"""Causal attention for training on CPUs: query blocks against the keys up to them, as plain matrix products.

torch's flash kernel for CPUs takes most of a step at these sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 128


class CausalAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(head_dim)) v over [batch, heads, length, head_dim], all of one dtype."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length, scale = q.shape[2], q.shape[3] ** -0.5
        above = torch.full((BLOCK, BLOCK), float("-inf"), dtype=q.dtype).triu(1)
        out, shares = torch.empty_like(q), []
        for start in range(0, length, BLOCK):
            end = min(start + BLOCK, length)
            scores = (q[:, :, start:end] * scale) @ k[:, :, :end].transpose(-1, -2)
            scores[..., start:end] += above[: end - start, : end - start]
            share = torch.softmax(scores, -1)
            shares.append(share)
            out[:, :, start:end] = share @ v[:, :, :end]
        ctx.save_for_backward(q, k, v, *shares)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *shares = ctx.saved_tensors
        scale = q.shape[3] ** -0.5
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for start, share in zip(range(0, q.shape[2], BLOCK), shares, strict=True):
            end = start + share.shape[2]
            grad = grads[0][:, :, start:end]
            dv[:, :, :end] += share.transpose(-1, -2) @ grad
            dshare = grad @ v[:, :, :end].transpose(-1, -2)
            dscores = torch._softmax_backward_data(dshare, share, -1, share.dtype)
            dq[:, :, start:end] = (dscores @ k[:, :, :end]) * scale
            dk[:, :, :end] += (dscores.transpose(-1, -2) @ q[:, :, start:end]) * scale
        return dq, dk, dv


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over [batch, heads, length, head_dim], to be differentiated."""
    out: Tensor = CausalAttention.apply(q, k, v)  # type: ignore[no-untyped-call]
    return out
