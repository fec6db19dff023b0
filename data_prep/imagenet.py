"""ImageNet-1k validation and its variants: which class an image belongs to, and its name."""

from __future__ import annotations

import csv
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError
from data_prep.image_sources import ImageSource

_WNID = re.compile(r"n\d{8}\Z")
_ORDER_MATCHES = 900  # of 1000; the right order gives 960, one shifted by a single class 135


@dataclass(frozen=True)
class Classes:
    """The classes of a set in the order of its labels.

    Attributes:
        wnids: WordNet ids.
        names: open_clip's names.
        templates: open_clip's 80 prompts, `{}` for the name.
    """

    wnids: list[str]
    names: list[str]
    templates: list[str]


def imagenet_wnids() -> list[str]:
    """Return the 1000 WordNet ids in the order of the labels (sorted), as timm lists them."""
    return (_timm_file("imagenet_synsets.txt")).read_text("utf-8").split()


def _timm_file(name: str) -> Path:
    spec = importlib.util.find_spec("timm")  # finds it without importing torch
    if spec is None or spec.origin is None:
        raise UserError("timm is not installed", todo="it comes with open_clip_torch")
    return Path(spec.origin).parent / "data" / "_info" / name


def imagenet_classes() -> Classes:
    """Return the 1000 classes, after checking that open_clip's names are in the same order.

    Raises:
        UserError: open_clip's names do not follow the WordNet ids.
    """
    from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    wnids = imagenet_wnids()
    lines = _timm_file("imagenet_synset_to_lemma.txt").read_text("utf-8").splitlines()
    lemmas = dict(line.split("\t", 1) for line in lines if "\t" in line)
    check_order(wnids, list(IMAGENET_CLASSNAMES), lemmas)
    templates = [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    return Classes(wnids, list(IMAGENET_CLASSNAMES), templates)


def check_order(wnids: list[str], names: list[str], lemmas: dict[str, str]) -> None:
    """Check that class names belong to their WordNet ids: most share a word with the lemma.

    Raises:
        UserError: too few do, so the order must be another.
    """

    def words(text: str) -> set[str]:
        return set(re.findall("[a-z]+", text.lower()))

    pairs = zip(wnids, names, strict=False)
    hits = sum(bool(words(name) & words(lemmas.get(wnid, ""))) for wnid, name in pairs)
    if len(wnids) != len(names) or hits < _ORDER_MATCHES * len(wnids) / 1000:
        raise UserError(
            f"only {hits} of {len(names)} class names fit their WordNet id: another class order",
            todo="install the open_clip_torch and timm that constraints.txt names",
        )


def class_folders(source: ImageSource) -> dict[str, str]:
    """Return the folder of each image that lies in a class folder: a wnid or a number."""
    folders = {}
    for name in source.names:
        parts = name.split("/")[:-1]
        folder = next((p for p in reversed(parts) if _WNID.match(p) or p.isdigit()), "")
        if folder:
            folders[name] = folder
    return folders


def labels_by_folder(source: ImageSource, wnids: list[str]) -> dict[str, int]:
    """Return the class number of each image, from its folder.

    Folders are named by wnid, or by class number as in ImageNet-V2 (its folder "10" is class 10,
    not the tenth in the order of text).

    Raises:
        UserError: there are no class folders, or some that are not of this set.
    """
    folders = class_folders(source)
    number = {wnid: place for place, wnid in enumerate(wnids)}
    if all(name.isdigit() for name in folders.values()):
        number = {str(place): place for place in range(len(wnids))}
    strange = sorted({folder for folder in folders.values() if folder not in number})
    if not folders or strange:
        raise UserError(
            f"folders {strange[:5]} are no classes of this set"
            if strange
            else "the images are not in folders named by WordNet id or class number",
            where=str(source.path),
            todo="for the flat ILSVRC2012_img_val give --annotations LOC_val_solution.csv, or a "
            "list of NAME LABEL lines"
            if not folders
            else "",
        )
    return {name: number[folder] for name, folder in folders.items()}


def labels_by_list(source: ImageSource, path: Path, wnids: list[str]) -> dict[str, int]:
    """Return the class number of each image of a flat folder, from a list.

    Args:
        source: Images.
        path: Kaggle's `LOC_val_solution.csv` (`ImageId,PredictionString` with a wnid), or lines
            `NAME LABEL` with a wnid or a class number.
        wnids: Classes in order.

    Raises:
        UserError: the list has another form.
    """
    number = {wnid: place for place, wnid in enumerate(wnids)}
    found = {}
    for row in csv.reader(path.read_text("utf-8").splitlines()):
        cells = " ".join(row).split()
        if len(cells) == 1:
            raise UserError(
                "a list of labels without names: the ids of the development kit are in another "
                "order than the classes",
                where=str(path),
                todo="use Kaggle's LOC_val_solution.csv, or sort the images into wnid folders",
            )
        if len(cells) < 2 or cells[0] == "ImageId":
            continue
        label = number.get(cells[1], int(cells[1]) if cells[1].isdigit() else -1)
        stem = Path(cells[0]).stem
        name = source.find(cells[0]) or source.find(f"{stem}.JPEG")
        if not 0 <= label < len(wnids):
            raise UserError(f"{cells[1]!r} is no class of ImageNet", where=str(path))
        if name:
            found[name] = label
    return found
