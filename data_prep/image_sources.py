"""Images in a folder or a tar, by their relative path."""

from __future__ import annotations

import gzip
import os
import shutil
from pathlib import Path

from data_prep.caption_files import IMAGE_SUFFIXES
from data_prep.errors import UserError
from data_prep.files import atomic_path
from data_prep.tar_index import TarDamageError, scan_members


class ImageSource:
    """The images below a folder or in a tar, sorted by path.

    Args:
        path: Folder, `.tar`, or `.tar.gz`/`.tgz` (unpacked once to a plain tar in `scratch`).
        scratch: Folder for that.

    Raises:
        UserError: it is missing, damaged or holds no images.
    """

    def __init__(self, path: str | Path, scratch: str | Path) -> None:
        self.path = Path(path)
        self.places: dict[str, tuple[int, int]] = {}
        if self.path.is_dir():
            self.names = sorted(_walk(self.path))
        elif self.path.is_file():
            self.tar = _plain_tar(self.path, Path(scratch))
            self.names = self._scan()
        else:
            raise UserError("the folder or tar of images does not exist", where=str(path))
        if not self.names:
            raise UserError("there are no images in it", where=str(path))

    def _scan(self) -> list[str]:
        try:
            for member in scan_members(self.tar):
                name = member.name.removeprefix("./")
                if Path(name).suffix.lower() in IMAGE_SUFFIXES and "/._" not in f"/{name}":
                    self.places[name] = member.offset, member.size
        except TarDamageError as error:
            raise UserError(str(error), str(self.path), "download it again") from None
        return sorted(self.places)

    def read(self, name: str) -> bytes:
        """Return the bytes of an image."""
        if not self.places:
            return (self.path / name).read_bytes()
        offset, size = self.places[name]
        with self.tar.open("rb") as handle:
            return os.pread(handle.fileno(), size, offset)

    def find(self, name: str) -> str | None:
        """Return the path of an image that a list names, also where a list leaves folders out."""
        if not hasattr(self, "_by_tail"):
            self._known = set(self.names)
            self._by_tail: dict[str, str] = {}
            for known in self.names:
                self._by_tail.setdefault(known.rpartition("/")[2], known)
        return name if name in self._known else self._by_tail.get(name.rpartition("/")[2])


def _walk(folder: Path) -> list[str]:
    """List image files below a folder; `os.walk` is several times quicker than `rglob`."""
    found = []
    for place, _, names in os.walk(folder, followlinks=True):
        below = os.path.relpath(place, folder)
        prefix = "" if below == "." else below.replace(os.sep, "/") + "/"
        found += [
            prefix + name
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        ]
    return found


def _plain_tar(path: Path, scratch: Path) -> Path:
    with path.open("rb") as handle:
        if handle.read(2) != b"\x1f\x8b":
            return path
    target = scratch / f".{path.name}.{path.stat().st_size}.unpacked.tar"
    if not target.exists():
        try:
            with (
                atomic_path(target) as temporary,
                gzip.open(path) as packed,
                temporary.open("wb") as handle,
            ):
                shutil.copyfileobj(packed, handle, 1 << 20)
        except (EOFError, gzip.BadGzipFile) as error:
            raise UserError(f"damaged: {error}", str(path), "download it again") from error
    return target
