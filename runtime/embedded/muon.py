"""Muon (Keller Jordan, 2024) for CPUs: matrices of one shape are orthogonalized together, in float32. torch's
takes them one by one, always in bfloat16; emulated, that was two thirds of a training step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the quintic that is steepest at zero, from Jordan's post
STEPS = 5
MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized; updates are scaled to the size of AdamW's (arXiv 2502.16982), 0.2
    sqrt(max(rows, columns)), so that both take one learning rate.
    Parameters are matrices; ValueError for others.
    """

    def __init__(self, matrices: Sequence[Tensor], *, lr: float, weight_decay: float) -> None:
        for matrix in matrices:
            if matrix.ndim != 2:
                raise ValueError(f"Muon orthogonalizes matrices; here is a tensor of shape {tuple(matrix.shape)}")
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault((min(matrix.shape), max(matrix.shape)), []).append(matrix)
            for matrices in by_shape.values():
                self._update(matrices, group["lr"], group["weight_decay"])

    def _update(self, matrices: list[Tensor], lr: float, weight_decay: float) -> None:
        """One step of matrices that have the same sides."""
        wide = torch.stack([_wide(self._direction(matrix)) for matrix in matrices])
        scale = -lr * 0.2 * wide.shape[2] ** 0.5
        for matrix, update in zip(matrices, orthogonal(wide), strict=True):
            matrix.mul_(1 - lr * weight_decay)
            matrix.add_(update if matrix.shape == update.shape else update.T, alpha=scale)

    def _direction(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        assert matrix.grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix.grad)
        momentum: Tensor = state["momentum_buffer"]
        momentum.lerp_(matrix.grad, 1 - MOMENTUM)
        return matrix.grad.lerp(momentum, MOMENTUM)


def _wide(matrix: Tensor) -> Tensor:
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def orthogonal(wide: Tensor) -> Tensor:
    """[count, rows, columns] with rows <= columns: each matrix with singular values near one (0.7 to 1.2), by five
    steps of Newton-Schulz."""
    a, b, c = NEWTON_SCHULZ
    x: Tensor = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.transpose(1, 2)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x
