"""What `inherclip verify` prints: a line per shard, the faults, what was repaired."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_prep.verify import Verification, verify

_SHOWN = 50  # findings printed in full; the counts are complete


def run(args: argparse.Namespace) -> int:
    """Verify, maybe repair; return 0 where all is well in the end, else 1."""
    console = Console(highlight=False)
    result = _verify(args)
    show(result, console)
    if result.clean or not args.repair:
        return 0 if result.clean else 1
    from data_prep.repair import repair

    console.print("\nrepairing")
    for done in repair(result):
        names = ", ".join(done.dropped[:5]) + (", ..." if len(done.dropped) > 5 else "")
        console.print(
            f"{done.shard}: {done.kept} samples kept, {len(done.dropped)} dropped {names}"
        )
    result = _verify(args)
    show(result, console)
    return 0 if result.clean else 1


def _verify(args: argparse.Namespace) -> Verification:
    begin = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal begin
        if time.monotonic() - begin > 10:
            begin = time.monotonic()
            print(f"{done}/{total} shards checked", file=sys.stderr)

    return verify(
        args.folder,
        args.shards or "*.tar*",
        decode=not args.no_decode,
        against=args.against,
        looks=args.near_duplicates,
        processes=args.processes,
        progress=progress,
    )


def show(result: Verification, console: Console) -> None:
    """Print the table of shards and the faults."""
    faults: dict[str, Counter[str]] = {}
    for item in result.findings:
        faults.setdefault(item.shard, Counter())[item.kind] += 1
    table = Table("shard", "samples", "MB", "state", box=None, pad_edge=False)
    names = [report.path.name for report in result.reports]
    for report in result.reports:
        counts = faults.get(report.path.name)
        table.add_row(
            escape(report.path.name),
            f"{report.samples:,}",
            f"{report.bytes / 1e6:.1f}",
            _state(counts),
        )
    for name in faults:
        if name not in names:
            table.add_row(escape(name), "", "", _state(faults[name]))
    console.print(table)
    for item in result.findings[:_SHOWN]:
        place = f"{item.shard}" + (f", sample {item.key!r}" if item.key else "")
        console.print(f"{escape(place)}: {item.kind} {escape(item.detail)}".rstrip())
    if len(result.findings) > _SHOWN:
        console.print(f"... and {len(result.findings) - _SHOWN} more")
    for note in result.notes:
        console.print(f"note: {escape(note)}")
    samples = sum(report.samples for report in result.reports)
    size = sum(report.bytes for report in result.reports) / 1e6
    verdict = "nothing wrong" if result.clean else f"{len(result.findings)} faults"
    console.print(f"{len(names)} shards, {samples:,} samples, {size:,.1f} MB: {verdict}")


def _state(counts: Counter[str] | None) -> str:
    if not counts:
        return "ok"
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
