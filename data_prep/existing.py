"""Shards that somebody else made: the Hugging Face mirror, img2dataset's and open_clip's output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from data_prep.errors import UserError
from data_prep.files import sha256_file
from data_prep.locations import expand
from data_prep.shards import Manifest, ShardEntry
from data_prep.tar_index import sample_bounds

MIRROR = "pixparse/cc3m-wds"
# Samples of the whole mirror, as its maintainers give them (576 and 16 shards).
MIRROR_SAMPLES = {"cc3m-train": (576, 2_905_954), "cc3m-validation": (16, 13_443)}


def scan(
    folder: str | Path,
    pattern: str | list[str] = "*.tar",
    *,
    out: str | Path | None = None,
    source: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Build a manifest for tars that have none, by reading each once.

    Shards whose entry (of an earlier scan) still fits in size are not read again. Where
    img2dataset left its `_stats.json`, the failures are taken over and the counts compared.

    Args:
        folder: Where the tars are.
        pattern: Which of them.
        out: Manifest file; `folder/manifest.json` by default.
        source: Where they come from, for the manifest.
        progress: Called with shards finished and shards in all.

    Raises:
        UserError: no tar, a compressed or damaged one, or one with another number of samples
            than img2dataset wrote.
    """
    folder = Path(folder)
    target = Path(out) if out else folder / "manifest.json"
    known: dict[str, ShardEntry] = {}
    if target.is_file():
        known = {entry.name: entry for entry in Manifest.load(target).shards}
    paths = [Path(path) for path in expand(folder, pattern)]
    entries = []
    for number, path in enumerate(paths, 1):
        old = known.get(path.name)
        if old is not None and old.sha256 and old.bytes == path.stat().st_size:
            entries.append(old)
        else:
            entries.append(_scan_one(path))
            if number % 50 == 0:  # so that a scan of thousands that is killed has not been in vain
                Manifest(source=source, shards=entries).save(target)
        if progress:
            progress(number, len(paths))
    manifest = Manifest(source=source or folder.name, settings={"scanned": True}, shards=entries)
    if not manifest.num_samples:
        raise UserError("the tars hold no samples", where=str(folder))
    manifest.save(target)
    return manifest


def _scan_one(path: Path) -> ShardEntry:
    entry = ShardEntry(
        name=path.name,
        samples=len(sample_bounds(path)) - 1,
        bytes=path.stat().st_size,
        sha256=sha256_file(path),
    )
    stats = path.with_name(f"{path.stem}_stats.json")
    if not stats.is_file():
        if (path.parent / f"{path.stem}.parquet").is_file():
            raise UserError(
                "img2dataset did not finish this shard: it has a parquet but no stats",
                where=str(path),
                todo="run img2dataset again, or move the shard out of the folder",
            )
        return entry
    try:
        record = json.loads(stats.read_text("utf-8"))
        successes = int(record["successes"])
        status = record.get("status_dict", {})
        entry.failures = {
            str(name): int(count) for name, count in sorted(status.items()) if name != "success"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"no img2dataset statistics ({error})", where=str(stats)) from error
    if successes != entry.samples:
        raise UserError(
            f"img2dataset wrote {successes} samples, the tar holds {entry.samples}",
            where=str(path),
            todo=f"delete {path.name} and {stats.name} and run img2dataset again",
        )
    return entry


def fetch_mirror(
    out: str | Path,
    *,
    repository: str = MIRROR,
    patterns: list[str] | None = None,
    part: tuple[int, int] = (0, 1),
    revision: str = "main",
    workers: int = 8,
) -> list[Path]:
    """Fetch shards of a data set on the Hugging Face hub; resumable, files are checked by the hub.

    Args:
        out: Folder for the files.
        repository: `owner/name` of the data set.
        patterns: Which of its files, globs; all tars by default.
        part: (i, n): every n-th shard from i on, for job arrays.
        revision: Branch, tag or commit.
        workers: Files fetched at a time.

    Returns:
        The local tars of this part.

    Raises:
        UserError: the hub cannot be reached, has no such data set, or no such file.
    """
    from fnmatch import fnmatch

    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().dataset_info(repository, revision=revision, files_metadata=True)
        sizes = {item.rfilename: item.size for item in info.siblings or []}
        wanted = patterns or ["*.tar"]
        names = sorted(n for n in sizes if any(fnmatch(n, pattern) for pattern in wanted))
        names = names[part[0] :: part[1]]
        if not names:
            raise UserError(f"no file matches {wanted}", where=f"{repository}, revision {revision}")
        snapshot_download(
            repository,
            repo_type="dataset",
            revision=info.sha or revision,
            local_dir=str(out),
            allow_patterns=names,
            max_workers=workers,
        )
    except UserError:
        raise
    except Exception as error:  # the hub's client raises those of whatever HTTP library it has
        raise UserError(
            f"the hub did not deliver: {type(error).__name__}: {str(error)[:300]}",
            where=repository,
            todo="check the network and, for a gated data set, HF_TOKEN; the same command "
            "continues with the files that are missing",
        ) from error
    paths = [Path(out) / name for name in names]
    for path in paths:
        if not path.is_file() or sizes[path.name] not in (None, path.stat().st_size):
            raise UserError("the file is missing or cut short", where=str(path), todo="run again")
    return paths


def mirror_shortfall(manifest: Manifest) -> list[str]:
    """Name the difference between a scanned mirror and what its maintainers published."""
    problems = []
    for prefix, (shards, samples) in MIRROR_SAMPLES.items():
        there = [entry for entry in manifest.shards if entry.name.startswith(prefix)]
        found = sum(entry.samples for entry in there)
        if there and (len(there), found) != (shards, samples):
            problems.append(
                f"{prefix}: {found} samples in {len(there)} shards; the whole mirror has "
                f"{samples} in {shards}"
            )
    return problems
