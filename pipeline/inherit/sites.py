"""The heavy layers of a model: which can be inherited, their geometry and what each rank costs."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from data_prep.errors import UserError
from pipeline.inherit.attention import exposable, expose_module

HEAVY = (nn.Conv2d, nn.Linear, nn.Embedding)
UNSUPPORTED = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose2d, nn.Bilinear, nn.RNNBase, nn.EmbeddingBag)


@dataclass
class Site:
    """One heavy layer as a matrix `W` [groups, width_out, width_in] used at `positions` places.

    Attributes:
        name: the module's full name.
        kind: "conv", "linear" or "embedding".
        width_in: inputs per group, `c_in / groups * kh * kw` for a convolution, the vocabulary for
            an embedding.
        width_out: outputs per group.
        positions: how often per sample the matrix is applied (0 while unknown).
        positions_before: the same in the teacher, where an attention pool projects queries it
            discards.
        blocked: why the layer has to stay dense, "" if it does not.
    """

    name: str
    kind: str
    module: nn.Module
    shape: tuple[int, ...]
    groups: int
    width_in: int
    width_out: int
    positions: float = 0.0
    positions_before: float = 0.0
    blocked: str = ""
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def full_rank(self) -> int:
        """The largest rank that carries anything, per group."""
        return min(self.width_in, self.width_out)

    @property
    def bias(self) -> int:
        """Number of bias values; the same before and after."""
        bias = getattr(self.module, "bias", None)
        return 0 if bias is None else bias.numel()

    @property
    def dense_weights(self) -> int:
        """Weights of the dense layer, without its bias."""
        return self.groups * self.width_in * self.width_out

    def rank_weights(
        self, rank: int, heads: int, gate: bool = True, symmetric: bool = False
    ) -> int:
        """Weights of the inherited layer at this rank, gate included, bias excluded."""
        if self.kind == "embedding":
            return rank * (self.width_in + self.width_out)
        copies = heads if symmetric and heads > 1 else 1
        features = copies * self.groups * rank
        gate_weights = heads * (features + 1) if gate and heads > 1 else 0
        return features * self.width_in + heads * self.groups * self.width_out * rank + gate_weights

    def macs(self, rank: int | None, heads: int, symmetric: bool = False) -> float:
        """Multiply-adds per sample of the inherited layer, of the dense one for `rank=None`.

        Uses the cheap evaluation of the heads: per image the mixing of the up weights is added, per
        token the widened bottleneck is counted in full. A lookup costs nothing.
        """
        if rank is None:
            return 0.0 if self.kind == "embedding" else self.dense_weights * self.positions
        up = self.groups * self.width_out * rank
        if self.kind == "embedding":
            return up * self.positions
        copies = heads if symmetric and heads > 1 else 1
        down = copies * self.groups * rank * self.width_in * self.positions
        if heads == 1:
            return down + up * self.positions
        if self.kind == "conv":
            return down + up * self.positions * copies + heads * up
        return down + heads * up * self.positions + heads * rank * copies * self.positions

    @property
    def macs_before(self) -> float:
        """Multiply-adds per sample of the teacher's own layer."""
        if self.kind == "embedding":
            return 0.0
        return self.dense_weights * (self.positions_before or self.positions)

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the weight as [groups, width_out, width_in]; an embedding table is transposed."""
        weight = self.module.weight.detach()  # type: ignore[operator]
        if self.kind == "embedding":
            return weight.to(dtype).T.unsqueeze(0)
        return weight.to(dtype).reshape(self.groups, self.width_out, self.width_in)


def make_site(name: str, module: nn.Module) -> Site:
    """Describe one Conv2d, Linear or Embedding."""
    if isinstance(module, nn.Conv2d):
        out, per_group, height, width = module.weight.shape
        groups = module.groups
        return Site(
            name, "conv", module, tuple(module.weight.shape), groups,
            per_group * height * width, out // groups,
        )  # fmt: skip
    assert isinstance(module, nn.Linear | nn.Embedding)
    rows, columns = module.weight.shape
    if isinstance(module, nn.Embedding):
        return Site(name, "embedding", module, (rows, columns), 1, rows, columns)
    return Site(name, "linear", module, (rows, columns), 1, columns, rows)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module's full name matches one of the shell globs."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _selected(name: str, include: Iterable[str], exclude: Iterable[str]) -> bool:
    return matches(name, include) and not matches(name, exclude)


def set_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place called `name`, and in every other place that held the same module."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, child_name, new)


def expose(
    model: nn.Module, include: Iterable[str], exclude: Iterable[str]
) -> list[dict[str, str]]:
    """Replace, in place, every attention with selected projections; return structure entries."""
    done: list[dict[str, str]] = []
    for name, module in list(model.named_modules()):
        kind = exposable(module)
        if not kind or kind.startswith("unsupported"):
            continue
        parts = (
            ("q_proj", "k_proj", "v_proj", "c_proj")
            if kind == "attention_pool"
            else ("in_proj", "out_proj")
        )
        if any(_selected(f"{name}.{part}", include, exclude) for part in parts):
            set_module(model, name, expose_module(module, kind))
            done.append({"name": name, "kind": kind})
    return done


def _raw_attention(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (prefix, reason) for attentions that stay: their weights are read directly."""
    for name, module in model.named_modules():
        kind = exposable(module)
        if kind:
            yield name, kind.removeprefix("unsupported: ") if ":" in kind else "excluded"


def find_sites(model: nn.Module, include: Iterable[str], exclude: Iterable[str]) -> list[Site]:
    """List every heavy layer of an exposed model, blocked ones included with the reason.

    Raises:
        UserError: a weight holds NaN or Inf, or the globs select nothing.
    """
    include, exclude = tuple(include), tuple(exclude)
    raw = dict(_raw_attention(model))
    shared = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    sites = []
    for name, module in modules.items():
        if not isinstance(module, HEAVY):
            continue
        site = make_site(name, module)
        parent = name.rpartition(".")[0]
        if not torch.isfinite(module.weight).all():
            raise UserError(
                "the weight holds NaN or Inf",
                where=name,
                todo="check the teacher; it cannot be inherited",
            )
        if not _selected(name, include, exclude):
            site.blocked = "excluded"
        elif parent in raw:
            site.blocked = f"inside an attention that stays dense: {raw[parent]}"
        elif type(module) not in HEAVY:
            site.blocked = f"unsupported layer type {type(module).__name__}"
        elif shared[id(module.weight)] > 1:
            site.blocked = "shares its weight with another layer"
        elif hasattr(module, "parametrizations") or any(
            k.endswith("_orig") for k in module._parameters
        ):
            site.blocked = "its weight is computed from others (parametrisation)"
        sites.append(site)
    if not any(not site.blocked for site in sites):
        raise UserError(
            "no layer is left to inherit",
            where=f"include={list(include)}, exclude={list(exclude)}",
            todo="the patterns are shell globs on full module names such as 'visual.layer3.*'",
        )
    return sites


def unsupported_modules(model: nn.Module) -> list[tuple[str, str, int]]:
    """Return (name, type, parameters) of heavy modules for which there is no inherited layer."""
    found = []
    for name, module in model.named_modules():
        raw = isinstance(module, nn.MultiheadAttention) and exposable(module).startswith(
            "unsupported"
        )
        if isinstance(module, UNSUPPORTED) or raw:
            found.append((name, type(module).__name__, sum(p.numel() for p in module.parameters())))
    return found
