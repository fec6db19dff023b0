"""How many samples shards hold, from the manifests beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from data_prep.errors import UserError
from data_prep.locations import is_remote, read_remote_text
from data_prep.shards import MANIFEST_SUFFIX, Manifest, ShardEntry

_NUMBERED = re.compile(r"(.+?)-?\d+\.tar\Z")


def known_counts(found: Iterable[str]) -> dict[str, ShardEntry]:
    """Return the manifest entries of those shard locations that a manifest lists.

    Local shards are compared with the manifest in size.

    Raises:
        UserError: a size differs, or two manifests disagree on a shard.
    """
    folders: dict[str, list[str]] = {}
    for location in found:
        if not location.startswith("pipe:"):
            folder, _, name = location.rpartition("/")
            folders.setdefault(folder, []).append(name)
    known: dict[str, ShardEntry] = {}
    for folder, names in folders.items():
        remote = is_remote(folder + "/")
        entries = _remote_entries(folder, names) if remote else folder_entries(Path(folder or "."))
        for name in names:
            entry = entries.get(name)
            if entry is None:
                continue
            location = f"{folder}/{name}" if folder or name.startswith("/") else name
            if not remote:
                _check_size(Path(location), entry)
            known[location] = entry
    return known


def _check_size(path: Path, entry: ShardEntry) -> None:
    size = path.stat().st_size
    if size != entry.bytes:
        raise UserError(
            f"the shard has {size} bytes, its manifest says {entry.bytes}",
            where=str(path),
            todo="it was cut short or rewritten: fetch or build it again, or run "
            "`inherclip verify --repair` on the folder",
        )


def folder_entries(folder: Path) -> dict[str, ShardEntry]:
    """Return the entries of all manifests in a local folder by shard name.

    Raises:
        UserError: a damaged manifest, or two that disagree on a shard.
    """
    entries: dict[str, ShardEntry] = {}
    for path in sorted([*folder.glob(f"*{MANIFEST_SUFFIX}"), *folder.glob("manifest.json")]):
        for entry in Manifest.load(path).shards:
            other = entries.get(entry.name)
            if other and (other.samples, other.bytes) != (entry.samples, entry.bytes):
                raise UserError(
                    f"two manifests disagree on {entry.name}",
                    where=str(path),
                    todo="delete the older one",
                )
            entries[entry.name] = entry
    return entries


def _remote_entries(folder: str, names: list[str]) -> dict[str, ShardEntry]:
    """Look for manifests under the names that the shards' own names suggest."""
    candidates = {"manifest.json": None}
    for name in names:
        match = _NUMBERED.match(name)
        if match:
            candidates[match[1] + MANIFEST_SUFFIX] = None
    entries: dict[str, ShardEntry] = {}
    for candidate in candidates:
        url = f"{folder}/{candidate}"
        text = read_remote_text(url)
        if text is not None and _is_json(text):
            entries.update({entry.name: entry for entry in Manifest.parse(text, url).shards})
    return entries


def _is_json(text: str) -> bool:
    """Some stores answer a missing file with a page."""
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
