"""Sequential inheritance: in the network's order, every layer repairs those before it.

One forward pass does it. The calibration batch is run twice side by side, as one batch: the first
half sees the teacher, the second half the descendant made so far. At each layer the hook has the
teacher's output `y` and the descendant's input `x'`, solves the reduced-rank regression of `y` on
`x'`, puts the new layer in place and continues the second half with it. Everything between the
layers works per sample, hence on both halves alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.inherit.calibrate import (
    Forward,
    TokenMask,
    evaluating,
    patches_at,
    run_batch,
    to_device,
    token_rows,
)
from pipeline.inherit.factorize import balance
from pipeline.inherit.residual import Behind, channel_scale, look_behind
from pipeline.inherit.sites import Site

RIDGE = 0.02
ROWS = 40_000  # rows per layer that enter the regression at most


@dataclass
class Settings:
    """How layers are re-fitted.

    Attributes:
        ridge: pull towards the teacher's weight, as a share of the mean input variance.
        rows: positions sampled per layer over the whole batch.
        compensate: let the last layer of a branch make up for the other operand's error.
        shift: correct the mean where a bias or BatchNorm can hold it.
        dense: also fit layers that stay dense (not measured yet).
        weighted: measure output errors behind the BatchNorm that follows.
    """

    ridge: float = RIDGE
    rows: int = ROWS
    compensate: bool = True
    shift: bool = True
    dense: bool = False
    weighted: bool = True
    strength: float = 1.0
    floor: float = 0.1
    seed: int = 0


@dataclass
class Fit:
    """Factors of one layer, up [G, O, R] and down [G, R, I], a shift, and the error."""

    up: Tensor
    down: Tensor
    shift: Tensor | None
    error: float
    spectrum: Tensor = field(default_factory=lambda: torch.zeros(0))


@dataclass
class _Sums:
    """Sums over rows, per group, float64."""

    n: float
    x: Tensor
    y: Tensor
    xx: Tensor
    yx: Tensor
    yy: Tensor
    start_x: Tensor
    start_y: Tensor


def _sample(site: Site, x: Tensor, y: Tensor, mask: Tensor | None, settings: Settings) -> _Sums:
    """Accumulate the sums from the descendant's input and the target output of a layer."""
    generator = torch.Generator().manual_seed(settings.seed)
    total: _Sums | None = None
    if site.kind == "conv":
        conv = site.module
        assert isinstance(conv, nn.Conv2d)
        spots = y.shape[-1] * y.shape[-2]
        keep = max(1, min(spots, round(settings.rows / x.shape[0])))
        chosen = torch.rand(x.shape[0], spots, generator=generator).topk(keep, dim=1).indices
        chunk = max(1, int(1e7 // (site.groups * site.width_in * keep)))
        for part in torch.arange(x.shape[0]).split(chunk):
            where = chosen[part].to(x.device)
            rows = patches_at(x[part], conv, where, y.shape[-1])
            target = y[part].flatten(2).gather(2, where[:, None].expand(-1, y.shape[1], -1))
            target = target.unflatten(1, (site.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
            total = _add(total, rows, target)
    else:
        rows, target = token_rows(x, mask), token_rows(y, mask)
        if rows.shape[0] > settings.rows:
            index = torch.randperm(rows.shape[0], generator=generator)[: settings.rows]
            rows, target = rows[index.to(x.device)], target[index.to(x.device)]
        total = _add(None, rows.unsqueeze(0), target.unsqueeze(0))
    assert total is not None
    return total


def _add(total: _Sums | None, rows: Tensor, target: Tensor) -> _Sums:
    """Add rows [G, n, I] and targets [G, n, O]; both are taken relative to the first rows' mean.

    The products are single precision; without the common offset a large mean would drown the
    variance.
    """
    rows, target = rows.float(), target.float()
    if total is None:
        start = (rows.mean(dim=1), target.mean(dim=1))
    else:
        start = (total.start_x, total.start_y)
    rows, target = rows - start[0][:, None], target - start[1][:, None]
    new = _Sums(
        float(rows.shape[1]),
        rows.sum(dim=1).double(),
        target.sum(dim=1).double(),
        torch.bmm(rows.mT, rows).double(),
        torch.bmm(target.mT, rows).double(),
        torch.bmm(target.mT, target).double(),
        *start,
    )
    if total is None:
        return new
    total.n += new.n
    for name in ("x", "y", "xx", "yx", "yy"):
        getattr(total, name).add_(getattr(new, name))
    return total


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[:, :, None] * b[:, None, :]


def reduced_rank(
    weight: Tensor, sums: _Sums, rank: int, root: Tensor, settings: Settings, *, shift: bool
) -> Fit:
    """Solve the reduced-rank ridge regression towards `weight` [G, O, I], float64.

    Args:
        weight: the teacher's weight.
        sums: sums over the rows.
        rank: rank of the result.
        root: [G, O, O] symmetric root of the weight of output errors.
        settings: ridge.
        shift: whether a constant may be added to the output.
    """
    n = sums.n
    x, y = sums.x / n, sums.y / n
    xx = sums.xx / n - _outer(x, x)
    yx = sums.yx / n - _outer(y, x)
    yy = sums.yy / n - _outer(y, y)
    x, y = x + sums.start_x.double(), y + sums.start_y.double()
    if not shift:
        xx, yx, yy = xx + _outer(x, x), yx + _outer(y, x), yy + _outer(y, y)
    diagonal = xx.diagonal(dim1=1, dim2=2).mean(dim=1)
    # the second term covers rounding where the input hardly varies
    power = settings.ridge * diagonal + 1e-7 * x.square().mean(dim=1) + 1e-12
    eye = torch.eye(xx.shape[-1], dtype=xx.dtype, device=xx.device)
    ridge = power[:, None, None] * eye
    residual = yx - weight @ xx
    factor = torch.linalg.cholesky(xx + ridge)
    full = weight + settings.strength * torch.cholesky_solve(residual.mT, factor).mT
    weighted = root @ full
    gram = weighted @ (xx + ridge) @ weighted.mT
    energies, left = torch.linalg.eigh((gram + gram.mT) / 2)
    energies, left = energies.flip(-1).clamp_min(0), left.flip(-1)[:, :, :rank]
    up = torch.linalg.solve(root, left)
    down = left.mT @ weighted
    up, down = balance(up, down, energies[:, :rank].sqrt())
    new = up @ down
    error = yy - 2 * new @ yx.mT + new @ xx @ new.mT
    error, yy = root @ error @ root, root @ yy @ root
    trace = yy.diagonal(dim1=1, dim2=2).sum().clamp_min(1e-30)
    relative = error.diagonal(dim1=1, dim2=2).sum() / trace
    offset = (y - (new @ x[:, :, None])[:, :, 0]).flatten() if shift else None
    return Fit(up, down, offset, float(relative), energies[0])


class Refit:
    """The hooks of one sequential pass."""

    def __init__(
        self,
        model: nn.Module,
        ranks: Mapping[str, int],
        sites: Sequence[Site],
        behind: Mapping[str, Behind],
        settings: Settings,
        build: Callable[[Site, Fit], nn.Module],
        mask: TokenMask,
        sensitivity: Mapping[str, Tensor],
        given: Mapping[str, nn.Module],
    ) -> None:
        self.given = given
        self.sensitivity = sensitivity
        self.model, self.ranks, self.behind = model, ranks, behind
        self.settings, self.build, self.mask = settings, build, mask
        self.sites = {site.name: site for site in sites}
        self.fits: dict[str, Fit] = {}
        self.layers: dict[str, nn.Module] = {}
        self.shifts: dict[str, Tensor] = {}
        self.caught: dict[tuple[str, str], Tensor] = {}
        self.handles: list[Any] = []

    def __enter__(self) -> Refit:
        partners = {b.partner for n, b in self.behind.items() if n in self.ranks and b.partner}
        for name, module in self.model.named_modules():
            if ("input", name) in partners:
                self.handles.append(module.register_forward_pre_hook(self._catch_input(name)))
            if ("output", name) in partners:
                self.handles.append(module.register_forward_hook(self._catch_output(name)))
        for name in self.ranks:
            module = self.sites[name].module
            self.handles.append(module.register_forward_hook(self._fit(name), prepend=True))
        for name, layer in self.given.items():
            module = self.sites[name].module
            self.handles.append(module.register_forward_hook(self._use(layer), prepend=True))
        return self

    def __exit__(self, *_: object) -> None:
        self.caught.clear()
        for handle in self.handles:
            handle.remove()

    def _catch_input(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            self.caught["input", name] = args[0]

        return hook

    def _catch_output(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            self.caught["output", name] = output[0] if isinstance(output, tuple) else output

        return hook

    def _scales(self, name: str, width: int, like: Tensor) -> Tensor:
        scale = torch.ones(width, dtype=torch.float64, device=like.device)
        for step in self.behind.get(name, Behind([])).scale:
            scale = scale * channel_scale(self.model.get_submodule(step), width, scale)
        return scale

    def _use(self, layer: nn.Module) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            half = args[0].shape[0] // 2
            return torch.cat([output[:half], layer(args[0][half:])])

        return hook

    def _fit(self, name: str) -> Callable[..., Tensor]:
        site = self.sites[name]

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x = args[0]
            half = x.shape[0] // 2
            if name not in self.layers:
                self._solve(site, x[half:], output[:half])
            student = self.layers[name](x[half:])
            if name in self.shifts:
                shift = self.shifts[name].to(student.dtype)
                student = student + (shift[:, None, None] if site.kind == "conv" else shift)
            return torch.cat([output[:half], student])

        return hook

    def _solve(self, site: Site, x: Tensor, y: Tensor) -> None:
        name, settings = site.name, self.settings
        width = site.groups * site.width_out
        scale = self._scales(name, width, y)
        behind = self.behind.get(name, Behind([]))
        least = 1e-3 * scale.abs().max()
        # channels that do not count (a BatchNorm weight near zero) keep a small weight
        safe = (
            torch.where(scale.abs() < least, least, scale) if least > 0 else torch.ones_like(scale)
        )
        target = y
        bias = getattr(site.module, "bias", None)
        if bias is not None:
            target = target - (bias[:, None, None] if site.kind == "conv" else bias)
        if settings.compensate and behind.partner in self.caught:
            other = self.caught[behind.partner]
            gap = other[: other.shape[0] // 2] - other[other.shape[0] // 2 :]
            factor = safe.to(y.dtype)
            target = target + gap / (factor[:, None, None] if site.kind == "conv" else factor)
        mask = self.mask.current
        mask = None if mask is None else mask[: mask.shape[0] // 2]
        can_shift = settings.shift and (bias is not None or self._norm(name) is not None)
        sums = _sample(site, x, target, mask, settings)
        fit = reduced_rank(
            site.matrix(), sums, self.ranks[name],
            self._root(site, safe.abs()), settings, shift=can_shift,
        )  # fmt: skip
        self.fits[name] = fit
        self.layers[name] = self.build(site, fit)
        if fit.shift is not None:
            self.shifts[name] = fit.shift

    def _root(self, site: Site, scale: Tensor) -> Tensor:
        """Return the root of the output weight: sensitivity, else the BatchNorm's scale."""
        gram = self.sensitivity.get(site.name)
        if gram is None:
            scale = scale if self.settings.weighted else torch.ones_like(scale)
            return torch.diag_embed(scale.view(site.groups, -1))
        power = gram.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-30)
        values, vectors = torch.linalg.eigh(gram / power[:, None, None])
        values = values.clamp_min(0) + self.settings.floor
        return vectors * values.sqrt()[:, None, :] @ vectors.mT

    def _norm(self, name: str) -> nn.Module | None:
        """Return the BatchNorm directly behind a layer, which can hold a shift of its output."""
        steps = self.behind.get(name, Behind([])).scale
        if not steps:
            return None
        module = self.model.get_submodule(steps[0])
        return module if isinstance(module, nn.modules.batchnorm._BatchNorm) else None

    def store_shifts(self) -> None:
        """Move the shifts into the layers' biases or the BatchNorm behind them."""
        for name, shift in self.shifts.items():
            bias = getattr(self.layers[name], "bias", None)
            if isinstance(bias, Tensor):
                bias.data += shift.to(bias.dtype)
                continue
            norm = self._norm(name)
            assert norm is not None
            mean = norm.running_mean
            assert isinstance(mean, Tensor)
            mean -= shift.to(mean.dtype)


def twin(batches: Sequence[Any]) -> Any:
    """Concatenate all batches and repeat them: teacher half, descendant half."""
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat([*batches, *batches])
    return tuple(twin([batch[i] for batch in batches]) for i in range(len(first)))


def sequential_fit(
    model: nn.Module,
    sites: Sequence[Site],
    ranks: Mapping[str, int],
    batches: Sequence[Any],
    forward: Forward | None,
    build: Callable[[Site, Fit], nn.Module],
    settings: Settings,
    sensitivity: Mapping[str, Tensor] | None = None,
    given: Mapping[str, nn.Module] | None = None,
) -> Refit:
    """Re-fit every layer in `ranks` in one pass; the new layers are not yet put in place.

    Args:
        model: the exposed teacher; only BatchNorm means change, and only by stored shifts.
        sites: its layers.
        ranks: rank per layer name.
        batches: calibration batches; all of them are run as one.
        forward: how to run a batch.
        build: makes a layer from its factors.
        settings: of the regression.
        sensitivity: weight of output errors per layer, instead of the BatchNorm's scale.
        given: finished layers (embeddings) that the descendant's half uses.
    """
    mask = TokenMask()
    device = next(model.parameters()).device
    probe = to_device(_first(batches[0]), device)
    both = to_device(twin(batches), device)
    with evaluating(model):
        behind = look_behind(model, sites, lambda: run_batch(model, probe, mask, forward))
        with Refit(
            model, ranks, sites, behind, settings, build, mask, sensitivity or {}, given or {}
        ) as refit:
            run_batch(model, both, mask, forward)
        refit.store_shifts()
    return refit


def _first(batch: Any) -> Any:
    """Return the first two samples of a batch."""
    return batch[:2] if isinstance(batch, Tensor) else tuple(part[:2] for part in batch)
