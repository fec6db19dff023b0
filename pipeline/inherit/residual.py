"""What happens to a layer's output: the normalisation behind it, and the sum it enters.

One small probe batch is enough: tensors are followed by identity through modules and additions. So
a layer can be fitted to what matters after its BatchNorm, and the last layer of a residual branch
can make up for the error that the other operand of the sum already carries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline.inherit.sites import Site

ADDITIONS = {
    torch.add,
    Tensor.add,
    Tensor.add_,
    Tensor.__add__,
    Tensor.__radd__,
    Tensor.__iadd__,
}
RECTIFIERS = {torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu}


@dataclass
class Behind:
    """What follows one site.

    Attributes:
        scale: the modules between the layer and the sum (or only its BatchNorm), by name.
        partner: ("input" | "output", module) whose tensor is the other operand of the sum.
        rectified: whether a ReLU follows directly.
    """

    scale: list[str]
    partner: tuple[str, str] | None = None
    rectified: bool = False


class _Watch(TorchFunctionMode):
    """Record every addition of two equally shaped tensors, and what a ReLU reads."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: list[tuple[Tensor, Tensor, Tensor]] = []  # both operands and the result
        self.rectified: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in ADDITIONS and len(args) >= 2:
            a, b = args[0], args[1]
            if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
                self.sums.append((a, b, result))
        elif func in RECTIFIERS and args:
            self.rectified.append(args[0])
        return result


def is_affine(module: nn.Module) -> bool:
    """Whether the module, in eval mode, scales each channel by a constant."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.track_running_stats
    return isinstance(module, nn.Identity | nn.Dropout) or type(module).__name__ == "LayerScale"


def channel_scale(module: nn.Module, width: int, like: Tensor) -> Tensor:
    """Return the factor by which an affine module multiplies each of `width` channels."""
    ones = torch.ones(width, dtype=like.dtype, device=like.device)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        assert module.running_var is not None
        scale = (module.running_var.to(like) + module.eps).rsqrt()
        return scale if module.weight is None else scale * module.weight.detach().to(like)
    gamma = getattr(module, "gamma", None)
    return ones * gamma.detach().to(like) if isinstance(gamma, Tensor) else ones


def look_behind(
    model: nn.Module, sites: Sequence[Site], run: Callable[[], Any]
) -> dict[str, Behind]:
    """Run one probe and return, per site, what follows it.

    Args:
        model: the exposed model, in eval mode.
        sites: layers of interest.
        run: runs the model on a small batch.
    """
    wanted = {site.name for site in sites}
    produced: dict[int, tuple[str, int | None]] = {}  # tensor -> (module, its input)
    seen: dict[int, tuple[str, str]] = {}  # tensor -> where a hook can catch it
    keep: list[Tensor] = []  # so that no identity is reused during the probe

    def watch(name: str, module: nn.Module) -> Callable[..., None]:
        leaf = name in wanted or is_affine(module)

        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            source = args[0] if args and isinstance(args[0], Tensor) else None
            result = output[0] if isinstance(output, tuple) else output
            if source is not None:
                keep.append(source)
                seen.setdefault(id(source), ("input", name))
            if isinstance(result, Tensor):
                keep.append(result)
                seen.setdefault(id(result), ("output", name))
                if leaf and result is not source:
                    produced[id(result)] = (name, None if source is None else id(source))

        return hook

    handles = [m.register_forward_hook(watch(n, m)) for n, m in model.named_modules() if n]
    try:
        with _Watch() as seen_calls:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return _assemble(wanted, produced, seen, seen_calls)


def _assemble(
    wanted: set[str],
    produced: dict[int, tuple[str, int | None]],
    seen: dict[int, tuple[str, str]],
    calls: _Watch,
) -> dict[str, Behind]:
    """Walk back from every affine module and every sum to the site it comes from."""

    def origin(tensor: int) -> tuple[str | None, list[str]]:
        chain: list[str] = []
        current: int | None = tensor
        while current is not None and current in produced:
            name, source = produced[current]
            if name in wanted:
                return name, chain[::-1]
            chain.append(name)
            current = source
        return None, []

    found: dict[str, Behind] = {}
    rectified = {id(tensor) for tensor in calls.rectified}
    for tensor in produced:
        site, chain = origin(tensor)
        if site is not None and len(chain) >= len(found.get(site, Behind([])).scale):
            found[site] = Behind(chain, None, tensor in rectified)
    for a, b, result in calls.sums:
        for branch, other in ((a, b), (b, a)):
            site, chain = origin(id(branch))
            if site is not None and id(other) in seen and found[site].partner is None:
                found[site] = Behind(chain, seen[id(other)], id(result) in rectified)
    return found
