"""The plan of an inheritance: what becomes of every layer, as a dictionary and as a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from pipeline.inherit.groups import describe, owner
from pipeline.inherit.sites import unsupported_modules

if TYPE_CHECKING:
    from pipeline.inherit.budget import Choice
    from pipeline.inherit.surgery import Job

SPECTRUM_POINTS = 64


@dataclass
class LayerPlan:
    """One heavy layer before and after.

    Attributes:
        name: full module name.
        kind: "conv", "linear" or "embedding".
        shape: shape of the dense weight.
        rank: rank of the inherited layer, None where it stays dense.
        heads: heads of the inherited layer, 0 where it stays dense.
        params_before: weights and bias of the dense layer.
        params_after: weights, bias and gate afterwards.
        macs_before: multiply-adds per sample in the teacher, None if no sample was run.
        macs_after: the same afterwards.
        reason: why the layer stayed dense, "" for an inherited one.
        energy: share of the output's energy that the rank keeps on the calibration data (of the
            weight's energy without calibration).
        error: relative squared error of the layer's output on the calibration data, where measured.
        spectrum: singular energies relative to their sum, for the plot.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int | None
    heads: int
    params_before: int
    params_after: int
    macs_before: float | None
    macs_after: float | None
    reason: str = ""
    energy: float | None = None
    error: float | None = None
    spectrum: list[float] = field(default_factory=list)


@dataclass
class Plan:
    """All layers, totals and what rebuilds the model.

    Attributes:
        arm: initialisation arm.
        budget: the budget as asked.
        unit: what the budget counts; of several groups, what the first one's does.
        total_before: parameters of the teacher, everything counted.
        total_after: parameters of the inherited model.
        towers: per tower the parameters before and after.
        layers: one entry per heavy layer.
        structure: entries that `rebuild` needs, in order.
        notes: unsupported modules, audit, calibration and other facts worth reporting.
    """

    arm: str
    budget: str
    unit: str
    total_before: int
    total_after: int
    macs_before: float | None
    macs_after: float | None
    towers: dict[str, dict[str, int]]
    layers: list[LayerPlan]
    structure: list[dict[str, Any]]
    notes: dict[str, Any] = field(default_factory=dict)

    def to_dict(self, *, spectra: bool = False) -> dict[str, Any]:
        """Return the plan as JSON-able values; the spectra are long and left out by default."""
        data = asdict(self)
        for layer in data["layers"]:
            layer["shape"] = list(layer["shape"])
            if not spectra:
                del layer["spectrum"]
        return data

    def table(self) -> str:
        """Return the plan as text: one line per heavy layer, then the totals."""
        head = (
            "layer",
            "kind",
            "shape",
            "rank",
            "heads",
            "params",
            "after",
            "MMACs",
            "after",
            "energy",
            "",
        )
        rows = [head, *(_row(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        text_columns = (0, 1, 10)
        lines = [
            "  ".join(
                cell.ljust(width) if i in text_columns else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        for tower, counts in self.towers.items():
            share = counts["after"] / max(counts["before"], 1)
            lines.append(
                f"{tower}: {counts['before']:,} -> {counts['after']:,} parameters ({share:.3f})"
            )
        for part in self.notes.get("groups", []):
            share = part["after"] / max(part["before"], 1)
            lines.append(
                f"budget {part['group']}: {part['before']:,} -> {part['after']:,} parameters "
                f"({share:.4f})"
            )
        share = self.total_after / max(self.total_before, 1)
        lines.append(
            f"total: {self.total_before:,} -> {self.total_after:,} parameters ({share:.4f})"
        )
        if self.macs_before and self.macs_after is not None:
            lines.append(
                f"multiply-adds per sample: {self.macs_before / 1e6:,.1f} M -> "
                f"{self.macs_after / 1e6:,.1f} M "
                f"({self.macs_after / self.macs_before:.4f})"
            )
        return "\n".join(lines)


def _row(layer: LayerPlan) -> tuple[str, ...]:
    return (
        layer.name,
        layer.kind,
        "x".join(map(str, layer.shape)),
        "dense" if layer.rank is None else str(layer.rank),
        str(layer.heads or "-"),
        f"{layer.params_before:,}",
        f"{layer.params_after:,}",
        _millions(layer.macs_before),
        _millions(layer.macs_after),
        "" if layer.energy is None else f"{layer.energy:.3f}",
        layer.reason,
    )


def _millions(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:,.2f}"


def tower_of(name: str, clip: bool) -> str:
    """Name the tower a parameter or module belongs to."""
    if not clip:
        return "model"
    return "visual" if name.startswith("visual.") else "text"


def make_plan(model: nn.Module, job: Job, choice: Choice) -> Plan:
    """Put the decisions into a plan, with totals per tower.

    Args:
        model: the teacher.
        job: the inheritance: sites, decompositions, arm.
        choice: the option of every considered layer.
    """
    clip = hasattr(model, "encode_text")
    towers: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        counts = towers.setdefault(tower_of(name, clip), {"before": 0, "after": 0})
        counts["before"] += parameter.numel()
        counts["after"] += parameter.numel()
    layers = [_layer_plan(job, site, choice) for site in job.sites]
    for layer in layers:
        counts = towers[tower_of(layer.name, clip)]
        counts["after"] += layer.params_after - layer.params_before
    notes: dict[str, Any] = {}
    if skipped := unsupported_modules(job.new):
        notes["unsupported"] = [
            {"name": name, "type": kind, "params": count, "reason": "no inherited layer: dense"}
            for name, kind, count in skipped
        ]
    if len(job.groups) > 1:
        notes["groups"] = _group_totals(job, layers)
    return Plan(
        arm=job.arm,
        budget=describe(job.groups),
        unit=job.groups[0].unit,
        total_before=sum(counts["before"] for counts in towers.values()),
        total_after=sum(counts["after"] for counts in towers.values()),
        macs_before=_sum(layer.macs_before for layer in layers),
        macs_after=_sum(layer.macs_after for layer in layers),
        towers=towers,
        layers=layers,
        structure=[],
        notes=notes,
    )


def _group_totals(job: Job, layers: list[LayerPlan]) -> list[dict[str, Any]]:
    """Return per group of the budget its parameters before and after."""
    totals = []
    for group in job.groups:
        before = job.group_parameters(group)
        own = [layer for layer in layers if owner(f"{layer.name}.weight", job.groups) is group]
        after = before + sum(layer.params_after - layer.params_before for layer in own)
        totals.append({"group": str(group), "before": before, "after": after})
    return totals


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _layer_plan(job: Job, site: Any, choice: Choice) -> LayerPlan:
    """Describe one site."""
    option = choice.get(site.name)
    rank = None if option is None else option.rank
    heads = 0 if option is None or rank is None else option.heads
    shape = job.shape
    after = site.dense_weights
    if rank is not None:
        after = site.rank_weights(rank, heads, shape.gated, shape.symmetric)
    energy, reason, spectrum = None, site.blocked, []
    if site.name in job.parts:
        energies = job.parts[site.name].energies.sum(dim=0)
        energies = energies / energies.sum().clamp_min(1e-30)
        energy = 1.0 if rank is None else float(energies[:rank].sum())
        step = max(1, len(energies) // SPECTRUM_POINTS)
        spectrum = energies[::step].tolist()
        if rank is None:
            reason = "dense is no dearer than the rank the budget gives"
    known = bool(site.positions)
    return LayerPlan(
        name=site.name,
        kind=site.kind,
        shape=site.shape,
        rank=rank,
        heads=heads,
        params_before=site.dense_weights + site.bias,
        params_after=after + site.bias,
        macs_before=site.macs_before if known else None,
        macs_after=site.macs(rank, max(heads, 1), shape.symmetric) if known else None,
        reason=reason,
        energy=energy,
        spectrum=spectrum,
    )
