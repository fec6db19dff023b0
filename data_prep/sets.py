"""Evaluation sets from their usual folders or tars into shards, counted against the official."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from data_prep.caption_files import Row, read_structured
from data_prep.caption_text import repair_text, unique_keys
from data_prep.captions import detect_form
from data_prep.errors import UserError
from data_prep.files import atomic_write
from data_prep.image_sources import ImageSource
from data_prep.imagenet import imagenet_classes, imagenet_wnids, labels_by_folder, labels_by_list
from data_prep.images import ImageFaultError, ImageSettings, keep_image, store_image
from data_prep.shards import Manifest, Sample, manifest_path, to_json, write_shards


@dataclass(frozen=True)
class EvaluationSet:
    """What is official about a set.

    Attributes:
        kind: `retrieval` (captions) or `zero_shot` (labels).
        counts: Images per split; zero-shot sets have one, "".
        captions: Captions in all per split, where that is official too.
        classes: Number of classes of a zero-shot set.
    """

    kind: str
    counts: dict[str, int]
    captions: dict[str, int] = field(default_factory=dict)
    classes: int = 0


SETS = {
    "flickr8k": EvaluationSet("retrieval", {"train": 6000, "val": 1000, "test": 1000},
                              {"train": 30000, "val": 5000, "test": 5000}),
    "flickr30k": EvaluationSet("retrieval", {"train": 29000, "val": 1014, "test": 1000},
                               {"train": 145000, "val": 5070, "test": 5000}),
    "coco": EvaluationSet("retrieval", {"train": 113287, "val": 5000, "test": 5000},
                          {"train": 566747, "val": 25010, "test": 25010}),
    "imagenet-val": EvaluationSet("zero_shot", {"": 50000}, classes=1000),
    "imagenet-v2": EvaluationSet("zero_shot", {"": 10000}, classes=1000),
    "imagenet-sketch": EvaluationSet("zero_shot", {"": 50889}, classes=1000),
    "imagenet-r": EvaluationSet("zero_shot", {"": 30000}, classes=200),
    "imagenet-a": EvaluationSet("zero_shot", {"": 7500}, classes=200),
}  # fmt: skip
CC3M_VALIDATION_ROWS = 15840  # official; the links that are alive are fewer, and that is counted


class _Lazy(Sequence[Sample]):
    """Samples that are read when they are written, so that finished shards cost nothing."""

    def __init__(self, count: int, make: Callable[[int], Sample]) -> None:
        self.length, self.make = count, make

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return [self.make(i) for i in range(*index.indices(self.length))]
        if not 0 <= index < self.length:
            raise IndexError(index)
        return self.make(index)


@dataclass(frozen=True)
class SetRequest:
    """One set to build.

    Attributes:
        name: A key of `SETS`.
        images: Folder or tar of the images.
        annotations: Karpathy json, token file or label list; None where folders say it all.
        split: Of a retrieval set; `test` is the published one.
        split_list: File with the image names of the split, for a token file.
        out: Folder for the shards.
        image: Storing; size 0 keeps the original bytes.
        partial: Accept fewer images than official.
    """

    name: str
    images: Path
    out: Path
    annotations: Path | None = None
    split: str = "test"
    split_list: Path | None = None
    samples_per_shard: int = 1000
    image: ImageSettings = ImageSettings(size=0, min_side=1)  # noqa: RUF009  (it is frozen)
    partial: bool = False


def build_set(request: SetRequest) -> tuple[Manifest, list[str]]:
    """Build the shards of an evaluation set.

    Returns:
        The manifest and, for a partial set, what is missing.

    Raises:
        UserError: an unknown set, missing or broken images, another number than the official
            one without `partial`, or another class order than open_clip's.
    """
    spec = SETS.get(request.name)
    if spec is None:
        raise UserError(f"no set is called {request.name!r}", todo=f"use one of {', '.join(SETS)}")
    source = ImageSource(request.images, request.out)
    build = _retrieval if spec.kind == "retrieval" else _zero_shot
    return build(request, spec, source)


def _store(source: ImageSource, name: str, settings: ImageSettings) -> tuple[bytes, str]:
    try:
        if settings.size:
            return store_image(source.read(name), settings).data, "jpg"
        return keep_image(source.read(name), settings)
    except ImageFaultError as error:
        raise UserError(
            f"the image cannot be used: {error}",
            where=f"{source.path}/{name}",
            todo="unpack or download the set again: an evaluation set has to be whole",
        ) from None


# ------------------------------------------------------------------------------------ captions


def _retrieval(
    request: SetRequest, spec: EvaluationSet, source: ImageSource
) -> tuple[Manifest, list[str]]:
    if request.split not in spec.counts:
        raise UserError(f"no split {request.split!r}", todo=f"use one of {', '.join(spec.counts)}")
    rows = _caption_rows(request)
    found = [(row, source.find(row.path)) for row in rows]
    gone = [row.path for row, name in found if name is None]
    present = [(row, name) for row, name in found if name is not None]
    captions = sum(len(row.captions) for row, _ in present)
    problems = _shortfall("images", spec.counts[request.split], len(present), gone)
    problems += _shortfall("captions", spec.captions.get(request.split, captions), captions, [])
    _refuse(problems, request)
    unique = unique_keys()
    keys = [unique(row.path) for row, _ in present]

    def make(index: int) -> Sample:
        row, name = present[index]
        data, extension = _store(source, name, request.image)
        return Sample.of(keys[index], data, extension, captions=_texts(row))

    prefix = f"{request.name}-{request.split}"
    manifest = _write(request, prefix, _Lazy(len(present), make), problems)
    return manifest, problems


def _texts(row: Row) -> list[str]:
    texts = [repair_text(text) for text in row.captions]
    return [text for text in texts if text]


def _caption_rows(request: SetRequest) -> list[Row]:
    path = request.annotations
    if path is None or not path.is_file():
        raise UserError(
            "the captions are missing",
            where=str(path or request.name),
            todo="give --annotations with Karpathy's dataset json (or Flickr8k.token.txt with "
            "--split-list Flickr_8k.testImages.txt)",
        )
    form = detect_form(path)
    rows = read_structured(path, form, request.split if form == "karpathy" else None)
    if request.split_list is not None:
        wanted = request.split_list.read_text("utf-8").split()
        by_name = {row.path: row for row in rows}
        missing = [name for name in wanted if name not in by_name]
        if missing:
            raise UserError(f"no captions for {missing[:5]}", where=str(path))
        rows = [by_name[name] for name in wanted]
    elif form == "flickr-token":
        raise UserError("a token file does not know splits", str(path), "add --split-list FILE")
    return rows


# -------------------------------------------------------------------------------------- classes


def _zero_shot(
    request: SetRequest, spec: EvaluationSet, source: ImageSource
) -> tuple[Manifest, list[str]]:
    classes = imagenet_classes()
    wnids = imagenet_wnids()
    if spec.classes < len(wnids):
        # ImageNet-R and -A hold 200 of the classes; labels count within them, sorted by wnid.
        there = {part for name in source.names for part in name.split("/")[:-1]}
        wnids = [wnid for wnid in wnids if wnid in there]
        if len(wnids) != spec.classes:
            raise UserError(
                f"{len(wnids)} class folders, {request.name} has {spec.classes}",
                where=str(source.path),
                todo="unpack the whole set",
            )
    if request.annotations is not None:
        labels = labels_by_list(source, request.annotations, wnids)
    else:
        labels = labels_by_folder(source, wnids)
    problems = _shortfall("images", spec.counts[""], len(labels), [])
    empty = [wnid for place, wnid in enumerate(wnids) if place not in set(labels.values())]
    if empty:
        problems.append(f"{len(empty)} classes without an image: {', '.join(empty[:5])}")
    _refuse(problems, request)
    index = {wnid: place for place, wnid in enumerate(classes.wnids)}
    names = [classes.names[index[wnid]] for wnid in wnids]
    ordered = sorted(labels)
    unique = unique_keys()
    keys = [unique(f"{wnids[labels[name]]}_{Path(name).stem}") for name in ordered]

    def make(place: int) -> Sample:
        label = labels[ordered[place]]
        data, extension = _store(source, ordered[place], request.image)
        return Sample.of(
            keys[place], data, extension, label=label, wnid=wnids[label], name=names[label]
        )

    record = {"classes": names, "templates": classes.templates, "wnids": wnids}
    atomic_write(request.out / f"{request.name}.classes.json", to_json(record))
    return _write(request, request.name, _Lazy(len(ordered), make), problems), problems


def _shortfall(what: str, official: int, found: int, gone: list[str]) -> list[str]:
    if found == official:
        return []
    names = f"; missing are {', '.join(gone[:5])}{', ...' if len(gone) > 5 else ''}" if gone else ""
    return [f"{found} {what}, the official number is {official}{names}"]


def _refuse(problems: list[str], request: SetRequest) -> None:
    if problems and not request.partial:
        raise UserError(
            "; ".join(problems),
            where=f"{request.name} in {request.images}",
            todo="complete the folder, or add --allow-partial to build it as it is: its results "
            "then are not comparable with published ones",
        )


def _write(request: SetRequest, prefix: str, samples: _Lazy, problems: list[str]) -> Manifest:
    settings: dict[str, Any] = {
        "set": request.name,
        "image": request.image.model_dump(),
        "samples": len(samples),
        "shortfall": problems,
    }
    final = manifest_path(request.out, prefix)
    if final.is_file():
        manifest = Manifest.load(final)
        whole = all(
            (request.out / entry.name).is_file()
            and (request.out / entry.name).stat().st_size == entry.bytes
            for entry in manifest.shards
        )
        if manifest.settings == settings and whole:
            return manifest
    return write_shards(
        samples,
        request.out,
        prefix,
        samples_per_shard=request.samples_per_shard,
        source=request.name,
        settings=settings,
    )
