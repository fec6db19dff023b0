"""One weight and what is known of its inputs -> the factors of an inherited layer, in every arm.

The matrix `W` [O, I] is truncated in the metric of its inputs, `M = E[x x^T]`: the best rank-r map
keeps the projection of the layer's *output* on its r main directions, `W_r = U_r U_r^T W` with `W M
W^T = U S² U^T`. So only the Gram matrix of the smaller side is ever decomposed, and for O <= I the
moments of the outputs
suffice: no I x I matrix, no inverse. All of it is float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.inherit.layers import Inherited, InheritedEmbedding
from pipeline.inherit.sites import Site

Arm = Literal["paper", "svd", "activation", "sequential", "random", "no_gate", "symmetric"]
ARMS: tuple[str, ...] = (
    "paper",
    "svd",
    "activation",
    "sequential",
    "random",
    "no_gate",
    "symmetric",
)
WEIGHT_ONLY = ("paper", "svd", "random")
SHRINKAGE = 0.01
DEVIATION = 0.1  # of the root mean square of the up projection; breaks the symmetry of the heads


@dataclass
class Moments:
    """Second moments of one layer over the calibration samples, per group, float64.

    Exactly one of `inputs` [G, I, I] and `outputs` [G, O, O] (before the bias) is kept: the smaller
    one. `input_power` [G] is E||x||², which the shrinkage needs.
    """

    inputs: Tensor | None
    outputs: Tensor | None
    input_power: Tensor
    count: float


@dataclass
class Decomposition:
    """What cuts a layer at any rank: energies σ² [G, K], largest first, and one basis.

    `left` [G, O, K] is the orthonormal output basis; or, where I < O, `right` [G, I, K] the input
    basis in the whitened space and `root` [G, I, I] the lower Cholesky factor of the metric.
    """

    energies: Tensor
    left: Tensor | None
    right: Tensor | None = None
    root: Tensor | None = None


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (largest first, not negative) and vectors of symmetric matrices [G, K, K]."""
    values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    return values.flip(-1).clamp_min(0), vectors.flip(-1)


def decompose(
    weight: Tensor, moments: Moments | None, shrinkage: float = SHRINKAGE
) -> Decomposition:
    """Decompose `weight` [G, O, I] in the metric of its inputs, the identity without moments.

    The metric is shrunk, `(1 - λ) M + λ tr(M)/I · 1`, which also makes a singular one usable.
    """
    _, out, width = weight.shape
    if moments is None:
        if out <= width:
            energies, left = _eigh(weight @ weight.mT)
            return Decomposition(energies, left)
        energies, right = _eigh(weight.mT @ weight)
        return Decomposition(energies, None, right)
    floor = shrinkage * moments.input_power / width  # [G]
    if bool(
        (floor <= 0).any()
    ):  # a layer that never saw anything but zeros has no metric of its own
        return decompose(weight, None)
    if out <= width:
        if moments.outputs is not None:
            gram = moments.outputs
        else:
            assert moments.inputs is not None
            gram = weight @ moments.inputs @ weight.mT
        metric = (1 - shrinkage) * gram + floor[:, None, None] * (weight @ weight.mT)
        energies, left = _eigh(metric)
        return Decomposition(energies, left)
    assert moments.inputs is not None
    eye = torch.eye(width, dtype=weight.dtype, device=weight.device)
    metric = (1 - shrinkage) * moments.inputs + floor[:, None, None] * eye
    root = torch.linalg.cholesky(metric)
    white = weight @ root
    energies, right = _eigh(white.mT @ white)
    return Decomposition(energies, None, right, root)


def balance(up: Tensor, down: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Scale an orthonormal up [G, O, R] and its down so that both carry √sigma [G, R]."""
    scale = sigma.clamp_min(1e-7 * sigma[:, :1].clamp_min(1e-30)).sqrt()
    return up * scale[:, None, :], down / scale[:, :, None]


def factors(weight: Tensor, parts: Decomposition, rank: int) -> tuple[Tensor, Tensor]:
    """Return the balanced factors: up [G, O, R] and down [G, R, I] with `up @ down = W_r`."""
    sigma = parts.energies[:, :rank].sqrt()
    # a direction without energy keeps a finite scale: its product is zero whatever the split
    scale = sigma.clamp_min(1e-7 * sigma[:, :1].clamp_min(1e-30)).sqrt()
    if parts.left is not None:
        left = parts.left[:, :, :rank]
        return left * scale[:, None, :], (left.mT @ weight) / scale[:, :, None]
    assert parts.right is not None
    right = parts.right[:, :, :rank]
    if parts.root is None:
        return (weight @ right) / scale[:, None, :], right.mT * scale[:, :, None]
    down = torch.linalg.solve_triangular(parts.root, right.mT, upper=False, left=False)
    return (weight @ (parts.root @ right)) / scale[:, None, :], down * scale[:, :, None]


def head_deviations(up: Tensor, heads: int, size: float, generator: torch.Generator) -> Tensor:
    """Return random deviations [H, O, R] of size `size · rms(up)` that sum to zero over heads."""
    noise = torch.randn((heads, *up.shape), generator=generator, dtype=torch.float64)
    noise = noise - noise.mean(dim=0)
    spread = noise.square().mean().sqrt().clamp_min(1e-30)
    rms = up.square().mean().sqrt()
    return noise.to(up.device) * (size * rms / spread)


def _random_factors(site: Site, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gaussian factors whose product has the variance 2 / I of He initialisation."""
    groups, out, width = site.groups, site.width_out, site.width_in
    up = torch.randn((groups, out, rank), generator=generator, dtype=torch.float64)
    down = torch.randn((groups, rank, width), generator=generator, dtype=torch.float64)
    scale = (2.0 / width / rank) ** 0.25
    return up * scale, down * scale


@torch.no_grad()
def fill_layer(
    layer: Inherited,
    site: Site,
    pair: tuple[Tensor, Tensor],
    arm: str,
    generator: torch.Generator,
    deviation: float = DEVIATION,
) -> None:
    """Write factors (up [G, O, R], down [G, R, I]) into an empty layer, as the arm demands.

    Args:
        layer: built by `build_layer` with the same rank.
        site: the dense layer, whose bias is copied.
        pair: what `factors` returned; ignored by the arm `random`.
        arm: decides heads and gate, see docs/inheritance.md.
        generator: source of the deviations and of random starts.
        deviation: relative size of the head deviations in the arms that use them.
    """
    up, down = _random_factors(site, layer.rank, generator) if arm == "random" else pair
    up = up.flatten(0, 1)  # [G x O, R]
    if isinstance(layer, InheritedEmbedding):
        layer.down.weight.copy_(down[0].T)
        layer.up.weight.copy_(up)
        return
    heads = up.expand(layer.heads, *up.shape)
    if arm == "paper":
        heads = heads / layer.heads
    elif layer.heads > 1 and arm not in ("svd",):
        heads = heads + head_deviations(up, layer.heads, deviation, generator)
    layer.up.copy_(heads)
    # the down projection has its output channels group by group; symmetric heads repeat them
    if layer.symmetric and site.groups > 1:
        copies = down[:, None].expand(-1, layer.heads, -1, -1)
        layer.down.weight.copy_(copies.reshape(layer.down.weight.shape))
    else:
        copies = down.flatten(0, 1).repeat(layer.heads if layer.symmetric else 1, 1)
        layer.down.weight.copy_(copies.reshape(layer.down.weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(site.module.bias)  # type: ignore[arg-type]
    if layer.gate is not None:
        _fill_gate(layer.gate, arm, generator)


def _fill_gate(gate: nn.Linear, arm: str, generator: torch.Generator) -> None:
    """Zero gates mix uniformly; the printed method starts them at random."""
    if arm in ("paper", "random"):
        bound = gate.in_features**-0.5
        for parameter in (gate.weight, gate.bias):
            values = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values.mul(2 * bound).sub(bound))
    else:
        nn.init.zeros_(gate.weight)
        nn.init.zeros_(gate.bias)
