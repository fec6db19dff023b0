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
    coherence: float = 0.0
    steps: int = 0
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
class _Rows:
    """Sampled positions of one layer, single precision, per group.

    Attributes:
        x: the descendant's inputs [G, n, I].
        y: the wanted outputs [G, n, O].
        z: the teacher's values in front of the ReLU that follows [G, n, O], or None.
        slope: what one unit of output adds in front of that ReLU [G, O].
        per_sample: rows of each sample, which follow one another; 0 where that is not so.
    """

    x: Tensor
    y: Tensor
    z: Tensor | None
    slope: Tensor
    per_sample: int


def _picker(site: Site, y: Tensor, mask: Tensor | None, settings: Settings) -> _Picker:
    """Choose which positions of a layer's output `y` enter the regression."""
    generator = torch.Generator().manual_seed(settings.seed)
    if site.kind == "conv":
        spots = y.shape[-1] * y.shape[-2]
        keep = max(1, min(spots, round(settings.rows / y.shape[0])))
        where = torch.rand(y.shape[0], spots, generator=generator).topk(keep, dim=1).indices
        return _Picker(site, None, where.to(y.device), keep)
    count = token_rows(y, mask).shape[0]
    index = None
    if count > settings.rows:
        index = torch.randperm(count, generator=generator)[: settings.rows].to(y.device)
    whole = mask is None and index is None
    return _Picker(site, mask, index, count // y.shape[0] if whole else 0)


@dataclass
class _Picker:
    """The same positions of several tensors of one layer.

    Attributes:
        site: the layer.
        mask: valid tokens, of a linear layer.
        where: positions [B, n] of each image, or rows [n] of a linear layer; None for all rows.
        per_sample: rows of each sample, 0 where they are not whole and in order.
    """

    site: Site
    mask: Tensor | None
    where: Tensor | None
    per_sample: int

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


class Regression:
    """Reduced-rank ridge regression of one layer's rows towards `weight` [G, O, I], float64.

    Args:
        weight: the teacher's weight.
        rows: sampled rows.
        rank: rank of the result.
        root: [G, O, O] symmetric root of the weight of output errors.
        settings: ridge, coherence, steps.
        shift: whether a constant may be added to the output.
    """

    def __init__(
        self,
        weight: Tensor,
        rows: _Rows,
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
        power = settings.ridge * diagonal + floor
        eye = torch.eye(self.xx.shape[-1], dtype=torch.float64, device=self.xx.device)
        self.metric = self.xx + power[:, None, None] * eye
        self.factor = torch.linalg.cholesky(self.metric)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the mean of `a b^T` over rows, per-sample means counting more [G, ., .]."""
        total = torch.zeros(a.shape[0], a.shape[2], b.shape[2], dtype=torch.float64)
        total = total.to(a.device)
        for some, other in zip(a.split(8192, dim=1), b.split(8192, dim=1), strict=True):
            total += torch.bmm(some.mT, other).double()
        size = self.rows.per_sample
        if self.settings.coherence and size > 1:
            means = [v.unflatten(1, (-1, size)).mean(dim=2) for v in (a, b)]
            total += self.settings.coherence * size**2 * torch.bmm(means[0].mT, means[1]).double()
        return total / a.shape[1]

    def solve(self) -> Fit:
        """Fit, then with a ReLU behind the layer fit again to what passes it."""
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
        self.replaced: list[nn.Module] = []

    def __enter__(self) -> Refit:
        partners = {b.partner for n, b in self.behind.items() if n in self.ranks and b.partner}
        for name, module in self.model.named_modules():
            if ("input", name) in partners:
                self.handles.append(module.register_forward_pre_hook(self._catch_input(name)))
            if ("output", name) in partners:
                self.handles.append(module.register_forward_hook(self._catch_output(name)))
        for name in self.ranks:
            self._replace(name, self._fit(name))
        for name, layer in self.given.items():
            self._replace(name, self._use(name, layer))
        return self

    def _replace(self, name: str, forward: Callable[[Tensor], Tensor]) -> None:
        """Let a module compute both halves by `forward` until the pass is over."""
        module = self.sites[name].module
        module.forward = forward  # an attribute of this instance; the class keeps its own
        self.replaced.append(module)

    def __exit__(self, *_: object) -> None:
        self.caught.clear()
        for handle in self.handles:
            handle.remove()
        for module in self.replaced:
            del module.forward

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

    def _use(self, name: str, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        module = self.sites[name].module

        def forward(x: Tensor) -> Tensor:
            half = x.shape[0] // 2
            return torch.cat([type(module).forward(module, x[:half]), layer(x[half:])])

        return forward

    def _fit(self, name: str) -> Callable[[Tensor], Tensor]:
        site = self.sites[name]
        module = site.module

        def forward(x: Tensor) -> Tensor:
            half = x.shape[0] // 2
            output = type(module).forward(module, x[:half])
            if name not in self.layers:
                self._solve(site, x[half:], output)
            student = self.layers[name](x[half:])
            if name in self.shifts:
                shift = self.shifts[name].to(student.dtype)
                student += shift[:, None, None] if site.kind == "conv" else shift
            return torch.cat([output, student])

        return forward

    def _solve(self, site: Site, x: Tensor, y: Tensor) -> None:
        """Fit one layer from the descendant's input `x` and the teacher's output `y`."""
        name, settings = site.name, self.settings
        scale = self._scales(name, site.groups * site.width_out, y)
        behind = self.behind.get(name, Behind([]))
        least = 1e-3 * scale.abs().max()
        # channels that do not count (a BatchNorm weight near zero) keep a small weight
        safe = (
            torch.where(scale.abs() < least, least, scale) if least > 0 else torch.ones_like(scale)
        )
        slope = safe.float().view(site.groups, 1, -1)
        mask = self.mask.current
        pick = _picker(site, y, None if mask is None else mask[: mask.shape[0] // 2], settings)
        target, before = pick.outputs(y), None
        if settings.steps and behind.rectified:
            before = slope * target + self._offset(name, y).view(site.groups, 1, -1)
        bias = getattr(site.module, "bias", None)
        if bias is not None:
            target = target - bias.float().view(site.groups, 1, -1)
        if behind.partner in self.caught:
            other = self.caught[behind.partner]
            teachers = pick.outputs(other[: other.shape[0] // 2])
            before = None if before is None else before + teachers
            if settings.compensate:
                target = target + (teachers - pick.outputs(other[other.shape[0] // 2 :])) / slope
        elif behind.partner:
            before = None
        rows = _Rows(pick.inputs(x, y.shape[-1]), target, before, slope[:, 0], pick.per_sample)
        can_shift = settings.shift and (bias is not None or self._norm(name) is not None)
        fit = Regression(
            site.matrix(), rows, self.ranks[name],
            self._root(site, safe.abs()), settings, shift=can_shift,
        ).solve()  # fmt: skip
        self.fits[name] = fit
        self.layers[name] = self.build(site, fit)
        if fit.shift is not None:
            self.shifts[name] = fit.shift

    def _offset(self, name: str, y: Tensor) -> Tensor:
        """Return what the affine modules behind a layer add to each channel [O]."""
        value = torch.zeros_like(y[:1])
        for step in self.behind[name].scale:
            # not called as modules: the hooks are for the pass itself
            value = self.model.get_submodule(step).forward(value)
        return value[0, :, 0, 0] if value.ndim == 4 else value.reshape(-1, value.shape[-1])[0]

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
