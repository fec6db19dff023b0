"""Sequential inheritance: in the network's order, every layer repairs those before it.

One forward pass does it. The calibration batch is run twice side by side, as one batch: the first
half sees the teacher, the second half the descendant made so far. At each layer the hook has the
teacher's output `y` and the descendant's input `x'`, solves the reduced-rank regression of `y` on
`x'`, puts the new layer in place and continues the second half with it. Everything between the
layers works per sample, hence on both halves alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.inherit.calibrate import (
    Forward,
    TokenMask,
    evaluating,
    run_batch,
    to_device,
)
from pipeline.inherit.regression import Fit, Regression, Rows, Settings, pick_rows
from pipeline.inherit.residual import Behind, channel_scale, look_behind
from pipeline.inherit.sites import Site

LARGEST = 16_000_000  # input values of a calibration set that goes through in one piece


def default_arm(batches: Sequence[Any] | None) -> str:
    """Return the best arm that a calibration set allows.

    Sequential inheritance was the most faithful on every network measured, but it holds all
    activations of a layer for the whole set: a few gigabytes at `LARGEST`.
    """
    if batches is None:
        return "svd"
    first = [batch if isinstance(batch, Tensor) else next(iter(batch)) for batch in batches]
    if not all(isinstance(part, Tensor) for part in first):  # a form that cannot be run twice
        return "activation"
    return "sequential" if sum(part.numel() for part in first) <= LARGEST else "activation"


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
        given: Mapping[str, nn.Module],
    ) -> None:
        self.given = given
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
        pick = pick_rows(site, y, None if mask is None else mask[: mask.shape[0] // 2], settings)
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
        rows = Rows(pick.inputs(x, y.shape[-1]), target, before, slope[:, 0], x.shape[0])
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
        """Return the root of the weight of output errors: the BatchNorm's scale."""
        scale = scale if self.settings.weighted else torch.ones_like(scale)
        return torch.diag_embed(scale.view(site.groups, -1))

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
        given: finished layers (embeddings) that the descendant's half uses.
    """
    mask = TokenMask()
    device = next(model.parameters()).device
    probe = to_device(_first(batches[0]), device)
    both = to_device(twin(batches), device)
    with evaluating(model):
        behind = look_behind(model, sites, lambda: run_batch(model, probe, mask, forward))
        with Refit(model, ranks, sites, behind, settings, build, mask, given or {}) as refit:
            run_batch(model, both, mask, forward)
        refit.store_shifts()
    return refit


def _first(batch: Any) -> Any:
    """Return the first two samples of a batch."""
    return batch[:2] if isinstance(batch, Tensor) else tuple(part[:2] for part in batch)
