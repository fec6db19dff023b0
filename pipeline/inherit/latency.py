"""Milliseconds of layers and models on this machine: what a latency budget is spent in."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.inherit.allocate import Shape, heads_for
from pipeline.inherit.calibrate import Forward, TokenMask, evaluating, run_batch, to_device
from pipeline.inherit.layers import build_layer
from pipeline.inherit.sites import Site


def clock(
    call: Callable[[], Any],
    *,
    seconds: float = 0.1,
    least: int = 3,
    most: int = 50,
    warm: bool = True,
) -> float:
    """Return the median time of `call` in seconds, after one warm-up unless `warm` is False."""
    if warm:
        call()
    times: list[float] = []
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    while len(times) < least or (sum(times) < seconds and len(times) < most):
        synchronise()
        start = time.perf_counter()
        call()
        synchronise()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def model_latency(
    model: nn.Module, batch: Any, forward: Forward | None, *, seconds: float = 2.0
) -> float:
    """Return the median seconds of one forward pass over `batch` (both towers of a CLIP)."""
    device = next(model.parameters()).device
    batch = to_device(batch, device)
    mask = TokenMask()
    with evaluating(model):
        return clock(lambda: run_batch(model, batch, mask, forward), seconds=seconds, most=20)


def compare_latency(
    first: nn.Module, second: nn.Module, batch: Any, forward: Forward | None, *, rounds: int = 5
) -> tuple[float, float]:
    """Return the median seconds of one forward pass of two models that take turns.

    In turns a machine that is busy for a while, or warms up, slows both alike; of two models timed
    one after the other it would slow one.
    """
    device = next(first.parameters()).device
    batch = to_device(batch, device)
    mask = TokenMask()
    times: tuple[list[float], list[float]] = ([], [])
    with evaluating(first), evaluating(second):
        for step in range(rounds + 1):
            for model, found in zip((first, second), times, strict=True):
                once = clock(
                    lambda model=model: run_batch(model, batch, mask, forward),  # type: ignore[misc]
                    least=1, most=1, warm=step == 0,
                )  # fmt: skip
                if step:
                    found.append(once)
    return statistics.median(times[0]), statistics.median(times[1])


def layer_timings(
    model: nn.Module,
    sites: Sequence[Site],
    batch: Any,
    forward: Forward | None,
    losses: Mapping[str, Sequence[float]],
    shape: Shape,
) -> dict[str, dict[int | None, float]]:
    """Time every considered layer, dense (key None) and inherited at four ranks, on its real input.

    Layers of equal geometry are timed once.
    """
    known: dict[tuple[Any, ...], dict[int | None, float]] = {}
    table: dict[str, dict[int | None, float]] = {}
    inside = False

    def watch(site: Site) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], _: Tensor) -> None:
            nonlocal inside
            if inside or site.name in table:
                return
            heads = heads_for(site, losses[site.name], shape)
            key = (site.kind, site.shape, site.groups, tuple(args[0].shape), heads)
            stride = getattr(module, "stride", None)
            if (key, stride) not in known:
                inside = True
                known[key, stride] = _time_site(site, args[0], heads, shape)
                inside = False
            table[site.name] = known[key, stride]

        return hook

    handles = [s.module.register_forward_hook(watch(s)) for s in sites if not s.blocked]
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            run_batch(model, to_device(batch, device), TokenMask(), forward)
    finally:
        for handle in handles:
            handle.remove()
    return table


def _time_site(site: Site, x: Tensor, heads: int, shape: Shape) -> dict[int | None, float]:
    times: dict[int | None, float] = {None: clock(lambda: site.module(x), seconds=0.05)}
    ranks = sorted({max(1, site.full_rank * k // 16) for k in (1, 3, 6, 10)})
    for rank in ranks:
        layer = build_layer(
            site.module, rank, heads, gate=shape.gated, symmetric=shape.symmetric
        ).eval()
        times[rank] = clock(lambda layer=layer: layer(x), seconds=0.05)  # type: ignore[misc]
    return times
