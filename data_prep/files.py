"""Files that are either absent or whole: temporary name first, rename last."""

from __future__ import annotations

import errno
import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.errors import UserError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; it takes the final name only if the block succeeds.

    The name starts with a dot and ends in `.tmp`, so that a process killed in the block leaves
    nothing that a reader of the folder could take for a finished file.

    Raises:
        UserError: the disk is full (the temporary file is removed).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with explain_full_disk(path):
            yield temporary
            sync(temporary)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's content is on the disk, not only in the machine's memory."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


@contextmanager
def explain_full_disk(path: str | Path) -> Iterator[None]:
    """Turn "no space left" within the block into a message that names the file.

    Raises:
        UserError: the disk or the quota is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                "no space left on the device",
                where=str(path),
                todo="free some space or choose another folder, then run the same command again; "
                "finished work is kept",
            ) from error
        raise


def atomic_write(path: str | Path, data: str | bytes) -> None:
    """Write `data` (text as UTF-8) to `path` so that no reader ever sees a part of it."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def sha256_file(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file, read in 1 MiB blocks."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
