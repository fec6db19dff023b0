"""Caption lists in which an image has several captions: folders, COCO, Karpathy, Flickr tokens."""

from __future__ import annotations

import csv
import gzip
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Row:
    """One image: its path below the image folder and its captions.

    `protocol` marks published evaluation lists, whose captions are all kept.
    """

    path: str
    captions: list[str]
    protocol: bool = False


def read_folder(folder: Path) -> list[Row]:
    """Read images and the `.txt` beside each (one caption per line), sorted by path."""
    rows = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        text = path.with_suffix(".txt")
        lines = text.read_text("utf-8", "replace").splitlines() if text.is_file() else []
        rows.append(Row(path.relative_to(folder).as_posix(), lines))
    if not rows:
        raise UserError("the folder holds no images", where=str(folder))
    return rows


def read_structured(path: Path, form: str, split: str | None) -> list[Row]:
    """Read a Karpathy file, COCO's own captions file or a Flickr token file.

    Raises:
        UserError: it is not of that form, or has no image of the split.
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.name.endswith(".gz") else raw).decode("utf-8-sig")
        if form == "flickr-token":
            return _tokens(text)
        record = json.loads(text)
        return _karpathy(record, split) if form == "karpathy" else _coco(record)
    except UserError as error:
        raise UserError(error.what, where=str(path), todo=error.todo) from None
    except (EOFError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"no {form} file ({type(error).__name__}: {error})", str(path)) from error


def _karpathy(record: dict[str, Any], split: str | None) -> list[Row]:
    """Images with `sentences[].raw`, `split` and, for COCO, the folder in `filepath`."""
    rows, splits = [], set()
    for image in record["images"]:
        # 30,504 COCO images are marked "restval": Karpathy's train set includes them.
        mark = "train" if image["split"] == "restval" else image["split"]
        splits.add(mark)
        if split in (None, mark):
            name = "/".join(part for part in (image.get("filepath"), image["filename"]) if part)
            rows.append(Row(name, [item["raw"] for item in image["sentences"]], protocol=True))
    if not rows:
        raise UserError(f"no image of split {split!r}", todo=f"the file has {sorted(splits)}")
    return rows


def _coco(record: dict[str, Any]) -> list[Row]:
    """COCO's own `images` and `annotations`, captions in the order of their ids."""
    captions: dict[int, list[str]] = {}
    for item in sorted(record["annotations"], key=lambda item: item["id"]):
        captions.setdefault(item["image_id"], []).append(item["caption"])
    images = sorted(record["images"], key=lambda image: image["id"])
    return [Row(image["file_name"], captions.get(image["id"], []), True) for image in images]


def _tokens(text: str) -> list[Row]:
    """`NAME.jpg#0<TAB>caption` per line, or the later `image,caption` csv of the same data."""
    captions: dict[str, list[str]] = {}
    if re.match(r"image\w*,", text):
        for cells in csv.reader(text.splitlines()[1:]):
            if len(cells) >= 2:
                captions.setdefault(cells[0].strip(), []).append(",".join(cells[1:]))
    else:
        for number, line in enumerate(text.splitlines(), 1):
            name, tab, caption = line.partition("\t")
            if not line.strip():
                continue
            if not tab or "#" not in name:
                raise UserError(f"line {number} is not NAME#NUMBER<TAB>CAPTION: {line[:60]!r}")
            # One image of the original file is listed as "NAME.jpg.1": its picture is NAME.jpg.
            image = re.sub(r"(\.jpe?g)\.\d+\Z", r"\1", name.rpartition("#")[0].strip())
            captions.setdefault(image, []).append(caption)
    return [Row(name, texts, protocol=True) for name, texts in captions.items()]
