"""Where shards lie: local paths, braces and globs, and remote URLs through a local file cache."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import re
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.files import atomic_path

_URL = re.compile(r"[a-z][a-z0-9+.]*://", re.IGNORECASE)
_MAGIC = re.compile(r"[*?\[]")


def is_remote(location: str) -> bool:
    """Tell whether a location needs the network or a command to be read."""
    return location.startswith("pipe:") or (
        bool(_URL.match(location)) and not location.startswith("file://")
    )


def join(root: str | Path, pattern: str) -> str:
    """Put a pattern below a root, unless it is an absolute path or a URL itself."""
    if pattern.startswith(("pipe:", "/")) or _URL.match(pattern):
        return pattern.removeprefix("file://")
    root = str(root).removeprefix("file://").rstrip("/")
    return f"{root}/{pattern}" if root else pattern


def expand(root: str | Path, pattern: str | list[str], *, allow_pipe: bool = False) -> list[str]:
    """Return the shard locations that patterns name, in order and without repetition.

    Args:
        root: Folder or URL below which relative patterns lie.
        pattern: Braces (`x-{000000..000005}.tar`), globs, plain names, or a list of these.
        allow_pipe: Whether `pipe:COMMAND` may run a command.

    Raises:
        UserError: the folder or a named file is missing, a pattern matches nothing, or a pipe
            that was not allowed.
    """
    from braceexpand import braceexpand

    found: dict[str, None] = {}
    for item in [pattern] if isinstance(pattern, str) else pattern:
        location = join(root, item)
        if location.startswith("pipe:"):
            _check_pipe(location, allow_pipe)
        elif not is_remote(location):
            _check_folder(location)
        try:
            names = list(braceexpand(location))
        except ValueError as error:  # unbalanced
            raise UserError(f"the braces cannot be expanded ({error})", where=item) from None
        for name in names:
            found.update(dict.fromkeys(_matches(name)))
    if not found:
        raise UserError("no shard pattern was given", where=str(root))
    return list(found)


def _check_pipe(location: str, allowed: bool) -> None:
    if not allowed:
        raise UserError(
            "`pipe:` runs a shell command and is not allowed by default",
            where=location,
            todo="download the shards first, use an s3://, https:// or hf:// URL, or allow pipes "
            "where you trust who wrote this",
        )


def _check_folder(location: str) -> None:
    """Name the missing folder itself, not every shard that would have been in it."""
    folder = Path(os.path.dirname(_MAGIC.split(location.split("{")[0])[0]) or ".")
    if not folder.is_dir():
        raise UserError(
            "the folder does not exist",
            where=str(folder),
            todo="check the path, or write the shards with `inherclip prepare`",
        )


def _matches(name: str) -> list[str]:
    if name.startswith("pipe:"):
        return [name]
    if is_remote(name):
        if not _MAGIC.search(name):
            return [name]  # whether it is there shows on first use; asking costs a request each
        system, path = filesystem(name)
        matches = [system.unstrip_protocol(match) for match in sorted(system.glob(path))]
    elif _MAGIC.search(name):
        matches = sorted(path for path in glob.glob(name) if Path(path).is_file())
    else:
        matches = [name] if Path(name).is_file() else []
    if not matches:
        folder = Path(name).parent
        there = sorted(path.name for path in folder.glob("*.tar"))[:5] if folder.is_dir() else []
        raise UserError(
            "no shard matches",
            where=name,
            todo=f"the folder holds {', '.join(there)}, ..." if there else "no .tar is in there",
        )
    return matches


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the path in it.

    Raises:
        UserError: the protocol is unknown or its package is not installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"cannot open this kind of URL ({error})",
            where=url,
            todo="install the fsspec package of that protocol, e.g. `pip install s3fs` for s3://",
        ) from error


def default_cache() -> Path:
    """Return the folder for copies of remote shards (`INHERCLIP_CACHE` overrides it)."""
    base = os.environ.get("INHERCLIP_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(base) if base else home / "inherclip" / "shards"


def local_path(location: str, cache: Path) -> Path:
    """Return a local file for a location, fetching a remote one into the cache on first use.

    One process fetches, the others wait for it; a fetch that is killed leaves nothing behind
    that could be taken for the shard.

    Raises:
        UserError: the file cannot be fetched.
    """
    if not is_remote(location):
        return Path(location)
    name = re.sub(r"[^\w.-]", "_", location.rsplit("/", 1)[-1])[-80:]
    target = cache / hashlib.sha256(location.encode()).hexdigest()[:24] / name
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / ".lock").open("w") as lock:
        # Where a file system has no locks, two may fetch the same shard: slower, not wrong.
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_file():
            with atomic_path(target) as temporary:
                _fetch(location, temporary)
    return target


def _fetch(location: str, target: Path) -> None:
    if location.startswith("pipe:"):
        with target.open("wb") as handle:
            result = subprocess.run(location[5:], shell=True, stdout=handle, check=False)
        if result.returncode:
            raise UserError(f"the command ended with code {result.returncode}", where=location)
        return
    system, path = filesystem(location)
    try:
        system.get_file(path, str(target))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot fetch the shard: {type(error).__name__} {error}",
            where=location,
            todo="check the URL, the credentials of that store and the network",
        ) from error
    if not target.is_file():
        raise UserError("the store returned nothing", where=location)


def read_remote_text(url: str) -> str | None:
    """Return the text of a small remote file, or None where it is not there."""
    system, path = filesystem(url)
    try:
        return bytes(system.cat_file(path)).decode()
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    except OSError as error:
        raise UserError(f"cannot read it ({error})", where=url) from error
