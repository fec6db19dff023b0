"""From a budget to a rank for every layer of a real model: what options cost and lose.

budget.py solves with numbers; here they are measured or derived: parameters, multiply-adds,
milliseconds; energy or the drift of the network's outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipeline.inherit.budget import SOLVERS, Choice, Offer, Option, fraction_choice, make_offer
from pipeline.inherit.factorize import Decomposition
from pipeline.inherit.sites import Site

EVENNESS = 1.0
WIDE = 256  # layers at least this wide get ranks that are multiples of 8


@dataclass(frozen=True)
class Shape:
    """How inherited layers are built: heads (0 means per layer), gate, symmetric, rank multiple."""

    heads: int
    gated: bool
    symmetric: bool
    multiple: int | None
    most_heads: int = 3


def tail_energies(parts: Decomposition) -> list[float]:
    """Return the share of a layer's energy that rank 0, 1, ..., full loses."""
    energies = parts.energies.sum(dim=0)
    energies = energies / energies.sum().clamp_min(1e-30)
    return [*energies.flip(0).cumsum(0).flip(0).tolist(), 0.0]


def balance_losses(
    sites: Sequence[Site], losses: Mapping[str, Sequence[float]], evenness: float = EVENNESS
) -> dict[str, list[float]]:
    """Return loss curves plus a convex term that pulls all layers towards one rank fraction.

    The measured curves know the layers one by one, to first order; cut together, layers err
    together. The added term is least when every layer keeps the same fraction of its rank, and
    at half rank everywhere it weighs `evenness` times the sum of the measured losses.
    """
    considered = [site for site in sites if not site.blocked]
    dense = sum(site.dense_weights for site in considered)
    half = sum(losses[site.name][site.full_rank // 2] for site in considered)
    balanced = {}
    for site in considered:
        weight = evenness * half * 4 * site.dense_weights / dense
        curve = losses[site.name]
        full = site.full_rank
        balanced[site.name] = [v + weight * (1 - r / full) ** 2 for r, v in enumerate(curve)]
    return balanced


def heads_for(site: Site, losses: Sequence[float], shape: Shape) -> int:
    """Return the heads of one layer; with `heads=0` more than one only where they cost little.

    A layer gets `most_heads` if, at half of its dense cost, the rank they leave loses at most 1.25
    times the energy that one head's rank would.
    """
    if site.kind == "embedding":
        return 1
    if shape.heads:
        return shape.heads
    half = site.dense_weights / 2

    def reach(heads: int) -> int:
        per_rank = site.rank_weights(1, heads, shape.gated, shape.symmetric)
        return min(int(half // per_rank), site.full_rank)

    one, many = losses[reach(1)], losses[reach(shape.most_heads)]
    return shape.most_heads if many <= 1.25 * one + 1e-4 else 1


def make_offers(
    sites: Sequence[Site],
    losses: Mapping[str, Sequence[float]],
    unit: str,
    shape: Shape,
    timings: Mapping[str, Mapping[int | None, float]] | None = None,
) -> list[Offer]:
    """List every considered layer's options in the budget's unit."""
    offers = []
    for site in sites:
        if site.blocked:
            continue
        heads = heads_for(site, losses[site.name], shape)
        multiple = shape.multiple
        if multiple is None:
            multiple = 8 if min(site.width_in, site.width_out) >= WIDE else 1
        table = None if timings is None else timings[site.name]

        def cost(
            rank: int,
            site: Site = site,
            heads: int = heads,
            table: Mapping[int | None, float] | None = table,
        ) -> float:
            if table is not None:
                return interpolate(table, rank)
            if unit == "macs":
                return site.macs(rank, heads, shape.symmetric)
            return site.rank_weights(rank, heads, shape.gated, shape.symmetric)

        dense: float = site.dense_weights
        if table is not None:
            dense = table[None]
        elif unit == "macs":
            dense = site.macs(None, 1)  # a lookup costs nothing: it stays dense
        offers.append(
            make_offer(
                site.name, site.full_rank, cost, dense, losses[site.name],
                heads=heads, multiple=multiple, force=unit == "rank",
            )
        )  # fmt: skip
    return offers


def interpolate(table: Mapping[int | None, float], rank: int) -> float:
    """Read a value between the measured ranks of a table, linearly; beyond its ends, its slope."""
    ranks = sorted(r for r in table if r is not None)
    if len(ranks) == 1:
        return table[ranks[0]]
    low, high = ranks[0], ranks[1]
    for left, right in pairwise(ranks):
        low, high = left, right
        if rank <= right:
            break
    slope = (table[high] - table[low]) / (high - low)
    return max(table[low] + slope * (rank - low), 1e-9)


def allowance(sites: Sequence[Site], parameters: int, unit: str, share: float) -> float:
    """Return what the considered layers may cost so that the whole meets `share` of the teacher."""
    considered = [site for site in sites if not site.blocked]
    dense = float(sum(site.dense_weights for site in considered))
    if unit == "params":
        return share * parameters - (parameters - dense)
    if unit == "macs":
        everything = sum(site.macs_before for site in sites)
        return share * everything - sum(site.macs_before for site in sites if site.blocked)
    return share * dense


def choose(
    offers: Sequence[Offer],
    sites: Sequence[Site],
    parameters: int,
    unit: str,
    share: float,
    allocator: str,
) -> Choice:
    """Solve a budget in params, weights, macs or rank.

    Raises:
        UserError: even rank 1 everywhere exceeds it.
    """
    if unit == "rank":
        return fraction_choice(offers, share)
    return SOLVERS[allocator](offers, allowance(sites, parameters, unit, share))


def structure_entry(site: Site, option: Option, shape: Shape, mode: str) -> dict[str, object]:
    """Describe an inherited layer for `rebuild`."""
    entry: dict[str, object] = {"name": site.name, "kind": site.kind}
    entry |= {"rank": option.rank, "heads": option.heads}
    if site.kind != "embedding":
        entry |= {"gate": shape.gated, "symmetric": shape.symmetric}
    if site.kind == "linear":
        entry["mode"] = mode
    return entry


__all__ = [
    "Shape",
    "allowance",
    "choose",
    "heads_for",
    "interpolate",
    "make_offers",
    "structure_entry",
    "tail_energies",
]
