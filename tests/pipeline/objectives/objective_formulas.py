"""The losses once more, written from the papers' formulas with loops over samples, in float64.

Nothing here is shared with the package: plain softmaxes of single rows, autograd for gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor


def softmax(row: Tensor) -> Tensor:
    weights = (row - row.max()).exp()
    return weights / weights.sum()


def cross_entropy(scale: Tensor | float, rows: Tensor, columns: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(rows):
        total = total - softmax(scale * (columns @ row))[i].log()
    return total / len(rows)


def info_nce(scale: Tensor | float, v: Tensor, t: Tensor) -> Tensor:
    return 0.5 * (cross_entropy(scale, v, t) + cross_entropy(scale, t, v))


def kl_rows(target_logits: Tensor, guess_logits: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for target, guess in zip(target_logits, guess_logits, strict=True):
        p, q = softmax(target), softmax(guess)
        total = total + (p * (p.log() - q.log())).sum()
    return total / len(target_logits)


def relational(v: Tensor, t: Tensor, s: Tensor, V: Tensor, T: Tensor, sT: Tensor) -> Tensor:
    image = kl_rows(sT * V @ T.T, s * v @ t.T)
    return 0.5 * (image + kl_rows(sT * T @ V.T, s * t @ v.T))


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b) ** 2).sum() / a.numel()


def gradients(v: Tensor, t: Tensor, s: Tensor, create_graph: bool) -> list[Tensor]:
    v, t = (x if x.requires_grad else x.clone().requires_grad_() for x in (v, t))
    found: list[Tensor] = []
    for direction in (cross_entropy(s, v, t), cross_entropy(s, t, v)):
        found += torch.autograd.grad(direction, (v, t), create_graph=create_graph)
    return found


def gradient_distance(v: Tensor, t: Tensor, s: Tensor, V: Tensor, T: Tensor, sT: Tensor) -> Tensor:
    ours, theirs = gradients(v, t, s, True), gradients(V, T, sT, False)
    pairs = zip(ours, theirs, strict=True)
    return torch.stack([squared_distance(a, b.detach()) for a, b in pairs]).sum()


def unit(rows: Tensor) -> Tensor:
    return rows / (rows**2).sum(1, keepdim=True).sqrt()


def fused(linear: torch.nn.Linear, ours: Tensor, theirs: Tensor) -> Tensor:
    return unit(torch.cat([ours, theirs], dim=1) @ linear.weight.T + linear.bias)
