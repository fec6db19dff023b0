"""Which sets and metrics a suite holds, and one model measured on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from data_prep.errors import UserError
from data_prep.files import atomic_path
from data_prep.reader import ShardSet
from eval import efficiency as cost
from eval.contracts import Progress, Tokenizer, Transform, check_unique, input_sizes
from eval.embed import ImageEmbeddings, embed_images, embed_texts
from eval.ranks import agree
from eval.retrieval import recalls, retrieval_ranks
from eval.zero_shot import ClassList, class_weights, label_ranks, load_classes, top_k

KS = (1, 5, 10)
"""The k of recall@k."""


class EvalSet(BaseModel):
    """One evaluation set: shards, and what is asked of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        pattern=r"^[A-Za-z0-9_.-]+$", description="prefix of its metrics: NAME/i2t_r1"
    )
    kind: Literal["retrieval", "zero_shot"] = Field(description="captions or class labels")
    root: str | None = Field(None, description="folder of the shards; None: the experiment's own")
    shards: str | list[str] = Field(description="`test-{000000..000003}.tar` or a glob, under root")
    classes: str | None = Field(
        None, description='zero_shot: "imagenet" or a JSON of classes and templates, under root'
    )
    subset: str | list[int] | None = Field(
        None,
        description="zero_shot: indices of the classes that compete, or their name in the JSON",
    )

    @model_validator(mode="after")
    def _fits_kind(self) -> EvalSet:
        if self.kind == "zero_shot" and self.classes is None:
            raise ValueError('a zero_shot set needs `classes`: "imagenet" or a JSON file')
        if self.kind == "retrieval" and (self.classes is not None or self.subset is not None):
            raise ValueError("`classes` and `subset` belong to zero_shot sets")
        return self

    def open(self) -> ShardSet:
        """Find the shards.

        Raises:
            UserError: no root is known, or the shards are missing or empty.
        """
        if self.root is None:
            raise UserError(f"evaluation set {self.name}: `root` is not set")
        return ShardSet.find(self.root, self.shards)


class Suite(BaseModel):
    """The evaluation section of an experiment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sets: tuple[EvalSet, ...] = Field(min_length=1, description="evaluation sets, in table order")
    quick: EvalSet | None = Field(
        None, description="what training looks at every train.validate_every steps; no test set"
    )
    batch_size: int = Field(64, ge=1, description="images per step and process")
    workers: int = Field(
        0, ge=0, description="processes that decode images; 0: none beside this one"
    )
    efficiency: bool = Field(True, description="measure parameters, multiply-adds and latency too")
    latency_batch: int = Field(32, ge=1, description="images at once when throughput is measured")
    threads: int | None = Field(None, ge=1, description="CPU threads for timing; None: torch's own")
    examples: int = Field(6, ge=0, description="example queries in each direction for the report")

    @model_validator(mode="after")
    def _unique(self) -> Suite:
        check_unique([item.name for item in self.sets], "evaluation set")
        return self

    def with_root(self, root: str | Path) -> Suite:
        """Return the suite with `root` given to every set that names none."""

        def rooted(item: EvalSet) -> EvalSet:
            return item if item.root is not None else item.model_copy(update={"root": str(root)})

        quick = None if self.quick is None else rooted(self.quick)
        return self.model_copy(update={"sets": tuple(map(rooted, self.sets)), "quick": quick})

    @property
    def everything(self) -> tuple[EvalSet, ...]:
        """All sets whose shards must be there, the quick one included."""
        return self.sets if self.quick is None else (*self.sets, self.quick)


@dataclass
class Embedded:
    """A retrieval set as one model sees it.

    Attributes:
        images: embeddings, keys and captions of the N images.
        text: [M, D] caption embeddings, in the order of `images.texts`.
    """

    images: ImageEmbeddings
    text: Tensor


@dataclass
class Evaluation:
    """Everything that one evaluation found out.

    Attributes:
        metrics: fractions, counts and costs by name, as in `eval.json`.
        ranks: per `SET/i2t`, `SET/t2i`, `SET/class`: the rank of each query's right answer.
        owners: per retrieval set, [M] the image of each caption.
        embedded: per retrieval set, what the example retrievals are made of.
        conditions: device, threads, batch and precision of the timings.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    ranks: dict[str, Tensor] = field(default_factory=dict)
    owners: dict[str, Tensor] = field(default_factory=dict)
    embedded: dict[str, Embedded] = field(default_factory=dict)
    conditions: dict[str, Any] = field(default_factory=dict)

    def write_queries(self, path: str | Path) -> None:
        """Write ranks and owners to an .npz file, from which paired statistics are computed."""
        arrays = {f"rank:{name}": value.numpy() for name, value in self.ranks.items()}
        arrays |= {f"owner:{name}": value.numpy() for name, value in self.owners.items()}
        small = {name: value.astype(np.int32) for name, value in arrays.items()}
        with atomic_path(path) as temporary, temporary.open("wb") as handle:
            np.savez_compressed(handle, allow_pickle=False, **small)


@dataclass(frozen=True)
class _Run:
    """One model with its transform and tokenizer, and how to run it."""

    model: nn.Module
    transform: Transform
    tokenizer: Tokenizer
    batch_size: int
    device: torch.device
    workers: int
    progress: Progress | None

    def embed(self, item: EvalSet) -> Embedded:
        images = self.images(item)
        return Embedded(images, self.texts(item, images.texts))

    def images(self, item: EvalSet) -> ImageEmbeddings:
        return embed_images(
            self.model,
            self.transform,
            agree(item.open),
            batch_size=self.batch_size,
            device=self.device,
            workers=self.workers,
            captions=item.kind == "retrieval",
            progress=self._named(item),
        )

    def texts(self, item: EvalSet, texts: list[str]) -> Tensor:
        return embed_texts(
            self.model,
            self.tokenizer,
            texts,
            batch_size=self.batch_size,
            device=self.device,
            progress=self._named(item),
        )

    def _named(self, item: EvalSet) -> Progress | None:
        if self.progress is None:
            return None
        report = self.progress
        return lambda what, done, total: report(f"{item.name} {what}", done, total)


def embed_set(
    model: nn.Module,
    transform: Transform,
    tokenizer: Tokenizer,
    eval_set: EvalSet,
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    workers: int = 0,
    progress: Progress | None = None,
) -> Embedded:
    """Embed all images and all captions of a retrieval set; arguments as in `evaluate_all`.

    Raises:
        UserError: an image has no caption or cannot be decoded; names shard and key.
    """
    run = _Run(model, transform, tokenizer, batch_size, torch.device(device), workers, progress)
    return run.embed(eval_set)


def _retrieval(run: _Run, item: EvalSet, result: Evaluation) -> None:
    embedded = run.embed(item)
    owner = embedded.images.owner
    i2t, t2i = retrieval_ranks(
        embedded.images.features.to(run.device), embedded.text.to(run.device), owner
    )
    result.embedded[item.name] = embedded
    result.ranks |= {f"{item.name}/i2t": i2t, f"{item.name}/t2i": t2i}
    result.owners[item.name] = owner
    values = recalls(i2t, t2i, KS)
    counts = {"images": float(len(i2t)), "captions": float(len(t2i))}
    result.metrics |= {f"{item.name}/{name}": value for name, value in (values | counts).items()}


def _zero_shot(run: _Run, item: EvalSet, result: Evaluation) -> None:
    where = f"evaluation set {item.name}"
    listed, subset = agree(lambda: _classes(item))
    images = run.images(item)
    if images.labels is None:
        raise UserError(
            "no sample has a label", where=where, todo="give each a .cls or a .json with `label`"
        )
    weights = class_weights(
        run.model,
        run.tokenizer,
        listed.classes,
        listed.templates,
        batch_size=run.batch_size,
        device=run.device,
    )
    try:
        ranks = label_ranks(images.features, weights, images.labels, subset=subset)
    except UserError as fault:
        raise UserError(fault.what, where=where, todo=fault.todo) from fault
    classes = len(listed.classes) if subset is None else len(set(subset))
    values = top_k(ranks, classes) | {"images": float(len(ranks)), "classes": float(classes)}
    result.ranks[f"{item.name}/class"] = ranks
    result.metrics |= {f"{item.name}/{name}": value for name, value in values.items()}


def _classes(item: EvalSet) -> tuple[ClassList, Sequence[int] | None]:
    """Return the class list of a zero-shot set and which classes compete (None: all)."""
    listed = load_classes(str(item.classes), Path(item.root) if item.root else None)
    if not isinstance(item.subset, str):
        return listed, item.subset
    if item.subset not in listed.subsets:
        raise UserError(
            f"the class list has no subset {item.subset!r}",
            where=f"evaluation set {item.name}",
            todo=f"it has: {', '.join(sorted(listed.subsets)) or 'none'}",
        )
    return listed, listed.subsets[item.subset]


def _efficiency(run: _Run, result: Evaluation, latency_batch: int, threads: int | None) -> None:
    """Measure on rank 0 alone, since ranks that time together slow each other down; tell all."""
    measured: list[Any] = [None, None]
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not several or dist.get_rank() == 0:
        image_size, context_length = input_sizes(run.transform, run.tokenizer)
        measured[0] = {
            "params": float(cost.parameters(run.model)),
            "macs": float(cost.multiply_adds(run.model, image_size, context_length)),
        } | cost.latency(
            run.model, image_size, context_length, batch_size=latency_batch, threads=threads
        )
        measured[1] = cost.conditions(run.model, batch_size=latency_batch, threads=threads)
    if several:
        dist.broadcast_object_list(measured, src=0)
    result.metrics |= measured[0]
    result.conditions = measured[1]


def evaluate_all(
    model: nn.Module,
    transform: Transform,
    tokenizer: Tokenizer,
    sets: Sequence[EvalSet],
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    workers: int = 0,
    efficiency: bool = True,
    latency_batch: int = 32,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure one model on every set; all ranks take part and get the same result.

    Args:
        model: has `encode_image` and `encode_text`; already on `device`. Its training mode is
            restored afterwards.
        transform: PIL image -> float tensor [3, S, S].
        tokenizer: list of B texts -> token ids [B, L].
        sets: what to measure on.
        batch_size: images (and captions) per step and rank.
        device: where to run.
        workers: processes that decode images.
        efficiency: also count parameters and multiply-adds, and time the model.
        latency_batch: images at once when throughput is measured.
        threads: CPU threads for timing; None takes torch's own number.
        progress: called after each batch with what is done.

    Raises:
        UserError: a set is unusable; see `EvalSet.open`, `embed_images`, `label_ranks`.
    """
    check_unique([item.name for item in sets], "evaluation set")
    run = _Run(model, transform, tokenizer, batch_size, torch.device(device), workers, progress)
    result = Evaluation()
    for item in sets:
        (_retrieval if item.kind == "retrieval" else _zero_shot)(run, item, result)
    if efficiency:
        _efficiency(run, result, latency_batch, threads)
    return result


def evaluate(
    model: nn.Module,
    transform: Transform,
    tokenizer: Tokenizer,
    sets: Sequence[EvalSet],
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    workers: int = 0,
    efficiency: bool = True,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Return only the metrics of `evaluate_all`: `SET/i2t_r1`, `SET/top1`, `params`, ..."""
    return evaluate_all(
        model,
        transform,
        tokenizer,
        sets,
        batch_size=batch_size,
        device=device,
        workers=workers,
        efficiency=efficiency,
        progress=progress,
    ).metrics
