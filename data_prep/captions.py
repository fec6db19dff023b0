"""Any caption list in, one frame out: key, url or path, captions.

Columns of strings are held by Arrow, not as Python objects: 3.3 million rows fit in well under
1.5 GB.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from data_prep import caption_files
from data_prep.caption_text import repair_text, unique_keys
from data_prep.column_hashes import first_of_each, string_hashes
from data_prep.errors import UserError

FORMATS = (
    "cc3m", "cc12m", "table", "folder", "karpathy", "coco", "flickr-token",
)  # fmt: skip
_LOCATION_NAMES = ("url", "image_url", "filepath", "path", "file_path", "image", "file", "filename")
_CAPTION_NAMES = ("caption", "captions", "text", "title", "sentence", "raw", "comment")


@dataclass(frozen=True)
class CaptionTable:
    """Captions in one form.

    Attributes:
        frame: Columns `key` (unique, no dot), `url` or `path`, `captions` (list of strings).
        dropped: Rows that are not in the frame, by reason; their sum plus the rows that remain
            (before captions of one image were joined) is the number of rows in the source.
        source: File or folder they came from.
    """

    frame: pd.DataFrame
    dropped: dict[str, int]
    source: str

    @property
    def location(self) -> str:
        """Name of the column that says where the image is: `url` or `path`."""
        return "url" if "url" in self.frame else "path"

    def __len__(self) -> int:
        return len(self.frame)


def read_captions(
    path: str | Path,
    form: str = "auto",
    *,
    location: str | None = None,
    caption: str | None = None,
    split: str | None = None,
    images: str | Path | None = None,
    limit: int | None = None,
) -> CaptionTable:
    """Read a caption list.

    Args:
        path: The list (`.gz` is unpacked on the way), or a folder of images with `.txt` files.
        form: One of `FORMATS`, or `auto` to tell it by name and first line.
        location: Column with the URL or path, for `table`.
        caption: Column with the caption, for `table`.
        split: Only this split of a Karpathy file (`restval` belongs to `train`).
        images: Folder below which relative paths lie.
        limit: Only the first rows.

    Raises:
        UserError: the file is missing, of no known form, or has no usable row.
    """
    path = Path(path)
    if not path.exists():
        raise UserError("the caption list does not exist", where=str(path))
    try:
        return _read(path, form, location, caption, split, images, limit)
    except (pa.ArrowInvalid, OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"the caption list cannot be read: {error}", str(path), "download it again"
        ) from error


def _read(
    path: Path,
    form: str,
    location: str | None,
    caption: str | None,
    split: str | None,
    images: str | Path | None,
    limit: int | None,
) -> CaptionTable:
    if form == "auto":
        form = detect_form(path)
    if form not in FORMATS:
        raise UserError(f"caption form {form!r} is unknown", todo=f"use one of {FORMATS}")
    if form == "folder":
        rows = caption_files.read_folder(path)
    elif form in ("karpathy", "coco", "flickr-token"):
        rows = caption_files.read_structured(path, form, split)
    else:
        return _read_table(path, form, location, caption, images, limit)
    return _from_rows(rows[:limit], images, str(path))


def detect_form(path: Path) -> str:
    """Tell the form of a caption list by its name and first line.

    Raises:
        UserError: it is of no known form.
    """
    if path.is_dir():
        return "folder"
    name = path.name.removesuffix(".gz").lower()
    if name.endswith(".parquet"):
        return "table"
    with _open(path) as handle:
        start = handle.read(65536)
    first = start.split(b"\n", 1)[0].decode("utf-8", "replace").rstrip("\r")
    if name.endswith(".json"):
        return "karpathy" if b'"sentences"' in start or b'"sentids"' in start else "coco"
    if re.match(r"[^\t,]+\.(jpe?g|png)#\d+\t", first, re.IGNORECASE):
        return "flickr-token"
    cells = first.split("\t")
    if len(cells) >= 2 and re.match(r"https?://", cells[1]):
        return "cc3m"
    if len(cells) >= 2 and re.match(r"https?://", cells[0]):
        return "cc12m"
    header = {cell.strip().strip('"').lower() for cell in re.split(r"[\t,]", first)}
    if header & set(_LOCATION_NAMES) and header & set(_CAPTION_NAMES):
        return "table"
    raise UserError(
        "cannot tell what kind of caption list this is",
        where=str(path),
        todo=f"name it with --format ({', '.join(FORMATS)}); for a table with other column names "
        "also --location-column and --caption-column",
    )


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")  # type: ignore[return-value]


# ----------------------------------------------------------------------------- tables of rows


def _read_table(
    path: Path,
    form: str,
    location: str | None,
    caption: str | None,
    images: str | Path | None,
    limit: int | None,
) -> CaptionTable:
    """Read and repair a two-column table piece by piece, so that memory holds it once."""
    builder = _Builder()
    batches, where, what = _open_table(path, form, location, caption, builder)
    for batch in batches:
        if limit is not None:
            batch = batch.slice(0, max(0, limit - builder.rows))
        builder.add(batch.column(where), batch.column(what))
        if limit is not None and builder.rows >= limit:
            break
    return builder.finish(str(path), images)


def _open_table(
    path: Path, form: str, location: str | None, caption: str | None, builder: _Builder
) -> tuple[Iterable[pa.RecordBatch], str, str]:
    if path.name.lower().endswith(".parquet"):
        try:
            file = pyarrow.parquet.ParquetFile(path)
        except pa.ArrowInvalid as error:
            raise UserError(f"no parquet file: {error}", where=str(path)) from error
        where, what = _columns(file.schema_arrow.names, path, location, caption)
        return file.iter_batches(65536, columns=[where, what]), where, what
    with _open(path) as handle:
        first = handle.readline().decode("utf-8", "replace")
    separator = "\t" if "\t" in first else ","
    if form in ("cc3m", "cc12m"):
        names = ["caption", "url"] if form == "cc3m" else ["url", "caption"]
        where, what = "url", "caption"
    else:
        reader = pyarrow.csv.read_csv(
            io.BytesIO(first.encode()), parse_options=pyarrow.csv.ParseOptions(delimiter=separator)
        )
        names = reader.column_names
        where, what = _columns(names, path, location, caption)

    def skip(row: Any) -> str:
        # Not counted as a row: it may be reported before the rows that stand above it, and the
        # rows' numbers are their keys.
        builder.drop("malformed row")
        return "skip"

    stream = pyarrow.csv.open_csv(
        _open(path),
        read_options=pyarrow.csv.ReadOptions(
            column_names=names, skip_rows=0 if form in ("cc3m", "cc12m") else 1, use_threads=False
        ),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=separator,
            # The Conceptual Captions files do not quote: a lone " in a caption is a character.
            quote_char=False if form in ("cc3m", "cc12m") else '"',
            newlines_in_values=form not in ("cc3m", "cc12m"),
            invalid_row_handler=skip,
        ),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.binary()), include_columns=[where, what]
        ),
    )
    return stream, where, what


def _columns(
    names: Sequence[str], path: Path, location: str | None, caption: str | None
) -> tuple[str, str]:
    """Pick the two columns: those that were named, else the first with a usual name."""
    lower = {name.lower(): name for name in reversed(names)}

    def pick(asked: str | None, usual: tuple[str, ...], option: str) -> str:
        for name in [asked] if asked else usual:
            if name in names:
                return str(name)
            if not asked and name in lower:
                return lower[str(name)]
        raise UserError(
            f"no column {asked!r}" if asked else f"none of the columns is called {usual}",
            where=str(path),
            todo=f"name it with {option}; there are {', '.join(names)}",
        )

    return (
        pick(location, _LOCATION_NAMES, "--location-column"),
        pick(caption, _CAPTION_NAMES, "--caption-column"),
    )


class _Builder:
    """Collects repaired rows as Arrow arrays and counts what it drops."""

    def __init__(self) -> None:
        self.rows = 0
        self.dropped: dict[str, int] = {}
        self.numbers: list[np.ndarray] = []
        self.locations: list[pa.Array] = []
        self.captions: list[pa.Array] = []

    def drop(self, reason: str, count: int = 1) -> None:
        if count:
            self.dropped[reason] = self.dropped.get(reason, 0) + count

    def add(self, locations: pa.Array, captions: pa.Array) -> None:
        numbers, where, texts = [], [], []
        for number, (location, caption) in enumerate(
            zip(locations.to_pylist(), captions.to_pylist(), strict=True), start=self.rows
        ):
            place = _text(location).strip()
            text = repair_text(_text(caption))
            if not text or not place:
                self.drop("empty caption" if place else "empty location")
                continue
            numbers.append(number)
            where.append(place)
            texts.append(text)
        self.rows += len(locations)
        self.numbers.append(np.asarray(numbers, dtype=np.int64))
        self.locations.append(pa.array(where, pa.large_string()))
        self.captions.append(pa.array(texts, pa.large_string()))

    def finish(self, source: str, images: str | Path | None) -> CaptionTable:
        if not any(len(part) for part in self.numbers):
            raise UserError(
                f"no usable row among {self.rows} (dropped: {self.dropped})", where=source
            )
        numbers = np.concatenate(self.numbers)
        # Chunked, so that nothing is copied: of the longest columns there is only ever one.
        locations, captions = pa.chunked_array(self.locations), pa.chunked_array(self.captions)
        self.numbers, self.locations, self.captions = [], [], []
        where = string_hashes(locations)
        both = where * np.uint64(0x9E3779B97F4A7C15) ^ string_hashes(captions)
        keep = first_of_each(both)
        self.drop("exact duplicate", int((~keep).sum()))
        if not keep.all():
            mask = pa.array(keep)
            numbers, where = numbers[keep], where[keep]
            locations, captions = locations.filter(mask), captions.filter(mask)
        return _grouped(numbers, where, locations, captions, source, images, self.dropped)


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return "" if value is None else str(value)


def _grouped(
    numbers: np.ndarray,
    where: np.ndarray,
    locations: pa.ChunkedArray,
    captions: pa.ChunkedArray,
    source: str,
    images: str | Path | None,
    dropped: dict[str, int],
) -> CaptionTable:
    """Join the captions of rows that name the same image, in order of first appearance."""
    if first_of_each(where).all():
        lists = pa.chunked_array(
            [_lists(np.arange(len(part) + 1), part) for part in captions.chunks]
        )
        places = locations
    else:
        codes, _ = pd.factorize(where)
        order = np.argsort(codes, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(codes))])
        first = order[offsets[:-1]]
        lists = _lists(offsets, captions.take(pa.array(order)).combine_chunks())
        places, numbers = locations.take(pa.array(first)), numbers[first]
    keys = pc.utf8_lpad(pa.array(numbers).cast(pa.large_string()), 9, "0")
    urls = pc.all(pc.match_substring_regex(places, "^[a-zA-Z][a-zA-Z0-9+.-]*://")).as_py()
    if not urls:
        base = Path(images) if images else Path(source).parent
        places = pa.array([str(base / item) for item in places.to_pylist()], pa.large_string())
    frame = pd.DataFrame(
        {
            "key": pd.Series(pd.arrays.ArrowExtensionArray(keys)),
            "url" if urls else "path": pd.Series(pd.arrays.ArrowExtensionArray(places)),
            "captions": pd.Series(pd.arrays.ArrowExtensionArray(lists)),
        }
    )
    return CaptionTable(frame, dict(sorted(dropped.items())), source)


def _lists(offsets: np.ndarray, captions: pa.Array) -> pa.Array:
    """Return one list of captions per image; `captions` is in the order of the images."""
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), captions)


# --------------------------------------------------------------------- rows with several captions


def _from_rows(
    rows: list[caption_files.Row], images: str | Path | None, source: str
) -> CaptionTable:
    """Normalise rows that already know their key and all their captions."""
    dropped: dict[str, int] = {}

    def drop(reason: str, count: int = 1) -> None:
        if count:
            dropped[reason] = dropped.get(reason, 0) + count

    base = (
        Path(images) if images else Path(source if Path(source).is_dir() else Path(source).parent)
    )
    keys: list[str] = []
    paths: list[str] = []
    captions: list[list[str]] = []
    unique = unique_keys()
    seen: set[str] = set()
    for row in rows:
        texts = [text for text in map(repair_text, row.captions) if text]
        distinct = list(dict.fromkeys(texts))
        drop("empty caption", len(row.captions) - len(texts))
        drop("exact duplicate", len(texts) - len(distinct))
        if not distinct or row.path in seen:
            drop("image without caption" if not distinct else "image listed twice")
            continue
        seen.add(row.path)
        keys.append(unique(row.path))
        paths.append(str(base / row.path))
        # All captions are kept, repetitions too: recall over five captions per image is the
        # published protocol, and some images do have the same sentence twice.
        captions.append(texts if row.protocol else distinct)
    if not keys:
        raise UserError(f"no usable row (dropped: {dropped})", where=source)
    frame = pd.DataFrame(
        {
            "key": pd.Series(keys, dtype=pd.ArrowDtype(pa.large_string())),
            "path": pd.Series(paths, dtype=pd.ArrowDtype(pa.large_string())),
            "captions": pd.Series(captions, dtype=pd.ArrowDtype(pa.large_list(pa.large_string()))),
        }
    )
    return CaptionTable(frame, dict(sorted(dropped.items())), source)
