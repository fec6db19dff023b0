"""What the network's output loses when a layer's output is cut, measured by random probes.

For outputs `f` and a small change `d` of a layer's output, the drift of `f` is `|J d|²`. With a
random probe `v`, the gradient of `v · f` with respect to the layer's output is `g = J^T v`, and
`E (g · d)²` is that drift: one backward pass estimates it for all layers. A CLIP's outputs are its
two normalised embeddings; of a classifier the logits are measured by the divergence of their
softmax (probes have the covariance `diag(p) - p p^T`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.inherit.calibrate import Forward, TokenMask, is_clip, run_batch, to_device
from pipeline.inherit.factorize import Decomposition
from pipeline.inherit.sites import Site

SAMPLES = 128
PIECE = 1_250_000  # input values whose activations are kept for one backward pass: 8 of 224 pixels


def outputs_of(model: nn.Module, result: Any) -> tuple[list[Tensor], bool]:
    """Return the tensors whose drift counts, and whether they are logits of a classifier."""
    tensors = (
        [result] if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)]
    )
    if is_clip(model):
        return [F.normalize(t.float(), dim=-1) for t in tensors], False
    return tensors, all(t.ndim == 2 for t in tensors)


def drift(model: nn.Module, new: Any, reference: Any) -> float:
    """Return the mean drift: 1 - cosine for embeddings, KL for logits, else relative error."""
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


def loss_curves(
    model: nn.Module,
    sites: Sequence[Site],
    parts: Mapping[str, Decomposition],
    batches: Sequence[Any],
    forward: Forward | None,
    seed: int = 0,
    *,
    samples: int = SAMPLES,
) -> dict[str, list[float]]:
    """Return per considered layer the drift of the outputs that rank 0, 1, ..., full would cause.

    To first order the drift is `E (v · J d)²` with `d` the part of the output cut off. With `u_k`
    the layer's output directions, `a_k = sum over positions of (u_k · g)(u_k · y)` is what
    direction k contributes to one sample's `v · J d`, so that errors which add up over positions
    count as such. The curve is the mean of `(sum_{k>=r} a_k)²` and of `sum_{k>=r} a_k²`: the second
    is smoother, the first knows of directions that err together.

    Args:
        model: exposed teacher; its parameters collect no gradients.
        sites: layers; blocked ones are left out.
        parts: their decompositions.
        batches: calibration batches.
        forward: how to run a batch.
        seed: of the probes.
        samples: how many samples are used.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = [s for s in sites if not s.blocked]
    found: dict[str, list[Tensor]] = {site.name: [] for site in wanted}
    mask = TokenMask()
    device = next(model.parameters()).device
    frozen = {p: p.requires_grad for p in model.parameters()}
    training = model.training
    handles = [
        site.module.register_forward_hook(_watch(site, parts[site.name], found[site.name], mask))
        for site in wanted
    ]
    try:
        model.eval().requires_grad_(False)
        for batch in _small(batches, samples):
            with torch.enable_grad():
                result = run_batch(model, to_device(batch, device), mask, forward)
                tensors, logits = outputs_of(model, result)
                _probe_loss(tensors, logits, generator).backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, grad in frozen.items():
            parameter.requires_grad_(grad)
        model.train(training)
    return {site.name: _curve(found[site.name], site.full_rank) for site in wanted}


def _small(batches: Sequence[Any], samples: int, most: int = 16) -> Iterator[Any]:
    """Cut batches into pieces whose activations fit into memory with gradients."""
    left = samples
    for batch in batches:
        first = batch if isinstance(batch, Tensor) else batch[0]
        size = max(1, min(most, PIECE // max(1, first[0].numel())))
        for start in range(0, first.shape[0], size):
            if left <= 0:
                return
            stop = min(start + size, start + left)
            left -= stop - start
            if isinstance(batch, Tensor):
                yield batch[start:stop]
            else:
                yield tuple(part[start:stop] for part in batch)


def _directions(site: Site, parts: Decomposition) -> Tensor:
    """Return the orthonormal output directions of a layer's cut, [G, O, K] in single precision."""
    if parts.left is not None:
        left = parts.left
    else:
        assert parts.right is not None
        right = parts.right if parts.root is None else parts.root @ parts.right
        left = site.matrix() @ right
        left = left / left.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return left[..., : site.full_rank].float()


def _watch(
    site: Site, parts: Decomposition, found: list[Tensor], mask: TokenMask
) -> Callable[..., Tensor]:
    """Return the hook that notes `a_k` [B, K] of one layer in the backward pass."""
    basis = _directions(site, parts)

    def rows(values: Tensor, valid: Tensor | None) -> Tensor:
        """Lay out as [B, G, positions, O]; padding becomes zero."""
        if site.kind == "conv":
            return values.flatten(2).unflatten(1, (site.groups, -1)).transpose(2, 3)
        if valid is not None and values.ndim == 3:
            if values.shape[:2] != valid.shape:
                values = values.transpose(0, 1)
            values = values * valid.unsqueeze(-1)
        return values.reshape(values.shape[0], 1, -1, values.shape[-1])

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if not output.requires_grad:  # nothing before it needs a gradient: start one here
            output = output.detach().requires_grad_()
        valid = mask.current
        bias = getattr(module, "bias", None)
        y = output.detach()
        if bias is not None:
            y = y - (bias[:, None, None] if site.kind == "conv" else bias)
        y = rows(y, valid) @ basis
        y = y - y.mean(dim=(0, 2), keepdim=True)  # a constant error is mended by shift or BatchNorm

        def note(grad: Tensor) -> None:
            found.append(((rows(grad, valid) @ basis) * y).sum(dim=(1, 2)).double())

        output.register_hook(note)
        return output

    return hook


def _curve(found: list[Tensor], full_rank: int) -> list[float]:
    """Turn the noted contributions [B, K] into a non-increasing curve over ranks 0 ... K."""
    if not found:
        return [0.0] * (full_rank + 1)
    a = torch.cat(found)
    together = a.flip(1).cumsum(1).flip(1).square().mean(dim=0)
    together = together.flip(0).cummax(dim=0).values.flip(0)
    apart = a.square().mean(dim=0).flip(0).cumsum(0).flip(0)
    return [*((together + apart) / 2).tolist(), 0.0]
