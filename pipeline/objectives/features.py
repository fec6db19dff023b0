"""Features of a batch, gathered over the ranks with gradient.

Shapes: `b` rows on this rank, `B` rows on all ranks, `D` the embedding width.

Every loss is computed in its *local* form: this rank's `b` rows against all `B` columns. The
engine averages parameter gradients over the ranks, so with a gather whose backward *sums* over
ranks

    mean_r d(loss_r)/d(theta) = d(mean_r loss_r)/d(theta) = d(loss of the whole batch)/d(theta),

for the towers, for the logit scale and for the parameters of the losses alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_prep.errors import UserError

MAX_SCALE = 100.0


@dataclass(frozen=True)
class Features:
    """This rank's embeddings of one model.

    Attributes:
        image: `[b, D]`, L2-normalised.
        text: `[b, D]`, L2-normalised; row i describes image i.
        scale: The logit scale, exponentiated and bounded; one element.
    """

    image: Tensor
    text: Tensor
    scale: Tensor


def world() -> tuple[int, int]:
    """Return this process's rank and the number of processes; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def full_precision(tensor: Tensor) -> Tensor:
    """Return `tensor` in float32, or in float64 where it already is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _Gather(torch.autograd.Function):
    """Concatenate equal pieces of all ranks; the gradient of a piece is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, piece: Tensor) -> Tensor:
        rank, size = world()
        ctx.rows, ctx.rank = len(piece), rank
        pieces = [torch.empty_like(piece) for _ in range(size)]
        dist.all_gather(pieces, piece)
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        if grads[0].is_cuda and "nccl" in dist.get_backend():
            piece = grads[0].new_empty((ctx.rows, *grads[0].shape[1:]))
            dist.reduce_scatter(piece, list(grads[0].contiguous().split(ctx.rows)))
            return piece
        # Older gloo has no reduce-scatter; all_reduce writes in place, into a copy of ours
        whole = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole)
        return whole[ctx.rank * ctx.rows : (ctx.rank + 1) * ctx.rows]


def gather(piece: Tensor) -> Tensor:
    """Concatenate `piece` `[b, ...]` over the ranks to `[B, ...]` in rank order, with gradient.

    All ranks must bring the same shape. Float16 and bfloat16 travel as float32. With one process
    this is the piece itself.
    """
    piece = full_precision(piece)
    if world()[1] == 1:
        return piece
    gathered: Tensor = _Gather.apply(piece.contiguous())
    return gathered


def check_equal_rows(rows: int, device: torch.device) -> None:
    """Raise ValueError on every rank when the ranks hold different numbers of rows."""
    if world()[1] == 1:
        return
    bounds = torch.tensor([rows, -rows], device=device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    most, least = int(bounds[0]), -int(bounds[1])
    if most != least:
        raise ValueError(
            f"ranks hold between {least} and {most} samples of one batch; all must be equal"
        )


def bounded_scale(log_scale: Tensor, maximum: float = MAX_SCALE) -> Tensor:
    """Return `exp(log_scale)` as a 0-d tensor, at most `maximum`.

    The parameter itself is clamped before use (as open_clip does after each update), because a
    clamp of the result would have no gradient above the bound and the scale could never come down
    again.
    """
    with torch.no_grad():
        log_scale.clamp_(max=math.log(maximum))
    return full_precision(log_scale).exp().reshape(())


def mask_patches(
    images: Tensor, ratio: float, patch: int, generator: torch.Generator | None = None
) -> Tensor:
    """Hide `round(ratio * patches)` whole patches of each image, chosen anew for each.

    Args:
        images: `[b, C, H, W]`, normalised, so that 0 is the mean colour; H and W multiples of
            `patch`.
        ratio: Share of the patches to hide.
        patch: Edge of a patch in pixels.
        generator: On the CPU, so that every device hides the same patches.

    Raises:
        UserError: The image is not a whole number of patches.
    """
    height, width = images.shape[-2:]
    if height % patch or width % patch:
        raise UserError(
            f"images of {height}x{width} pixels are not whole patches of {patch}",
            where="objective.mfd.patch",
            todo="give a divisor of the image size, such as the patch size of a ViT student",
        )
    grid = (height // patch, width // patch)
    hidden = round(ratio * grid[0] * grid[1])
    order = torch.rand(len(images), grid[0] * grid[1], generator=generator).argsort(dim=1)
    keep = (order.argsort(dim=1) >= hidden).view(len(images), 1, *grid)
    keep = keep.repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)
    return images * keep.to(images.device, images.dtype)


def seeded_linear(inputs: int, outputs: int, generator: torch.Generator) -> torch.nn.Linear:
    """Return a linear layer that is the same on every rank: uniform weight, zero bias."""
    # Without torch's own draw, which would shift everything that is drawn after it
    layer = torch.nn.utils.skip_init(torch.nn.Linear, inputs, outputs)
    bound = 1 / math.sqrt(inputs)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.zero_()
    return layer
