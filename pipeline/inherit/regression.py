"""Reduced-rank ridge regression of a layer's output on the input it really gets.

In: sampled rows of inputs and wanted outputs of one layer, and the teacher's weight. Out: factors
of a rank, fitted by least squares; where a ReLU follows, to what passes it (after Zhang et al.,
arXiv 1505.06798, here with a closed form for each step).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipeline.inherit.calibrate import patches_at, token_rows
from pipeline.inherit.factorize import balance
from pipeline.inherit.sites import Site

RIDGE = 0.02  # with few samples; measured to be best with 256, and too strong with thousands
ROWS = 40_000  # rows per layer that enter the regression at most


@dataclass
class Settings:
    """How layers are re-fitted.

    Attributes:
        ridge: pull towards the teacher's weight, as a share of the mean input variance; None is
            0.02 with up to 256 calibration samples and less with more, as 1 / samples.
        rows: positions sampled per layer over the whole batch.
        compensate: let the last layer of a branch make up for the other operand's error.
        shift: correct the mean where a bias or BatchNorm can hold it.
        dense: also fit layers that stay dense, which costs no parameters.
        weighted: measure output errors behind the BatchNorm that follows.
        steps: further fits of a layer with a ReLU behind it, to what passes the ReLU.
        seed: of the sampled positions.
    """

    ridge: float | None = None
    rows: int = ROWS
    compensate: bool = True
    shift: bool = True
    dense: bool = True
    weighted: bool = True
    steps: int = 4
    seed: int = 0

    def ridge_for(self, samples: int) -> float:
        """Return the ridge for a number of calibration samples."""
        return min(RIDGE, 5.12 / samples) if self.ridge is None else self.ridge


@dataclass
class Fit:
    """Factors of one layer, up [G, O, R] and down [G, R, I], a shift, and the error."""

    up: Tensor
    down: Tensor
    shift: Tensor | None
    error: float
    spectrum: Tensor = field(default_factory=lambda: torch.zeros(0))


@dataclass
class Rows:
    """Sampled positions of one layer, single precision, per group.

    Attributes:
        x: the descendant's inputs [G, n, I].
        y: the wanted outputs [G, n, O].
        z: the teacher's values in front of the ReLU that follows [G, n, O], or None.
        slope: what one unit of output adds in front of that ReLU [G, O].
        samples: the calibration samples they come from.
    """

    x: Tensor
    y: Tensor
    z: Tensor | None
    slope: Tensor
    samples: int


@dataclass
class Picker:
    """The same positions of several tensors of one layer.

    Attributes:
        site: the layer.
        mask: valid tokens, of a linear layer.
        where: positions [B, n] of each image, or rows [n] of a linear layer; None for all rows.
    """

    site: Site
    mask: Tensor | None
    where: Tensor | None

    def outputs(self, values: Tensor) -> Tensor:
        """Return rows [G, n, O] of a tensor laid out as the layer's output."""
        if self.site.kind == "conv":
            assert self.where is not None
            index = self.where[:, None].expand(-1, values.shape[1], -1)
            rows = values.flatten(2).gather(2, index).unflatten(1, (self.site.groups, -1))
            return rows.permute(1, 0, 3, 2).flatten(1, 2).float()
        rows = token_rows(values, self.mask)
        return (rows if self.where is None else rows[self.where]).float().unsqueeze(0)

    def inputs(self, x: Tensor, width: int) -> Tensor:
        """Return the rows [G, n, I] of the layer's input behind them; `width` of the output."""
        if self.site.kind != "conv":
            return self.outputs(x)
        conv = self.site.module
        assert isinstance(conv, nn.Conv2d)
        assert self.where is not None
        return patches_at(x, conv, self.where, width).float()


def pick_rows(site: Site, y: Tensor, mask: Tensor | None, settings: Settings) -> Picker:
    """Choose which positions of a layer's output `y` enter the regression."""
    generator = torch.Generator().manual_seed(settings.seed)
    if site.kind == "conv":
        spots = y.shape[-1] * y.shape[-2]
        keep = max(1, min(spots, round(settings.rows / y.shape[0])))
        where = torch.rand(y.shape[0], spots, generator=generator).topk(keep, dim=1).indices
        return Picker(site, None, where.to(y.device))
    count = token_rows(y, mask).shape[0]
    index = None
    if count > settings.rows:
        index = torch.randperm(count, generator=generator)[: settings.rows].to(y.device)
    return Picker(site, mask, index)


class Regression:
    """Reduced-rank ridge regression of one layer's rows towards `weight` [G, O, I], float64.

    Args:
        weight: the teacher's weight.
        rows: sampled rows.
        rank: rank of the result.
        root: [G, O, O] symmetric root of the weight of output errors.
        settings: ridge and steps.
        shift: whether a constant may be added to the output.
    """

    def __init__(
        self,
        weight: Tensor,
        rows: Rows,
        rank: int,
        root: Tensor,
        settings: Settings,
        *,
        shift: bool,
    ) -> None:
        self.weight, self.rows, self.rank, self.root = weight, rows, rank, root
        self.settings, self.shift = settings, shift
        # single-precision products: without the offset a large mean would drown the variance
        self.start = rows.x.mean(dim=1, keepdim=True)
        self.x = rows.x - self.start if shift else rows.x
        self.xx = self._product(self.x, self.x)
        diagonal = self.xx.diagonal(dim1=1, dim2=2).mean(dim=1)
        # the second term covers rounding where the input hardly varies
        floor = 1e-7 * self.start.double().square().mean(dim=(1, 2)) + 1e-12
        power = settings.ridge_for(rows.samples) * diagonal + floor
        eye = torch.eye(self.xx.shape[-1], dtype=torch.float64, device=self.xx.device)
        self.metric = self.xx + power[:, None, None] * eye
        self.factor = torch.linalg.cholesky(self.metric)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the mean of `a b^T` over rows [G, ., .], summed in float64."""
        total = torch.zeros(a.shape[0], a.shape[2], b.shape[2], dtype=torch.float64)
        total = total.to(a.device)
        for some, other in zip(a.split(8192, dim=1), b.split(8192, dim=1), strict=True):
            total += torch.bmm(some.mT, other).double()
        return total / a.shape[1]

    def solve(self) -> Fit:
        """Fit, then with a ReLU behind the layer fit again to what passes it.

        Where the teacher's unit is off, any negative value is as good: the target becomes what the
        fit gives there, or zero. Each step lowers a bound on the error behind the ReLU.
        """
        y = self.rows.y
        fit = self._fit(y)
        if self.rows.z is None:
            return fit
        slope, z = self.rows.slope[:, None], self.rows.z
        for _ in range(self.settings.steps):
            new = (fit.up @ fit.down).float()
            made = torch.bmm(self.x, new.mT) + self.center[:, None].float()
            made = z + slope * (made - self.rows.y)
            wanted = torch.where(z > 0, z, made.clamp_max(0))
            fit = self._fit(self.rows.y + (wanted - z) / slope)
        return fit

    def _fit(self, target: Tensor) -> Fit:
        middle = target.mean(dim=1, keepdim=True)
        y = target - middle if self.shift else target
        yx, yy = self._product(y, self.x), self._product(y, y)
        residual = yx - self.weight @ self.xx
        full = self.weight + torch.cholesky_solve(residual.mT, self.factor).mT
        weighted = self.root @ full
        gram = weighted @ self.metric @ weighted.mT
        energies, left = torch.linalg.eigh((gram + gram.mT) / 2)
        energies, left = energies.flip(-1).clamp_min(0), left.flip(-1)[:, :, : self.rank]
        up = torch.linalg.solve(self.root, left)
        down = left.mT @ weighted
        up, down = balance(up, down, energies[:, : self.rank].sqrt())
        new = up @ down
        error = yy - 2 * new @ yx.mT + new @ self.xx @ new.mT
        error, yy = self.root @ error @ self.root, self.root @ yy @ self.root
        trace = yy.diagonal(dim1=1, dim2=2).sum().clamp_min(1e-30)
        relative = error.diagonal(dim1=1, dim2=2).sum() / trace
        offset = None
        self.center = torch.zeros_like(middle[:, 0]).double()
        if self.shift:
            self.center = middle[:, 0].double()
            offset = (self.center - (new @ self.start.double().mT)[:, :, 0]).flatten()
        return Fit(up, down, offset, float(relative), energies[0])
