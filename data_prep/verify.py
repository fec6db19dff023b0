"""A folder of shards in, a list of what is wrong with them out; `repair.py` mends what it can."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.images import near_pairs
from data_prep.locations import expand, is_remote
from data_prep.shards import MANIFEST_SUFFIX, Manifest, ShardEntry
from data_prep.verify_shard import Finding, ShardReport, check_shard

__all__ = ["Finding", "Verification", "verify"]


@dataclass
class Verification:
    """The outcome of checking a folder.

    Attributes:
        reports: Per shard.
        findings: All that is wrong, shards first, then what concerns several of them.
        notes: What could not be checked, or is odd without being wrong.
        manifests: By path; several sets may share a folder.
    """

    folder: Path
    reports: list[ShardReport] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    manifests: dict[Path, Manifest] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings


def verify(
    folder: str | Path,
    pattern: str | list[str] = "*.tar*",
    *,
    decode: bool = True,
    against: Iterable[str | Path] = (),
    looks: bool = False,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Check the shards of a folder, their manifests, and that no image is in two of its sets.

    Args:
        folder: Local folder.
        pattern: Which shards, as for the reader.
        decode: Decode every image.
        against: Other folders whose images must not occur in this one (evaluation sets).
        looks: Also look for images that are nearly the same, by perceptual hash.
        processes: Worker processes; one per core by default.
        progress: Called with shards finished and shards in all.

    Raises:
        UserError: the folder is missing, is remote, or holds no shard and no manifest.
    """
    if is_remote(str(folder)):
        raise UserError("only local folders can be verified", where=str(folder))
    result = Verification(Path(folder))
    if not result.folder.is_dir():
        raise UserError("the folder does not exist", where=str(folder))
    _load_manifests(result)
    paths = _shards(result, pattern)
    others = [path for place in against for path in map(Path, expand(place, "*.tar"))]
    check = partial(check_shard, decode=decode, looks=looks)
    compare = partial(check_shard, decode=False, looks=looks)
    count = len(paths) + len(others)
    reports: list[ShardReport] = []
    for report in _checked(check, paths, compare, others, processes):
        reports.append(report)
        if progress:
            progress(len(reports), count)
    result.reports = reports[: len(paths)]
    for report in result.reports:
        result.findings += report.findings
    _check_manifests(result, whole=pattern == "*.tar*")
    _check_rows(result)
    _check_keys(result)
    _check_leaks(result, reports)
    return result


def _shards(result: Verification, pattern: str | list[str]) -> list[Path]:
    try:
        return [Path(path) for path in expand(result.folder, pattern)]
    except UserError:
        if result.manifests and pattern == "*.tar*":
            return []  # every shard is missing: the manifest names them
        raise


def _checked(
    check: Callable[[Path], ShardReport],
    paths: list[Path],
    compare: Callable[[Path], ShardReport],
    others: list[Path],
    processes: int | None,
) -> Iterable[ShardReport]:
    """Check shards in order, in several processes where that helps."""
    processes = min(processes or len(os.sched_getaffinity(0)), len(paths) + len(others))
    if processes <= 1:
        yield from map(check, paths)
        yield from map(compare, others)
        return
    # Forked: nothing has been started here that a fork would break, and it costs no imports.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        first, second = pool.map(check, paths), pool.map(compare, others)
        yield from first
        yield from second


def _load_manifests(result: Verification) -> None:
    paths = [*result.folder.glob(f"*{MANIFEST_SUFFIX}"), *result.folder.glob("manifest.json")]
    for path in sorted(paths):
        try:
            result.manifests[path] = Manifest.load(path)
        except UserError as error:
            result.findings.append(Finding(path.name, "damaged manifest", error.what))
    if not paths:
        result.notes.append("there is no manifest: counts and checksums had nothing to match")
    for path in sorted(result.folder.glob(".*.tmp")):
        result.notes.append(f"{path.name} was left by a run that was killed; it can be deleted")
    for path in sorted(result.folder.glob(".*.progress.json")):
        result.findings.append(
            Finding(path.name[1:], "unfinished", "a build was killed; run its command again")
        )


def _check_manifests(result: Verification, whole: bool) -> None:
    """Compare shards with their entries; with the whole folder, also look for missing ones."""
    found = {report.path.name: report for report in result.reports}
    listed: dict[str, ShardEntry] = {}
    for path, manifest in result.manifests.items():
        for entry in manifest.shards:
            if entry.name in listed and listed[entry.name] != entry:
                result.findings.append(Finding(entry.name, "listed twice", path.name))
            listed[entry.name] = entry
            report = found.get(entry.name)
            if report is None:
                if whole or not (result.folder / entry.name).exists():
                    result.findings.append(Finding(entry.name, "missing", f"in {path.name}"))
            else:
                _compare(result, entry, report)
    if result.manifests and whole:
        for name in found.keys() - listed.keys():
            result.findings.append(Finding(name, "unlisted", "in no manifest"))


def _compare(result: Verification, entry: ShardEntry, report: ShardReport) -> None:
    pairs = [("bytes", entry.bytes, report.bytes), ("samples", entry.samples, report.samples)]
    if entry.sha256:
        pairs.append(("checksum", entry.sha256, report.sha256))  # type: ignore[arg-type]
    for kind, expected, there in pairs:
        if expected != there:
            result.findings.append(
                Finding(entry.name, kind, f"{there}, the manifest says {expected}")
            )
    if not entry.samples and not report.samples:  # a shard without a living link is legitimate
        result.findings[:] = [
            item
            for item in result.findings
            if (item.shard, item.kind) != (entry.name, "no samples")
        ]


def _check_rows(result: Verification) -> None:
    """Compare downloaded shards with the status of their rows."""
    for report in result.reports:
        path = report.path.with_suffix(".rows.parquet")
        if not path.is_file():
            continue
        import pandas as pd

        try:
            rows = pd.read_parquet(path, columns=["key", "status"])
        except Exception as error:  # whatever a parquet reader raises, the file is unusable
            result.findings.append(Finding(path.name, "damaged rows", str(error)[:100]))
            continue
        keys = rows["key"][rows["status"] == "ok"].tolist()
        if keys != report.keys:
            detail = f"{len(keys)} rows are ok, the shard holds {len(report.keys)} samples"
            result.findings.append(Finding(path.name, "rows differ", detail))


def _check_keys(result: Verification) -> None:
    """Find keys that occur in two shards of the same set."""
    sets: dict[str, dict[str, str]] = {}
    for report in result.reports:
        seen = sets.setdefault(set_name(report.path), {})
        name = report.path.name
        for position, key in enumerate(report.keys):
            if seen.setdefault(key, name) != name:
                detail = f"also in {seen[key]}"
                result.findings.append(Finding(name, "key twice", detail, position, key))


def set_name(path: Path) -> str:
    """Return the set that a shard belongs to: its folder, and its name without the number."""
    return f"{path.parent}/{re.sub(r'[-_]?[0-9]+$', '', path.name.split('.')[0])}"


def _check_leaks(result: Verification, reports: list[ShardReport]) -> None:
    """Find images that occur in two sets, by content and, where asked, by their looks."""
    if len({set_name(report.path) for report in reports}) < 2:
        return
    owners = np.repeat(np.arange(len(reports)), [len(r.image_hashes) for r in reports])
    places = np.concatenate([np.arange(len(r.image_hashes)) for r in reports])
    names = [set_name(report.path) for report in reports]
    pairs: dict[tuple[int, int], str] = {}
    hashes = np.concatenate([r.image_hashes for r in reports])
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero((np.diff(hashes[order]) == 0) & (hashes[order][1:] != 0))
    for at in same.tolist():
        pairs[int(order[at]), int(order[at + 1])] = "the same image"
    if all(len(report.looks) == len(report.image_hashes) for report in reports):
        looks = np.concatenate([report.looks for report in reports])
        for later, earlier, gap in near_pairs(looks):
            if looks[later] and looks[earlier]:
                pairs.setdefault((earlier, later), f"looks alike ({gap} bits differ)")
    for (one, other), what in sorted(pairs.items()):
        first, second = reports[owners[one]], reports[owners[other]]
        if names[owners[one]] == names[owners[other]]:
            continue
        # The training side is the one to clean: evaluation sets are the same for everybody.
        if "train" in second.path.name and "train" not in first.path.name:
            (one, first), (other, second) = (other, second), (one, first)
        if first not in result.reports[:]:
            (one, first), (other, second) = (other, second), (one, first)
        key, twin = first.keys[places[one]], second.keys[places[other]]
        detail = f"{what} as {twin} in {second.path.name}"
        result.findings.append(Finding(first.path.name, "leak", detail, int(places[one]), key))
