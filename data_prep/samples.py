"""One sample as its shard holds it, and what happens when it is corrupt."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from data_prep.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")


class CorruptSampleError(ValueError):
    """A sample that is there but unusable; `CorruptionBudget` decides whether that ends the run."""


@dataclass(frozen=True)
class RawSample:
    """One sample as its shard holds it, undecoded.

    Attributes:
        key: The sample's name.
        files: Extension without its dot -> content.
        shard: File name of the shard, for messages.
    """

    key: str
    files: dict[str, bytes] = field(repr=False)
    shard: str

    def _corrupt(self, what: str) -> CorruptSampleError:
        return CorruptSampleError(f"{self.shard}, sample {self.key!r}: {what}")

    @property
    def image_extension(self) -> str:
        """Extension of the image, "" where there is none."""
        return next((name for name in IMAGE_EXTENSIONS if name in self.files), "")

    @property
    def image_bytes(self) -> bytes:
        """The encoded image.

        Raises:
            CorruptSampleError: the sample has no image or an empty one.
        """
        data = self.files.get(self.image_extension, b"")
        if not data:
            raise self._corrupt("no image")
        return data

    @property
    def record(self) -> dict[str, Any]:
        """The sample's json, empty where it has none.

        Raises:
            CorruptSampleError: the json cannot be read.
        """
        found: dict[str, Any] | None = self.__dict__.get("_record")
        if found is not None:
            return found
        try:
            record = json.loads(self.files.get("json", b"{}"))
        except ValueError as error:
            raise self._corrupt(f"unreadable json ({error})") from None
        if not isinstance(record, dict):
            raise self._corrupt("the json is no object")
        # Not functools.cached_property: its lock, in Python 3.11, costs more than the parsing.
        self.__dict__["_record"] = record
        return record

    @property
    def captions(self) -> list[str]:
        """The captions: `captions` of the json, else the txt, else the json's `caption`.

        Raises:
            CorruptSampleError: there is none, or all are empty.
        """
        found = self.record.get("captions")
        if found is None and "txt" in self.files:
            try:
                found = [self.files["txt"].decode("utf-8")]
            except UnicodeDecodeError:
                raise self._corrupt("the txt is not UTF-8") from None
        if found is None:
            found = [self.record.get("caption")]
        if not isinstance(found, list):
            raise self._corrupt("`captions` is no list")
        texts = [text.strip() for text in found if isinstance(text, str) and text.strip()]
        if not texts:
            raise self._corrupt("no caption")
        return texts

    @property
    def label(self) -> int | None:
        """The class: `label` of the json, else the cls file, else None.

        Raises:
            CorruptSampleError: there is one that is no whole number.
        """
        found = self.record.get("label")
        if found is None and "cls" in self.files:
            found = self.files["cls"].decode("ascii", "replace").strip()
        if found is None:
            return None
        if isinstance(found, int) and not isinstance(found, bool):
            return found
        if isinstance(found, str) and re.fullmatch(r"\d+", found):
            return int(found)
        raise self._corrupt(f"label {found!r} is no whole number")


class CorruptionBudget:
    """Counts corrupt samples and ends the run where they are more than a share of all.

    One bad sample must not end a night's training, and a broken data set must not be trained on.

    Args:
        share: Greatest tolerated share of corrupt samples, 0 to 1.
        grace: Samples before the share is judged; up to then `share * grace` may be corrupt.
    """

    def __init__(self, share: float = 0.01, grace: int = 1000) -> None:
        if not 0 <= share <= 1:
            raise UserError(f"the share of corrupt samples is {share}, it must lie in 0 to 1")
        self.share, self.grace = share, grace
        self.seen, self.corrupt = 0, 0
        self.examples: list[str] = []

    def count(self, seen: int, corrupt: Iterable[str] = ()) -> None:
        """Add samples read, and the messages of those among them that were corrupt.

        Raises:
            UserError: more than the tolerated share was corrupt.
        """
        self.seen += seen
        for message in corrupt:
            self.corrupt += 1
            if len(self.examples) < 5:
                self.examples.append(message)
        if self.corrupt > self.share * max(self.seen, self.grace):
            raise UserError(
                f"{self.corrupt} of {self.seen} samples are corrupt, more than the tolerated "
                f"{self.share:.2%}: {'; '.join(self.examples)}",
                todo="run `inherclip verify --repair` on the shards, or raise the tolerated share",
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, JSON-able."""
        return {"seen": self.seen, "corrupt": self.corrupt, "examples": list(self.examples)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the counts of `state_dict`."""
        self.seen, self.corrupt = int(state["seen"]), int(state["corrupt"])
        self.examples = list(state["examples"])
