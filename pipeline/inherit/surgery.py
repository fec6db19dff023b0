"""Walk a model, swap its heavy layers for inherited ones, audit the result.

In: a trained model, a budget, calibration batches. Out: a new model and the plan of what was done.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from data_prep.errors import UserError
from pipeline.inherit import factorize
from pipeline.inherit.attention import expose_module
from pipeline.inherit.budget import SOLVERS, Choice, Offer, Option, fraction_choice, make_offer
from pipeline.inherit.calibrate import Forward, as_batches, collect, reestimate_batchnorm
from pipeline.inherit.factorize import (
    ARMS,
    WEIGHT_ONLY,
    Decomposition,
    Moments,
    decompose,
    factors,
    fill_layer,
)
from pipeline.inherit.layers import GateMode, build_layer
from pipeline.inherit.plan import LayerPlan, Plan
from pipeline.inherit.sites import Site, expose, find_sites, set_module, unsupported_modules

AUDIT_TOLERANCE = 1e-5
UNITS = ("params", "weights", "macs", "rank")


def parse_budget(text: str) -> tuple[str, float]:
    """Split `params=0.4` into its unit and its share.

    Raises:
        UserError: unknown unit, or a share that is not in (0, 1].
    """
    unit, _, value = text.partition("=")
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if unit not in UNITS or not 0.0 < share <= 1.0:
        raise UserError(
            f"{text!r} is not a budget",
            where="budget",
            todo=f"write UNIT=SHARE with UNIT one of {', '.join(UNITS)} and a share above 0, at most 1",
        )
    return unit, share


def inherit(
    model: nn.Module,
    budget: str = "params=0.4",
    calibration: Any = None,
    heads: int = 3,
    arm: str = "activation",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    seed: int = 0,
    forward: Forward | None = None,
    *,
    allocator: str = "fraction",
    gate: GateMode = "token",
    multiple: int | None = None,
    shrinkage: float = factorize.SHRINKAGE,
    batchnorm: bool | None = None,
) -> tuple[nn.Module, Plan]:
    """Return a smaller descendant of `model` and the plan of how it was made; `model` stays as it was.

    Args:
        model: any module with Conv2d, Linear, Embedding or attention layers; a CLIP is recognised.
        budget: `params`, `weights` (of the layers considered only), `macs` or `rank`, as a share of the teacher.
        calibration: one batch, an iterable of batches, or None. A CLIP's batch is (images [B,3,S,S], tokens [B,L]).
        heads: heads per inherited layer; 1 has no gate.
        arm: initialisation, see docs/inheritance.md.
        include: shell globs on full module names; only these layers are inherited.
        exclude: shell globs; these stay dense.
        seed: of the head deviations and random starts.
        forward: `forward(model, batch)`; by default a CLIP's two encoders, else `model(batch)`.
        allocator: how ranks are chosen within the budget.
        gate: gate of linear layers, "token" or "sequence".
        multiple: ranks are multiples of this; default 8 for layers of width 256 and more, else 1.
        shrinkage: λ of the moments.
        batchnorm: re-estimate BatchNorm statistics; default: whenever there is calibration data.

    Raises:
        UserError: unusable budget, arm, weights, patterns or calibration data.
    """
    _check(arm, heads, allocator)
    unit, share = parse_budget(budget)
    batches = None if calibration is None else as_batches(calibration)
    if batches is None and arm not in WEIGHT_ONLY:
        raise UserError(
            f"the arm {arm!r} needs calibration data",
            where="calibration",
            todo="give calibration batches, or choose the arm 'svd', which uses the weights alone",
        )
    if batches is None and unit == "macs":
        batches_needed = UserError(
            "a budget in multiply-adds needs at least one batch",
            where="calibration",
            todo="give one batch",
        )
        raise batches_needed
    new = copy.deepcopy(model)
    structure: list[dict[str, Any]] = list(expose(new, include, exclude))
    sites = find_sites(new, include, exclude)
    moments: dict[str, Moments] = {}
    if batches is not None:
        wanted = arm not in WEIGHT_ONLY
        moments = collect(new, sites, batches if wanted else batches[:1], forward, moments=wanted)
    parts = {
        site.name: decompose(site.matrix(), moments.get(site.name), shrinkage)
        for site in sites
        if not site.blocked
    }
    gated = arm != "no_gate"
    symmetric = arm == "symmetric"
    offers = [
        _offer(site, parts[site.name], unit, heads, multiple, gated, symmetric)
        for site in sites
        if not site.blocked
    ]
    choice = _choose(offers, sites, model, unit, share, allocator)
    plan = _make_plan(model, new, sites, choice, parts, arm, budget, unit, gated, symmetric)
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for site in sites:
        option = choice.get(site.name)
        if option is None or option.rank is None:
            continue
        layer = build_layer(
            site.module, option.rank, option.heads, gate=gated, symmetric=symmetric, mode=gate
        )
        pair = factors(site.matrix(), parts.pop(site.name), option.rank)
        fill_layer(layer, site, pair, arm, generator)
        worst = max(worst, _audit(layer, pair, site, arm))
        set_module(new, site.name, layer)
        structure.append(_structure_entry(site, option, gated, symmetric, gate))
    plan.structure = structure
    plan.notes["audit"] = worst
    if batches is not None and (arm not in WEIGHT_ONLY if batchnorm is None else batchnorm):
        plan.notes["batchnorm"] = reestimate_batchnorm(new, batches, forward)
    plan.total_after = sum(p.numel() for p in new.parameters())
    return new, plan


def _check(arm: str, heads: int, allocator: str) -> None:
    """Refuse unknown names."""
    if arm not in ARMS:
        raise UserError(f"unknown arm {arm!r}", where="arm", todo=f"one of {', '.join(ARMS)}")
    if allocator not in SOLVERS:
        raise UserError(
            f"unknown allocator {allocator!r}",
            where="allocator",
            todo=f"one of {', '.join(SOLVERS)}",
        )
    if heads < 1:
        raise UserError(f"{heads} heads", where="heads", todo="at least 1")


def _offer(
    site: Site,
    parts: Decomposition,
    unit: str,
    heads: int,
    multiple: int | None,
    gated: bool,
    symmetric: bool,
) -> Offer:
    """Describe what each rank of a layer costs and what energy it loses."""
    energies = parts.energies.sum(dim=0)
    energies = energies / energies.sum().clamp_min(1e-30)
    tail = energies.flip(0).cumsum(0).flip(0).tolist() + [0.0]
    heads = 1 if site.kind == "embedding" else heads
    if multiple is None:
        multiple = 8 if min(site.width_in, site.width_out) >= 256 else 1

    def cost(rank: int) -> float:
        if unit == "macs":
            return site.macs(rank, heads, symmetric)
        return site.rank_weights(rank, heads, gated, symmetric)

    # a layer that costs nothing dense (a lookup, counted in multiply-adds) stays dense
    dense = site.macs(None, 1) if unit == "macs" else site.dense_weights
    return make_offer(
        site.name,
        site.full_rank,
        cost,
        dense,
        tail,
        heads=heads,
        multiple=multiple,
        force=unit == "rank",
    )


def _choose(
    offers: Sequence[Offer],
    sites: Sequence[Site],
    model: nn.Module,
    unit: str,
    share: float,
    allocator: str,
) -> Choice:
    """Turn a share of the teacher into what the considered layers may cost, and solve."""
    if unit == "rank":
        return fraction_choice(offers, share)
    considered = [site for site in sites if not site.blocked]
    dense = float(sum(site.dense_weights for site in considered))
    allowed = share * dense
    if unit == "params":
        everything = sum(p.numel() for p in model.parameters())
        allowed = share * everything - (everything - dense)
    elif unit == "macs":
        everything_macs = sum(site.macs_before for site in sites)
        fixed = sum(site.macs_before for site in sites if site.blocked)
        allowed = share * everything_macs - fixed
    return SOLVERS[allocator](offers, allowed)


def _audit(
    layer: nn.Module, pair: tuple[torch.Tensor, torch.Tensor], site: Site, arm: str
) -> float:
    """Compare the layer's dense equivalent with the intended rank-r map; return the relative error.

    Raises:
        RuntimeError: it differs by more than 1e-5, which is a bug.
    """
    if arm == "random":
        return 0.0
    intended = (pair[0] @ pair[1]).reshape(-1, site.width_in)
    if arm == "paper":
        intended = intended / layer.heads  # type: ignore[operator]
    actual = layer.intended().detach().double()  # type: ignore[operator]
    actual = actual.T if site.kind == "embedding" else actual.reshape(intended.shape)
    error = float((actual - intended).norm() / intended.norm().clamp_min(1e-30))
    if error > AUDIT_TOLERANCE and float(intended.norm()) > 1e-20:
        raise RuntimeError(
            f"{site.name}: the inherited layer differs from its rank-r map by {error:.2e}"
        )
    return error


def _structure_entry(
    site: Site, option: Option, gated: bool, symmetric: bool, mode: str
) -> dict[str, Any]:
    """Describe an inherited layer for `rebuild`."""
    entry: dict[str, Any] = {
        "name": site.name,
        "kind": site.kind,
        "rank": option.rank,
        "heads": option.heads,
    }
    if site.kind != "embedding":
        entry |= {"gate": gated, "symmetric": symmetric}
    if site.kind == "linear":
        entry["mode"] = mode
    return entry


def tower_of(name: str, clip: bool) -> str:
    """Name the tower a parameter or module belongs to."""
    if not clip:
        return "model"
    return "visual" if name.startswith("visual.") else "text"


def _make_plan(
    model: nn.Module,
    new: nn.Module,
    sites: Sequence[Site],
    choice: Choice,
    parts: Mapping[str, Decomposition],
    arm: str,
    budget: str,
    unit: str,
    gated: bool,
    symmetric: bool,
) -> Plan:
    """Put the decisions into a plan, with totals per tower."""
    clip = hasattr(model, "encode_text")
    known = any(site.positions for site in sites)
    layers = []
    towers: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        counts = towers.setdefault(tower_of(name, clip), {"before": 0, "after": 0})
        counts["before"] += parameter.numel()
        counts["after"] += parameter.numel()
    for site in sites:
        option = choice.get(site.name)
        rank = None if option is None else option.rank
        heads = 0 if option is None or rank is None else option.heads
        after = (
            site.dense_weights if rank is None else site.rank_weights(rank, heads, gated, symmetric)
        )
        reason = site.blocked
        energy = None
        if site.name in parts:
            energies = parts[site.name].energies.sum(dim=0)
            energy = (
                1.0
                if rank is None
                else float(energies[:rank].sum() / energies.sum().clamp_min(1e-30))
            )
            if rank is None:
                reason = "the factored form would not be smaller at the rank the budget gives"
        towers[tower_of(site.name, clip)]["after"] += after - site.dense_weights
        layers.append(
            LayerPlan(
                site.name,
                site.kind,
                site.shape,
                rank,
                heads,
                site.dense_weights + site.bias,
                after + site.bias,
                site.macs_before if known else None,
                site.macs(rank, max(heads, 1), symmetric) if known else None,
                reason,
                energy,
            )  # fmt: skip
        )
    macs = [layer.macs_before for layer in layers if layer.macs_before is not None]
    macs_after = [layer.macs_after for layer in layers if layer.macs_after is not None]
    notes: dict[str, Any] = {}
    if skipped := unsupported_modules(new):
        notes["unsupported"] = [
            {
                "name": name,
                "type": kind,
                "params": count,
                "reason": "no inherited layer; stays dense",
            }
            for name, kind, count in skipped
        ]
    return Plan(
        arm, budget, unit,
        sum(counts["before"] for counts in towers.values()),
        sum(counts["after"] for counts in towers.values()),
        sum(macs) if known else None,
        sum(macs_after) if known else None,
        towers, layers, [], notes,
    )  # fmt: skip


def rebuild(model: nn.Module, structure: Iterable[Mapping[str, Any]]) -> None:
    """Replace, in place, the dense modules of a fresh model by empty inherited ones, as a plan's structure says.

    Raises:
        UserError: the structure does not fit this architecture.
    """
    for entry in structure:
        name, kind = str(entry["name"]), str(entry["kind"])
        try:
            dense = model.get_submodule(name)
        except AttributeError as error:
            raise UserError(
                f"the structure names a layer {name!r} that the architecture does not have",
                where="structure",
                todo="the checkpoint and its architecture do not belong together",
            ) from error
        try:
            if kind in ("attention", "clip_attention", "attention_pool"):
                set_module(model, name, expose_module(dense, kind))
                continue
            options = {key: entry[key] for key in ("gate", "symmetric", "mode") if key in entry}
            set_module(
                model, name, build_layer(dense, int(entry["rank"]), int(entry["heads"]), **options)
            )
        except (TypeError, ValueError, AttributeError, KeyError, AssertionError) as error:
            raise UserError(
                f"the structure asks for {kind!r} in place of {type(dense).__name__}: {error}",
                where=name,
                todo="the checkpoint and its architecture do not belong together",
            ) from error
