"""Run a model over calibration batches and keep what inheritance needs: moments of its layers.

Nothing of the data is stored: second moments are streamed, per layer the smaller of the input's and
the output's (see factorize.py why the output's suffice), so that a 3x3 convolution over 512
channels keeps 512 x 512 numbers instead of 4608 x 4608. Padding tokens never enter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.errors import UserError
from pipeline.inherit.factorize import Moments
from pipeline.inherit.sites import Site
from pipeline.inherit.valid import valid_tokens

Forward = Callable[[nn.Module, Any], Any]


class TokenMask:
    """The valid token positions [B, N] of the running tower, None without padding."""

    current: Tensor | None = None


def is_clip(model: nn.Module) -> bool:
    """Whether the model has the two encoders of a CLIP."""
    return hasattr(model, "encode_image") and hasattr(model, "encode_text")


def run_batch(model: nn.Module, batch: Any, mask: TokenMask, forward: Forward | None) -> Any:
    """Run one calibration batch; a CLIP takes (images, tokens) through both encoders."""
    mask.current = None
    if forward is not None:
        return forward(model, batch)
    if is_clip(model):
        clip: Any = model
        images, tokens = batch[0], batch[1]
        image_features = clip.encode_image(images)
        mask.current = valid_tokens(model, tokens)
        text_features = clip.encode_text(tokens)
        mask.current = None
        return image_features, text_features
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def as_batches(calibration: Any) -> list[Any]:
    """Accept one batch (tensor or tuple of tensors) or an iterable of batches.

    Raises:
        UserError: it holds no batch.
    """
    if isinstance(calibration, Tensor):
        return [calibration]
    if isinstance(calibration, tuple) and all(isinstance(item, Tensor) for item in calibration):
        return [calibration]
    batches = list(calibration)
    if not batches:
        raise UserError(
            "the calibration data is empty", where="calibration", todo="give at least one batch"
        )
    return batches


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a batch."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    return type(batch)(to_device(item, device) for item in batch)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set eval mode without gradients, and restore each module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def token_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Flatten [..., I] to rows, without padding where `x` is laid out as the mask."""
    if mask is not None and x.ndim == 3:
        if x.shape[:2] == mask.shape:
            return x[mask]
        if x.shape[:2] == mask.shape[::-1]:
            return x[mask.T]
    return x.reshape(-1, x.shape[-1])


def patches(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Unfold an input [B, c, h, w] into the patches a convolution reads, [G, rows, I]."""
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        pads = conv._reversed_padding_repeated_twice
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x, padding = F.pad(x, pads, mode=mode), (0, 0)
    else:
        padding = conv.padding  # type: ignore[assignment]
    columns = F.unfold(x, conv.kernel_size, conv.dilation, padding, conv.stride)
    return columns.unflatten(1, (conv.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def patches_at(x: Tensor, conv: nn.Conv2d, where: Tensor, width: int) -> Tensor:
    """Return only the patches behind some output positions, [G, B * n, I].

    Args:
        x: inputs [B, c, h, w].
        conv: the convolution that would read them.
        where: output positions [B, n], numbered row by row.
        width: columns of the output.
    """
    pads = conv._reversed_padding_repeated_twice
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    last = F.pad(x, pads, mode=mode).permute(0, 2, 3, 1).contiguous()  # [B, h, w, c]
    image = torch.arange(x.shape[0], device=x.device)[:, None].expand_as(where).flatten()
    top = (where // width * conv.stride[0]).flatten()
    left = (where % width * conv.stride[1]).flatten()
    taps = [
        last[image, top + i * conv.dilation[0], left + j * conv.dilation[1]]
        for i in range(conv.kernel_size[0])
        for j in range(conv.kernel_size[1])
    ]
    rows = torch.stack(taps, dim=2)  # [B * n, c, kernel]
    return rows.view(rows.shape[0], conv.groups, -1).transpose(0, 1)


def patch_power(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Return the summed squared length of all patches, per group [G], without unfolding."""
    squares = x.square().unflatten(1, (conv.groups, -1)).sum(dim=2)  # [B, G, h, w]
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        squares, padding = F.pad(squares, conv._reversed_padding_repeated_twice, mode=mode), (0, 0)
    else:
        padding = conv.padding  # type: ignore[assignment]
    ones = torch.ones((conv.groups, 1, *conv.kernel_size), dtype=x.dtype, device=x.device)
    counted = F.conv2d(squares, ones, None, conv.stride, padding, conv.dilation, conv.groups)
    return counted.sum(dim=(0, 2, 3), dtype=torch.float64)


class Collector:
    """Forward hooks that stream the moments of every site and count its positions."""

    def __init__(self, sites: Sequence[Site], mask: TokenMask, *, moments: bool = True) -> None:
        self.sites, self.mask, self.moments = sites, mask, moments
        self.sums: dict[str, Moments] = {}
        self.calls: dict[str, int] = dict.fromkeys((site.name for site in sites), 0)
        self.rows: dict[str, float] = dict.fromkeys((site.name for site in sites), 0.0)
        self.samples: dict[str, int] = dict.fromkeys((site.name for site in sites), 0)
        self.handles: list[Any] = []

    def __enter__(self) -> Collector:
        for site in self.sites:
            self.handles.append(site.module.register_forward_hook(self._hook(site)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            x = inputs[0]
            self.calls[site.name] += 1
            width = 1 if site.kind == "conv" else -1
            self.rows[site.name] += output.numel() / output.shape[width]
            self.samples[site.name] += x.shape[0]
            if self.moments and not site.blocked:
                self._add(site, x, output)

        return hook

    def _add(self, site: Site, x: Tensor, output: Tensor) -> None:
        """Add one call's second moments to the sums."""
        narrow = site.width_out <= site.width_in
        inputs = outputs = None
        if isinstance(site.module, nn.Embedding):
            inputs, outputs, power, count = self._embedding(site, x)
        elif isinstance(site.module, nn.Conv2d):
            conv = site.module
            x = x if x.ndim == 4 else x.unsqueeze(0)
            power = patch_power(x, conv)
            count = output.numel() / conv.out_channels
            if narrow:
                y = output if conv.bias is None else output - conv.bias[:, None, None]
                outputs = _gram(
                    y.unflatten(1, (conv.groups, -1))
                    .movedim(1, 0)
                    .flatten(3)
                    .movedim(2, 3)
                    .flatten(1, 2)
                )
            else:
                inputs = _gram(patches(x, conv))
        else:
            rows = token_rows(x, self.mask.current)
            power, count = rows.square().sum(dtype=torch.float64).view(1), rows.shape[0]
            if narrow:
                bias = site.module.bias
                y = token_rows(output if bias is None else output - bias, self.mask.current)  # type: ignore[operator]
                outputs = _gram(y.unsqueeze(0))
            else:
                inputs = _gram(rows.unsqueeze(0))
        known = self.sums.get(site.name)
        if known is None:
            self.sums[site.name] = Moments(inputs, outputs, power, float(count))
            return
        for total, new in ((known.inputs, inputs), (known.outputs, outputs)):
            if total is not None and new is not None:
                total += new
        known.input_power += power
        known.count += float(count)

    def _embedding(self, site: Site, tokens: Tensor) -> tuple[None, Tensor, Tensor, float]:
        """A lookup's input is one-hot: its moments are the token counts, seen through the table."""
        mask = self.mask.current
        ids = (
            tokens[mask] if mask is not None and mask.shape == tokens.shape else tokens.reshape(-1)
        )
        rows = site.module.weight[ids]  # type: ignore[index]
        return (
            None,
            _gram(rows.unsqueeze(0)),
            torch.full((1,), float(ids.numel()), dtype=torch.float64),
            ids.numel(),
        )

    def finish(self) -> dict[str, Moments]:
        """Return the means over all rows, and refuse what the data made unusable.

        Raises:
            UserError: an activation was NaN or infinite.
        """
        for name, moments in self.sums.items():
            for part in (moments.inputs, moments.outputs, moments.input_power):
                if part is not None:
                    part /= max(moments.count, 1.0)
                    if not torch.isfinite(part).all():
                        raise UserError(
                            "the calibration data produces NaN or infinite activations",
                            where=name,
                            todo="check the teacher's weights and the calibration images",
                        )
        return self.sums


def _gram(rows: Tensor) -> Tensor:
    """Second moment sums of rows [G, N, K] as float64 [G, K, K]; products in single precision."""
    rows = rows.float()
    return torch.bmm(rows.mT, rows).double()


def collect(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Any],
    forward: Forward | None,
    *,
    moments: bool = True,
) -> dict[str, Moments]:
    """Stream the calibration batches and return the moments per site; sites learn their positions.

    Args:
        model: exposed model whose modules the sites refer to.
        sites: heavy layers; `positions` is set, and `blocked` for those that never ran.
        batches: calibration batches.
        forward: how to run a batch, None for the default.
        moments: False only counts positions (one batch is enough).
    """
    mask = TokenMask()
    device = next(model.parameters()).device
    with evaluating(model), Collector(sites, mask, moments=moments) as collector:
        for batch in batches:
            run_batch(model, to_device(batch, device), mask, forward)
    for site in sites:
        if collector.calls[site.name] == 0:
            site.blocked = (
                site.blocked or "its forward never ran: unused, or its weight is read directly"
            )
            continue
        site.positions = collector.rows[site.name] / max(collector.samples[site.name], 1)
    _teacher_positions(sites)
    return collector.finish()


def _teacher_positions(sites: Sequence[Site]) -> None:
    """Note that the teacher's attention pool projects queries and outputs at every position."""
    by_name = {site.name: site for site in sites}
    for site in sites:
        prefix, _, last = site.name.rpartition(".")
        keys = by_name.get(f"{prefix}.k_proj")
        site.positions_before = site.positions
        if last in ("q_proj", "c_proj") and keys is not None and site.positions == 1:
            site.positions_before = keys.positions


def reestimate_batchnorm(model: nn.Module, batches: Iterable[Any], forward: Forward | None) -> int:
    """Replace BatchNorm running statistics by those of the calibration batches, in one pass.

    Every BatchNorm normalises with the batch it sees while later ones are estimated, so that all
    are consistent.

    Returns:
        The number of BatchNorm layers.
    """
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    if not norms:
        return 0
    device = next(model.parameters()).device
    saved = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    mask = TokenMask()
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the batches
            norm.training = True
        for batch in batches:
            run_batch(model, to_device(batch, device), mask, forward)
        for norm, (momentum, seen) in zip(norms, saved, strict=True):
            norm.momentum, norm.training = momentum, False
            norm.num_batches_tracked = seen
    return len(norms)
