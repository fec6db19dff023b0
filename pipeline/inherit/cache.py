"""Calibration moments on disk, by teacher and data: the slow part is done once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.files import atomic_path
from pipeline.inherit.factorize import Moments
from pipeline.inherit.sites import Site

FORMAT = 1


def fingerprint(model: nn.Module, sites: Sequence[Site], batches: Sequence[Any], extra: str) -> str:
    """Return a hash of the weights, the considered layers and the calibration tensors."""
    digest = hashlib.sha256(f"{FORMAT} {extra}".encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(_bytes(value))
    digest.update(repr([(s.name, s.blocked) for s in sites]).encode())
    for batch in batches:
        for part in [batch] if isinstance(batch, Tensor) else batch:
            if isinstance(part, Tensor):
                digest.update(repr(tuple(part.shape)).encode())
                digest.update(_bytes(part))
    return digest.hexdigest()


def _bytes(value: Tensor) -> Any:
    flat = value.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy() if flat.numel() else b""


def load_moments(folder: Path, key: str, sites: Sequence[Site]) -> dict[str, Moments] | None:
    """Return cached moments and set the sites' positions, or None if there are none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / f"{key}.safetensors"
    try:
        stored = load_file(path)
    except (FileNotFoundError, SafetensorError):
        return None  # absent or damaged: measured again and written over
    device = {site.name: site.module.weight.device for site in sites}
    moments: dict[str, Moments] = {}
    for site in sites:
        name = site.name
        if f"{name}|info" not in stored:
            continue
        count, site.positions, site.positions_before, ran = stored[f"{name}|info"].tolist()
        if not ran:
            site.blocked = site.blocked or "its forward never ran: unused, or read directly"
        if f"{name}|power" in stored:
            parts = [stored.get(f"{name}|{part}") for part in ("inputs", "outputs", "power")]
            inputs, outputs, power = (
                None if part is None else part.to(device[name])  # type: ignore[arg-type]
                for part in parts
            )
            assert power is not None
            moments[name] = Moments(inputs, outputs, power, count)
    return moments


def store_moments(
    folder: Path, key: str, sites: Sequence[Site], moments: dict[str, Moments]
) -> None:
    """Write moments and positions under `key`."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for site in sites:
        known = moments.get(site.name)
        ran = 0.0 if site.blocked.startswith("its forward never ran") else 1.0
        count = known.count if known else 0.0
        tensors[f"{site.name}|info"] = torch.tensor(
            [count, site.positions, site.positions_before, ran], dtype=torch.float64
        )
        if known:
            parts = {"inputs": known.inputs, "outputs": known.outputs, "power": known.input_power}
            for part, value in parts.items():
                if value is not None:
                    tensors[f"{site.name}|{part}"] = value.cpu().contiguous()
    with atomic_path(folder / f"{key}.safetensors") as path:
        save_file(tensors, path)
