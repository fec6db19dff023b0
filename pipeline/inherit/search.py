"""Budgets that have to be measured: milliseconds of this machine, fidelity of the embeddings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from data_prep.errors import UserError
from pipeline.inherit.allocate import choose, make_offers
from pipeline.inherit.budget import SOLVERS, Choice
from pipeline.inherit.calibrate import TokenMask, evaluating, run_batch, to_device
from pipeline.inherit.latency import compare_latency, layer_timings, model_latency
from pipeline.inherit.layers import build_layer
from pipeline.inherit.sensitivity import outputs_of
from pipeline.inherit.sites import set_module

if TYPE_CHECKING:
    from pipeline.inherit.surgery import Job

LATENCY_TOLERANCE = 0.05
ROUNDS = 6
FIDELITY_STEPS = 7


def solve_latency(job: Job, share: float) -> Choice:
    """Find ranks whose measured forward pass takes `share` of the teacher's time.

    Layer timings only rank the layers; after each solution the whole model is timed with empty
    layers of those ranks, in turns with the teacher, and the allowance is corrected.

    Raises:
        UserError: even rank 1 everywhere is slower than asked.
    """
    batch = job.data()[0]
    before = model_latency(job.teacher, batch, job.forward, seconds=1.0)
    timings = layer_timings(job.new, job.sites, batch, job.forward, job.losses, job.shape)
    offers = make_offers(job.sites, job.losses, "latency", job.shape, timings)
    dense = sum(timings[s.name][None] for s in job.sites if s.name in timings)
    fixed = max(before - dense, 0.0)
    allowed = share * before - fixed
    least = sum(min(o.cost for o in offer.options) for offer in offers)
    best: tuple[float, Choice] | None = None
    for _ in range(ROUNDS):
        choice = SOLVERS[job.allocator](offers, max(allowed, least * 1.0001))
        before, now = compare_latency(job.teacher, _hollow(job, choice), batch, job.forward)
        miss = now / before - share
        if best is None or abs(miss) < abs(best[0]):
            best = (miss, choice)
        if abs(miss) < LATENCY_TOLERANCE * share:
            break
        if allowed <= least and miss > 0:
            break
        allowed += (share - now / before) * before * 0.8
    assert best is not None
    if best[0] > 0.1 * share:
        raise UserError(
            f"the fastest plan found takes {best[0] + share:.2f} of the teacher's time",
            where=f"budget latency={share:g}",
            todo="allow more time, use fewer heads, or include more layers",
        )
    return best[1]


def _hollow(job: Job, choice: Choice) -> nn.Module:
    """Return the model a choice would give, with random factors: good for timing only."""
    model = copy.deepcopy(job.new)
    for site in job.sites:
        option = choice.get(site.name)
        if option is None or option.rank is None:
            continue
        layer = build_layer(
            site.module, option.rank, option.heads,
            gate=job.shape.gated, symmetric=job.shape.symmetric, mode=job.mode,
        )  # fmt: skip
        if hasattr(layer, "up") and isinstance(layer.up, nn.Parameter):
            nn.init.normal_(layer.up, std=layer.rank**-0.5)  # zeros might run faster than numbers
        set_module(model, site.name, layer)
    return model


def solve_fidelity(job: Job, floor: float, build: Callable[[Job, Choice], Any]) -> Choice:
    """Find the least share of parameters whose embeddings keep a mean cosine of `floor`.

    Raises:
        UserError: not even the dense model's neighbourhood reaches it.
    """
    references = [_features(job, job.teacher, batch) for batch in job.data()]
    offers = make_offers(job.sites, job.losses, "params", job.shape)
    dense = sum(site.dense_weights for site in job.sites if not site.blocked)
    fixed = 1 - dense / job.parameters
    least = sum(min(o.cost for o in offer.options) for offer in offers) / job.parameters + fixed
    low, high, best = least, 1.0, None
    for _ in range(FIDELITY_STEPS):
        middle = (low + high) / 2
        choice = choose(offers, job.sites, job.parameters, "params", middle, job.allocator)
        if _cosine(job, choice, build, references) >= floor:
            high, best = middle, choice
        else:
            low = middle
    if best is None:
        raise UserError(
            f"no inherited model keeps a cosine of {floor:g}",
            where=f"budget fidelity={floor:g}",
            todo="ask for less, or use one head",
        )
    return best


@torch.no_grad()
def _features(job: Job, model: nn.Module, batch: Any) -> list[torch.Tensor]:
    device = next(model.parameters()).device
    with evaluating(model):
        result = run_batch(model, to_device(batch, device), TokenMask(), job.forward)
    return [t.flatten(1) for t in outputs_of(model, result)[0]]


def _cosine(
    job: Job, choice: Choice, build: Callable[[Job, Choice], Any], references: list[Any]
) -> float:
    """Return the mean cosine between the outputs of a choice and the teacher's."""
    from pipeline.inherit.calibrate import reestimate_batchnorm

    trial = copy.copy(job)
    trial.new = copy.deepcopy(job.new)
    modules = dict(trial.new.named_modules())
    trial.sites = [copy.copy(site) for site in job.sites]
    for site in trial.sites:
        site.module = modules[site.name]
    for name, layer in build(trial, choice).layers.items():
        set_module(trial.new, name, layer)
    if job.arm in ("activation", "no_gate", "symmetric"):
        reestimate_batchnorm(trial.new, job.data(), job.forward)
    values = [
        torch.cosine_similarity(a, b, dim=-1).mean()
        for batch, reference in zip(job.data(), references, strict=True)
        for a, b in zip(_features(job, trial.new, batch), reference, strict=True)
    ]
    return float(torch.stack(values).mean())
