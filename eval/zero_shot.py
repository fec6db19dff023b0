"""Class names and prompt templates in, a linear classifier and its accuracy out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.errors import UserError
from eval.contracts import Progress, Tokenizer
from eval.embed import embed_texts

Template = str | Callable[[str], str]
"""`a photo of a {}.`, or a function of the class name as in open_clip."""


@dataclass(frozen=True)
class ClassList:
    """What a zero-shot set's labels mean.

    Attributes:
        classes: the C class names, in label order.
        templates: the T prompt templates that are averaged.
        subsets: named lists of class indices (`imagenet_r`, `imagenet_a`).
    """

    classes: tuple[str, ...]
    templates: tuple[Template, ...]
    subsets: dict[str, tuple[int, ...]]


def load_classes(source: str, root: Path | None = None) -> ClassList:
    """Read a class list: `imagenet` (open_clip's, in sorted-wnid order) or a JSON file.

    The file is `{"classes": [...], "templates": [...]}`; a class is a name or `{"name", ...}`, the
    templates may also be called `openai_templates`, and keys `NAME_indices` become subsets.

    Raises:
        UserError: the file is missing, unreadable or does not hold classes and templates.
    """
    if source == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

        return ClassList(tuple(IMAGENET_CLASSNAMES), tuple(OPENAI_IMAGENET_TEMPLATES), {})
    path = Path(source) if root is None else root / source
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            "the class list cannot be read",
            where=str(path),
            todo='give a JSON file {"classes": [...], "templates": [...]}, or "imagenet"',
        ) from error
    except ValueError as error:
        raise UserError(f"the class list is not JSON ({error})", where=str(path)) from error
    return _parse_classes(content, str(path))


def _parse_classes(content: Any, where: str) -> ClassList:
    if not isinstance(content, dict):
        raise UserError("the class list is not a JSON object", where=where)
    entries = content.get("classes", [])
    names: list[Any] = [
        entry.get("name") if isinstance(entry, dict) else entry
        for entry in (entries if isinstance(entries, list) else [])
    ]
    templates: Any = content.get("templates", content.get("openai_templates"))
    for what, values in (("classes", names), ("templates", templates)):
        if (
            not isinstance(values, list)
            or not values
            or not all(isinstance(value, str) and value for value in values)
        ):
            raise UserError(
                f"`{what}` must be a list of strings, at least one",
                where=where,
                todo='the format is {"classes": ["cat", ...], "templates": ["a photo of a {}."]}',
            )
    subsets = {
        key.removesuffix("_indices"): tuple(int(index) for index in value)
        for key, value in content.items()
        if key.endswith("_indices")
    }
    for template in templates:
        check_template(template, where)
    return ClassList(tuple(names), tuple(templates), subsets)


def check_template(template: str, where: str) -> None:
    """Raise UserError unless the template has a place for the class name."""
    if "{}" not in template:
        raise UserError(
            f"the template {template!r} has no place for the class name",
            where=where,
            todo="write {} where the name belongs",
        )


def fill(template: Template, name: str) -> str:
    """Put a class name into a template."""
    return template.replace("{}", name) if isinstance(template, str) else template(name)


def class_weights(
    model: nn.Module,
    tokenizer: Tokenizer,
    classes: Sequence[str],
    templates: Sequence[Template],
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Tensor:
    """Return the zero-shot classifier [D, C]: per class the normalised mean over its prompts.

    The mean is over L2-normalised prompt embeddings, as in the CLIP paper and open_clip.
    """
    prompts = [fill(template, name) for name in classes for template in templates]
    features = embed_texts(
        model, tokenizer, prompts, batch_size=batch_size, device=device, progress=progress
    )
    means = features.reshape(len(classes), len(templates), -1).mean(dim=1)
    return nn.functional.normalize(means, dim=-1).T.contiguous()


def label_ranks(
    features: Tensor,
    weights: Tensor,
    labels: Tensor,
    *,
    subset: Sequence[int] | None = None,
    chunk: int = 8192,
) -> Tensor:
    """Return [N] the rank (1 = first) of the right class; ties count against the model.

    Args:
        features: [N, D] L2-normalised image embeddings.
        weights: [D, C] classifier over all classes.
        labels: [N] class indices, always in the numbering of all C classes.
        subset: only these classes compete (ImageNet-R and -A have 200 of the 1,000).
        chunk: images per product.

    Raises:
        UserError: a label is out of range or outside the subset.
    """
    allowed = torch.arange(weights.shape[1]) if subset is None else _subset(subset, weights)
    position = torch.full((weights.shape[1],), -1, dtype=torch.long)
    position[allowed] = torch.arange(len(allowed))
    _check_labels(labels, position)
    ranks = []
    for low in range(0, len(features), chunk):
        logits = features[low : low + chunk] @ weights[:, allowed].to(features.device)
        own = position[labels[low : low + chunk]].to(features.device)
        ranks.append((logits >= logits.gather(1, own[:, None])).sum(dim=1))
    return torch.cat(ranks).cpu()


def _subset(subset: Sequence[int], weights: Tensor) -> Tensor:
    indices = torch.tensor(sorted(set(subset)), dtype=torch.long)
    classes = weights.shape[1]
    if not len(indices) or int(indices[0]) < 0 or int(indices[-1]) >= classes:
        raise UserError(
            f"the class subset must hold indices from 0 to {classes - 1}, at least one",
        )
    return indices


def _check_labels(labels: Tensor, position: Tensor) -> None:
    classes = len(position)
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise UserError(
            f"{len(outside)} of {len(labels)} labels are out of range, "
            f"for example {int(outside[0])} with {classes} classes",
            todo="the class list does not belong to these shards",
        )
    excluded = labels[position[labels] < 0]
    if len(excluded):
        raise UserError(
            f"{len(excluded)} of {len(labels)} labels are not in the class subset, "
            f"for example {int(excluded[0])}",
            todo="labels must be indices into the whole class list, not into the subset",
        )


def accuracy(
    features: Tensor,
    weights: Tensor,
    labels: Tensor,
    *,
    subset: Sequence[int] | None = None,
    topk: Sequence[int] = (1, 5),
) -> dict[str, float]:
    """Return `top1` and `top5` as fractions; arguments and errors are those of `label_ranks`.

    A top-k with k classes or fewer is 1 by definition and says nothing: it is left out.
    """
    ranks = label_ranks(features, weights, labels, subset=subset)
    competing = weights.shape[1] if subset is None else len(set(subset))
    return top_k(ranks, competing, topk)


def top_k(ranks: Tensor, classes: int, topk: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Name the accuracies of right-class ranks: `top1`, and `top5` where it says something."""
    return {f"top{k}": float((ranks <= k).double().mean()) for k in topk if k < classes}
