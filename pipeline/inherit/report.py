"""An inheritance on paper: the plan as JSON and text, and its spectra as a figure."""

from __future__ import annotations

import json
from pathlib import Path

from data_prep.files import atomic_path, atomic_write
from pipeline.inherit.plan import Plan

COLUMNS = 6


def write_report(plan: Plan, folder: Path) -> list[Path]:
    """Write `plan.json` (spectra included), `plan.txt` and `spectra.png`; return their paths."""
    paths = [folder / "plan.json", folder / "plan.txt", folder / "spectra.png"]
    atomic_write(paths[0], json.dumps(plan.to_dict(spectra=True), indent=1) + "\n")
    atomic_write(paths[1], plan.table() + "\n")
    draw_spectra(plan, paths[2])
    return paths


def draw_spectra(plan: Plan, path: Path) -> None:
    """Draw, layer by layer, the energy left over at each rank, and where the layer was cut."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = [layer for layer in plan.layers if layer.spectrum]
    rows = max(1, -(-len(layers) // COLUMNS))
    figure = Figure(figsize=(2.4 * COLUMNS, 1.6 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, COLUMNS, squeeze=False)
    for ax in axes.flat[len(layers) :]:
        ax.axis("off")
    for ax, layer in zip(axes.flat, layers, strict=False):
        count = len(layer.spectrum)
        ax.semilogy([i / count for i in range(count)], [max(v, 1e-9) for v in layer.spectrum])
        if layer.rank is not None:
            full = min(layer.shape[0], _columns(layer.shape))
            ax.axvline(layer.rank / full, color="tab:red", linewidth=1)
        kept = "dense" if layer.rank is None else f"rank {layer.rank}"
        ax.set_title(f"{layer.name}\n{kept}", fontsize=6)
        ax.set_xlim(0, 1)
        ax.tick_params(labelsize=5)
    figure.suptitle("Energy of each direction against its place in full rank; red: the cut")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _columns(shape: tuple[int, ...]) -> int:
    columns = 1
    for size in shape[1:]:
        columns *= size
    return columns
