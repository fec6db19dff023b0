"""Heads that always mix alike are one head: find gates that do not move and merge them.

Input-dependent gates forbid merging exactly; a gate that is nearly constant on calibration data
allows it at the price of a small, measured drift. The same merge turns inherited layers into dense
ones for export.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.inherit.attention import ExposedAttention, ExposedClipAttention
from pipeline.inherit.calibrate import (
    Forward,
    TokenMask,
    as_batches,
    evaluating,
    run_batch,
    to_device,
)
from pipeline.inherit.layers import InheritedConv2d, InheritedEmbedding, InheritedLinear
from pipeline.inherit.sensitivity import drift

CONSTANT = 0.01  # a gate whose weights vary by less than this (standard deviation) is constant


def _gated(model: nn.Module) -> dict[str, InheritedConv2d | InheritedLinear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, InheritedConv2d | InheritedLinear) and module.gate is not None
    }


def gate_statistics(
    model: nn.Module, calibration: Any, forward: Forward | None = None
) -> dict[str, tuple[Tensor, float]]:
    """Return per gated layer its mean gate [H] and the largest standard deviation over the data.

    Padding tokens do not count.
    """
    sums: dict[str, list[Tensor]] = {}
    mask = TokenMask()

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            gates = output.detach().double().softmax(dim=-1)
            valid = mask.current
            if valid is not None and gates.shape[:2] == valid.shape:
                gates = gates[valid]
            rows = gates.reshape(-1, gates.shape[-1])
            parts = [rows.sum(dim=0), rows.square().sum(dim=0), torch.tensor(float(rows.shape[0]))]
            known = sums.get(name)
            sums[name] = (
                parts if known is None else [a + b for a, b in zip(known, parts, strict=True)]
            )

        return hook

    handles = []
    for name, layer in _gated(model).items():
        assert layer.gate is not None
        handles.append(layer.gate.register_forward_hook(watch(name)))
    try:
        _run(model, as_batches(calibration), mask, forward)
    finally:
        for handle in handles:
            handle.remove()
    result = {}
    for name, (total, squares, count) in sums.items():
        mean = total / count
        spread = (squares / count - mean.square()).clamp_min(0).sqrt().max()
        result[name] = (mean, float(spread))
    return result


def _run(
    model: nn.Module, batches: Sequence[Any], mask: TokenMask, forward: Forward | None
) -> list[Any]:
    device = next(model.parameters()).device
    with evaluating(model):
        return [run_batch(model, to_device(batch, device), mask, forward) for batch in batches]


def collapse(
    model: nn.Module,
    structure: list[dict[str, Any]],
    calibration: Any,
    *,
    threshold: float = CONSTANT,
    forward: Forward | None = None,
) -> dict[str, Any]:
    """Merge, in place, the heads of every layer whose gate hardly moves; update the structure.

    Args:
        model: an inherited model.
        structure: its structure entries, changed in place to one head.
        calibration: batches on which gates and drift are measured.
        threshold: largest standard deviation of a gate that counts as constant.
        forward: how to run a batch.

    Returns:
        "merged" (name -> spread), "kept" (name -> spread), and "drift" of the outputs.
    """
    batches = as_batches(calibration)
    before = _run(model, batches, TokenMask(), forward)
    entries = {entry["name"]: entry for entry in structure}
    merged, kept = {}, {}
    for name, (mean, spread) in gate_statistics(model, batches, forward).items():
        layer = model.get_submodule(name)
        assert isinstance(layer, InheritedConv2d | InheritedLinear)
        if spread > threshold or layer.symmetric:
            kept[name] = spread
            continue
        merged[name] = spread
        up = (mean.to(layer.up)[:, None, None] * layer.up.detach()).sum(dim=0, keepdim=True)
        layer.up, layer.gate, layer.heads = nn.Parameter(up), None, 1
        if name in entries:
            entries[name]["heads"] = 1
    after = _run(model, batches, TokenMask(), forward)
    drifts = [drift(model, a, b) for a, b in zip(after, before, strict=True)]
    return {"merged": merged, "kept": kept, "drift": sum(drifts) / len(drifts)}


def dense_state(model: nn.Module, names: set[str]) -> dict[str, Tensor]:
    """Return the state of the dense architecture that this model equals under uniform gates.

    Args:
        model: an inherited model.
        names: keys of the dense architecture's state.
    """
    state = {k: v for k, v in model.state_dict().items() if k in names}
    for name, module in model.named_modules():
        if isinstance(module, InheritedConv2d | InheritedLinear | InheritedEmbedding):
            state[f"{name}.weight"] = _uniform(module)
            bias = getattr(module, "bias", None)
            if bias is not None:
                state[f"{name}.bias"] = bias.detach()
    for name, module in model.named_modules():
        if isinstance(module, ExposedAttention | ExposedClipAttention):
            dense = module.in_proj
            weight = _uniform(dense) if isinstance(dense, InheritedLinear) else dense.weight
            state[f"{name}.in_proj_weight"] = weight.detach()
            if dense.bias is not None:
                state[f"{name}.in_proj_bias"] = dense.bias.detach()
    return {key: value for key, value in state.items() if key in names}


def _uniform(layer: InheritedConv2d | InheritedLinear | InheritedEmbedding) -> Tensor:
    """Return the dense weight of a layer at its gate's resting point (no input)."""
    if isinstance(layer, InheritedEmbedding) or layer.gate is None or layer.symmetric:
        return layer.intended().detach()
    gates = layer.gate.bias.detach().softmax(dim=0)
    up = (gates[:, None, None] * layer.up.detach()).sum(dim=0)
    if isinstance(layer, InheritedLinear):
        return up @ layer.down.weight.detach()
    down = layer.down.weight.detach().unflatten(0, (layer.groups, -1))
    return torch.einsum("gor,grikl->goikl", up.unflatten(0, (layer.groups, -1)), down).flatten(0, 1)
