"""What the network's output loses when a layer's output changes: G = E[δ δ^T], from random probes.

For outputs `f` and a small change `d` of a layer's output, the drift of `f` is `|J d|²`. With a random
probe `v`, the gradient of `v · f` with respect to the layer's output is `J^T v`, and its second moment is `J^T J`:
one backward pass estimates it for all layers. A CLIP's outputs are its two normalised embeddings; of a
classifier the logits are measured by the divergence of their softmax (probes have the covariance
`diag(p) - p p^T`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.inherit.calibrate import Forward, TokenMask, is_clip, run_batch, to_device, token_rows
from pipeline.inherit.sites import Site


def outputs_of(model: nn.Module, result: Any) -> tuple[list[Tensor], bool]:
    """Return the tensors whose drift counts, and whether they are logits of a classifier."""
    tensors = (
        [result] if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)]
    )
    if is_clip(model):
        return [F.normalize(t.float(), dim=-1) for t in tensors], False
    return tensors, all(t.ndim == 2 for t in tensors)


def drift(model: nn.Module, new: Any, reference: Any) -> float:
    """Return the mean drift of outputs: 1 - cosine for embeddings, KL for logits, else relative error."""
    a, logits = outputs_of(model, new)
    b, _ = outputs_of(model, reference)
    total = 0.0
    for x, y in zip(a, b, strict=True):
        if logits:
            total += float(
                F.kl_div(
                    x.log_softmax(-1), y.log_softmax(-1), log_target=True, reduction="batchmean"
                )
            )
        elif is_clip(model):
            total += float((1 - (x * y).sum(dim=-1)).mean())
        else:
            total += float((x - y).square().sum() / y.square().sum().clamp_min(1e-30))
    return total / max(len(a), 1)


def _probe_loss(tensors: list[Tensor], logits: bool, generator: torch.Generator) -> Tensor:
    """Return `sum v · f` over samples and outputs, with fresh random probes."""
    total = torch.zeros((), device=tensors[0].device)
    for t in tensors:
        noise = torch.randn(t.shape, generator=generator).to(t)
        if logits:
            p = t.detach().softmax(dim=-1)
            root = p.sqrt() * noise
            noise = root - p * (p.sqrt() * noise).sum(dim=-1, keepdim=True)
        total = total + (noise * t).sum()
    return total


def output_sensitivity(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Any],
    forward: Forward | None,
    *,
    seed: int = 0,
    probes: int = 1,
) -> dict[str, Tensor]:
    """Return per site G [groups, O, O]: float64, summed over positions, mean over samples.

    Args:
        model: exposed teacher; its parameters collect no gradients.
        sites: layers of interest; blocked ones are left out.
        batches: calibration batches, run with gradients of activations: keep them small.
        forward: how to run a batch.
        seed: of the probes.
        probes: backward passes per batch.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = {s.name: s for s in sites if not s.blocked}
    sums: dict[str, Tensor] = {}
    mask = TokenMask()
    device = next(model.parameters()).device
    samples = 0
    training = model.training
    frozen = {p: p.requires_grad for p in model.parameters()}

    def watch(site: Site) -> Any:
        def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            if not output.requires_grad:  # nothing before it needs a gradient: start one here
                output = output.detach().requires_grad_()
            valid = mask.current
            output.register_hook(lambda grad: _accumulate(sums, site, grad, valid))
            return output

        return hook

    handles = [s.module.register_forward_hook(watch(s)) for s in wanted.values()]
    try:
        model.eval().requires_grad_(False)
        for batch in batches:
            for _ in range(probes):
                with torch.enable_grad():
                    result = run_batch(model, to_device(batch, device), mask, forward)
                    tensors, logits = outputs_of(model, result)
                    _probe_loss(tensors, logits, generator).backward()
                samples += tensors[0].shape[0]
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wanted_grad in frozen.items():
            parameter.requires_grad_(wanted_grad)
        model.train(training)
    return {name: total / max(samples, 1) for name, total in sums.items()}


def _accumulate(sums: dict[str, Tensor], site: Site, grad: Tensor, mask: Tensor | None) -> None:
    if site.kind == "conv":
        rows = grad.unflatten(1, (site.groups, -1)).movedim(1, 0).flatten(3).movedim(2, 3)
        rows = rows.flatten(1, 2)
    else:
        rows = token_rows(grad, mask).unsqueeze(0)
    gram = torch.bmm(rows.float().mT, rows.float()).double()
    if site.name in sums:
        sums[site.name] += gram
    else:
        sums[site.name] = gram


def weighted_energies(weight: Tensor, moment: Tensor, sensitivity: Tensor) -> Tensor:
    """Return the squared singular values of `G^½ W C` per group, [G, min(O, I)], largest first.

    Args:
        weight: [G, O, I], float64.
        moment: second moment of the layer's output before the bias, [G, O, O].
        sensitivity: [G, O, O].
    """
    values, vectors = torch.linalg.eigh(sensitivity)
    root = vectors * values.clamp_min(0).sqrt()[:, None, :] @ vectors.mT
    gram = root @ moment @ root
    energies = torch.linalg.eigvalsh((gram + gram.mT) / 2).flip(-1).clamp_min(0)
    return energies[:, : min(weight.shape[1:])]
