"""Walk a model, swap its heavy layers for inherited ones, audit the result.

In: a trained model, a budget, calibration batches. Out: a new model and the plan of what was done.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.errors import UserError
from pipeline.inherit import factorize
from pipeline.inherit.allocate import (
    Shape,
    balance_losses,
    choose,
    make_offers,
    structure_entry,
    tail_energies,
)
from pipeline.inherit.attention import expose_module
from pipeline.inherit.budget import SOLVERS, Choice
from pipeline.inherit.cache import fingerprint, load_moments, store_moments
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
from pipeline.inherit.groups import Budget, Group, describe, owner, parse_groups
from pipeline.inherit.layers import GateMode, build_layer
from pipeline.inherit.plan import Plan, make_plan
from pipeline.inherit.regression import Settings
from pipeline.inherit.search import solve_fidelity, solve_latency
from pipeline.inherit.sequential import default_arm, sequential_fit
from pipeline.inherit.sites import Site, expose, find_sites, set_module
from pipeline.inherit.valid import share_valid_tokens

AUDIT_TOLERANCE = 1e-5
DATA_UNITS = ("macs", "latency", "fidelity")


@dataclass
class Job:
    """One inheritance under way: the exposed copy of the teacher, its sites, the wishes."""

    teacher: nn.Module
    new: nn.Module
    sites: list[Site]
    structure: list[dict[str, Any]]
    batches: list[Any] | None
    forward: Forward | None
    arm: str
    shape: Shape
    mode: GateMode
    seed: int
    allocator: str
    shrinkage: float
    settings: Settings
    moments: dict[str, Moments] = field(default_factory=dict)
    parts: dict[str, Decomposition] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """Parameters of the teacher."""
        return sum(p.numel() for p in self.teacher.parameters())

    def group_of(self, site: Site) -> Group | None:
        """Return the part of the budget that a layer falls under, if any."""
        return owner(f"{site.name}.weight", self.groups)

    def group_parameters(self, group: Group) -> int:
        """Parameters of the teacher that belong to a group."""
        named = self.new.named_parameters()
        return sum(p.numel() for name, p in named if owner(name, self.groups) is group)

    def data(self) -> list[Any]:
        """Return the calibration batches of a job that needs them."""
        assert self.batches is not None
        return self.batches


def inherit(
    model: nn.Module,
    budget: Budget = "params=0.4",
    calibration: Any = None,
    heads: int | str = 3,
    arm: str | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    seed: int = 0,
    forward: Forward | None = None,
    *,
    allocator: str | None = None,
    gate: GateMode = "token",
    multiple: int | None = None,
    shrinkage: float = factorize.SHRINKAGE,
    batchnorm: bool | None = None,
    refit: Mapping[str, Any] | None = None,
    cache: str | Path | None = None,
) -> tuple[nn.Module, Plan]:
    """Return a smaller descendant of `model` and the plan of how it was made; `model` stays.

    Args:
        model: any module with Conv2d, Linear, Embedding or attention layers; a CLIP is recognised.
        budget: UNIT=SHARE of the teacher: `params`, `weights` (only of the layers considered),
            `macs`, `latency` (of the first calibration batch on this machine), `rank` (one fraction
            for all layers, none stays dense), or `fidelity`, the cosine the embeddings must keep.
            Groups of layers may have their own: {"visual.*": "params=0.6", "*": "params=0.4"};
            the first shell glob that matches a layer's name counts, and its share is one of that
            group's part of the teacher. A layer that no glob matches stays dense.
        calibration: a batch, an iterable of batches, or None. A CLIP's batch is a pair
            (images [B,3,S,S], tokens [B,L]).
        heads: heads per inherited layer; 1 has no gate; "auto" chooses 1 or 3 per layer.
        arm: initialisation, see docs/inheritance.md. None is "svd" without calibration data, else
            "sequential", or "activation" where one pass over all of it would need too much memory.
        include: shell globs on full module names; only these layers are inherited.
        exclude: shell globs; these stay dense. "sequential" still fits their weights anew, unless
            refit={"dense": False}.
        seed: of the head deviations, random starts and probes.
        forward: `forward(model, batch)`; by default a CLIP's two encoders, else `model(batch)`.
        allocator: "fraction", "energy", "sensitivity" or "balanced"; None is "balanced" where the
            arm uses calibration data, else "fraction".
        gate: gate of linear layers, "token" or "sequence".
        multiple: ranks are multiples of this; default 8 for layers of width 256 and more, else 1.
        shrinkage: λ of the moments.
        batchnorm: re-estimate BatchNorm statistics; default: where layers were cut independently.
        refit: keyword arguments of `regression.Settings` for the arm "sequential".
        cache: folder that keeps calibration moments by teacher and data.

    Raises:
        UserError: unusable budget, arm, weights, patterns or calibration data.
    """
    groups = parse_groups(budget)
    batches = None if calibration is None else as_batches(calibration)
    arm = arm or default_arm(batches)
    allocator = allocator or ("fraction" if arm in WEIGHT_ONLY else "balanced")
    count = _check(arm, heads, allocator)
    if batches is None and (
        arm not in WEIGHT_ONLY or any(group.unit in DATA_UNITS for group in groups)
    ):
        raise UserError(
            f"the arm {arm!r} with the budget {describe(groups)} needs calibration data",
            where="calibration",
            todo="give calibration batches; the arm 'svd' with params needs the weights alone",
        )
    new = copy.deepcopy(model)
    structure: list[dict[str, Any]] = list(expose(new, include, exclude))
    job = Job(
        model, new, find_sites(new, include, exclude), structure, batches, forward, arm,
        Shape(count, arm != "no_gate", arm == "symmetric", multiple), gate, seed, allocator,
        shrinkage, Settings(seed=seed, **(refit or {})),
    )  # fmt: skip
    job.groups = groups
    _claim(job)
    _analyse(job, None if cache is None else Path(cache))
    choice = _solve(job)
    plan = make_plan(model, job, choice)
    made = build_all(job, choice)
    for name, layer in made.layers.items():
        set_module(new, name, layer)
    share_valid_tokens(new)
    plan.structure = structure + made.entries
    plan.notes |= {"audit": made.audit, **made.notes}
    for entry in plan.layers:
        entry.error = made.errors.get(entry.name, entry.error)
    if batches is not None and (
        arm in ("activation", "no_gate", "symmetric") if batchnorm is None else batchnorm
    ):
        plan.notes["batchnorm"] = reestimate_batchnorm(new, batches, forward)
    plan.total_after = sum(p.numel() for p in new.parameters())
    return new, plan


def _check(arm: str, heads: int | str, allocator: str) -> int:
    """Refuse unknown names; return the heads as a number, 0 for "auto"."""
    if arm not in ARMS:
        raise UserError(f"unknown arm {arm!r}", where="arm", todo=f"one of {', '.join(ARMS)}")
    if allocator not in SOLVERS:
        raise UserError(
            f"unknown allocator {allocator!r}",
            where="allocator",
            todo=f"one of {', '.join(SOLVERS)}",
        )
    if heads == "auto":
        return 0
    if not isinstance(heads, int) or heads < 1:
        raise UserError(f"{heads!r} heads", where="heads", todo="a number from 1, or 'auto'")
    return heads


def _analyse(job: Job, cache: Path | None) -> None:
    """Collect moments, decompose every layer, and set what each rank loses."""
    wanted = job.arm not in WEIGHT_ONLY
    if job.batches is not None:
        batches = job.batches if wanted else job.batches[:1]
        key = "" if cache is None else fingerprint(job.new, job.sites, batches, f"moments {wanted}")
        known = None if cache is None else load_moments(cache, key, job.sites)
        if known is None:
            known = collect(job.new, job.sites, batches, job.forward, moments=wanted)
            if cache is not None:
                store_moments(cache, key, job.sites, known)
        job.moments = known
    for site in job.sites:
        if not site.blocked:
            # taken out, not looked up: a large model's moments take a gigabyte
            moments = job.moments.pop(site.name, None) if wanted else None
            job.parts[site.name] = decompose(site.matrix(), moments, job.shrinkage)
            job.losses[site.name] = tail_energies(job.parts[site.name])
    if job.allocator in ("sensitivity", "balanced"):
        from pipeline.inherit.sensitivity import loss_curves

        if job.batches is None:
            raise UserError("sensitivities need calibration data", where="allocator=sensitivity")
        job.losses = loss_curves(job.new, job.sites, job.parts, job.batches, job.forward, job.seed)
    if job.allocator == "balanced":
        job.losses = balance_losses(job.sites, job.losses)


def _claim(job: Job) -> None:
    """Leave layers dense that no group's glob matches.

    Raises:
        UserError: a group without any layer to inherit.
    """
    for site in job.sites:
        if job.group_of(site) is None:
            site.blocked = site.blocked or "no group of the budget matches its name"
    for group in job.groups:
        if not any(job.group_of(s) is group and not s.blocked for s in job.sites):
            raise UserError(
                "no layer is left to inherit in this group",
                where=f"budget {group}",
                todo="globs are matched in order on full module names such as 'visual.layer3.*'",
            )


def _solve(job: Job) -> Choice:
    """Choose the ranks for a budget in any unit."""
    unit, share = job.groups[0].unit, job.groups[0].share
    if unit == "latency":
        return solve_latency(job, share)
    if unit == "fidelity":
        return solve_fidelity(job, share, build_all)
    choice: Choice = {}
    for group in job.groups:
        sites = [site for site in job.sites if job.group_of(site) is group]
        offers = make_offers(sites, job.losses, group.unit, job.shape)
        choice |= choose(
            offers, sites, job.group_parameters(group), group.unit, group.share, job.allocator
        )
    return choice


@dataclass
class Made:
    """Built layers by name, their structure entries, the worst audit error and output errors."""

    layers: dict[str, nn.Module] = field(default_factory=dict)
    entries: list[dict[str, Any]] = field(default_factory=list)
    audit: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def build_all(job: Job, choice: Choice) -> Made:
    """Build every layer that a choice inherits; of the model only BatchNorm means change."""
    made = Made()
    generator = torch.Generator().manual_seed(job.seed)

    def build(site: Site, pair: tuple[Tensor, Tensor]) -> nn.Module:
        option = choice.get(site.name)
        if option is None or option.rank is None:
            return _dense(site, pair)
        layer = build_layer(
            site.module, option.rank, option.heads,
            gate=job.shape.gated, symmetric=job.shape.symmetric, mode=job.mode,
        )  # fmt: skip
        fill_layer(layer, site, pair, job.arm, generator)
        made.audit = max(made.audit, audit(layer, pair, site, job.arm))
        return layer

    chosen = [s for s in job.sites if s.name in choice and choice[s.name].rank is not None]
    ranks = {site.name: choice[site.name].rank or 0 for site in chosen}
    refitted: set[str] = set()
    if job.arm == "sequential":
        # a lookup's input is exact: its best map is the plain one
        fitted = {s.name: ranks[s.name] for s in chosen if s.kind != "embedding"}
        if job.settings.dense:  # a layer that stays dense can repair too, at no cost
            fitted |= {s.name: s.full_rank for s in job.sites if _refits_dense(s, choice)}
        first = {s.name: build(s, _plain(job, s, ranks)) for s in chosen if s.kind == "embedding"}
        done = sequential_fit(
            job.new, job.sites, fitted, job.data(), job.forward,
            lambda site, fit: build(site, (fit.up, fit.down)), job.settings, given=first,
        )  # fmt: skip
        made.layers |= {**first, **done.layers}
        made.errors = {name: fit.error for name, fit in done.fits.items()}
        refitted = set(made.layers)
    for site in chosen:
        if site.name not in refitted:
            made.layers[site.name] = build(site, _plain(job, site, ranks))
        entry = structure_entry(site, choice[site.name], job.shape, job.mode)
        made.entries.append(entry)
    return made


def _refits_dense(site: Site, choice: Choice) -> bool:
    """Whether a layer that stays dense may be fitted anew: it runs, alone with its weight."""
    if site.kind == "embedding":
        return False
    return site.blocked == "excluded" or (site.name in choice and choice[site.name].rank is None)


@torch.no_grad()
def _dense(site: Site, pair: tuple[Tensor, Tensor]) -> nn.Module:
    """Return a copy of a dense layer with another weight."""
    forward = site.module.__dict__.pop("forward", None)  # that of the pass that is fitting it
    layer = copy.deepcopy(site.module)
    if forward is not None:
        site.module.forward = forward
    layer._forward_hooks.clear()
    layer._forward_pre_hooks.clear()
    weight = layer.weight
    assert isinstance(weight, Tensor)
    weight.copy_((pair[0] @ pair[1]).reshape(weight.shape))
    return layer


def _plain(job: Job, site: Site, ranks: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """Return the factors of a layer cut on its own."""
    return factors(site.matrix(), job.parts[site.name], ranks[site.name])


def audit(layer: nn.Module, pair: tuple[Tensor, Tensor], site: Site, arm: str) -> float:
    """Compare a layer's dense equivalent with the intended rank-r map; return the relative error.

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
    norm = float(intended.norm())
    error = float((actual - intended).norm()) / max(norm, 1e-30)
    if error > AUDIT_TOLERANCE and norm > 1e-20:
        raise RuntimeError(f"{site.name}: differs from its intended map by {error:.2e}")
    return error


def rebuild(model: nn.Module, structure: Iterable[Mapping[str, Any]]) -> None:
    """Replace, in place, the dense modules of a fresh model by empty inherited ones.

    Args:
        model: the dense architecture.
        structure: a plan's structure.

    Raises:
        UserError: the structure does not fit this architecture.
    """
    for entry in structure:
        name, kind = str(entry["name"]), str(entry["kind"])
        mismatch = "the checkpoint and its architecture do not belong together"
        try:
            dense = model.get_submodule(name)
        except AttributeError as error:
            raise UserError(
                f"the architecture has no layer {name!r}", where="structure", todo=mismatch
            ) from error
        try:
            if kind in ("attention", "clip_attention", "attention_pool"):
                set_module(model, name, expose_module(dense, kind))
                continue
            options = {key: entry[key] for key in ("gate", "symmetric", "mode") if key in entry}
            layer = build_layer(dense, int(entry["rank"]), int(entry["heads"]), **options)
            if layer.kind != kind:
                raise TypeError(f"it is a {layer.kind} layer")
            set_module(model, name, layer)
        except (TypeError, ValueError, AttributeError, KeyError, AssertionError) as error:
            raise UserError(
                f"the structure asks for {kind!r} in place of {type(dense).__name__}: {error}",
                where=name,
                todo=mismatch,
            ) from error
    share_valid_tokens(model)
