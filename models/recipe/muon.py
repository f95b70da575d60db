"""Muon for the matrices and convolutions, AdamW for the rest: fewer steps to the same loss.

source      Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the update is scaled
            to AdamW's usual size after Liu et al. 2025, arXiv:2502.16982, so one rate serves both
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def orthogonal(update: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: five Newton-Schulz steps, [r, c] -> [r, c]."""
    x = (update / (update.norm() + 1e-7)).bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if tall else x).to(update.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, for parameters of two or more dimensions."""

    def __init__(self, params: Iterable[Tensor], lr: float, decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.95, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"]).flatten(1)
                scale = 0.2 * max(update.shape) ** 0.5
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(orthogonal(update).view_as(p), alpha=-group["lr"] * scale)


def optimizers(modules: Iterable[nn.Module], lr: float) -> list[torch.optim.Optimizer]:
    """Muon for inner matrices; AdamW for vectors, embeddings and the first and last layers."""
    inner, rest = [], []
    for module in modules:
        for name, p in module.named_parameters():
            edge = "embedding" in name or p.ndim < 2 or min(p.flatten(1).shape) < 16
            (rest if edge else inner).append(p)
    return [Muon(inner, lr), torch.optim.AdamW(rest, lr, betas=(0.9, 0.98), weight_decay=0.0)]
