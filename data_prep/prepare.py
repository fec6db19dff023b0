"""What `inherclip prepare` does: one function per source, progress while it runs, a summary."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from data_prep.captions import CaptionTable, read_captions
from data_prep.download import DownloadPlan, DownloadResult, Progress, download
from data_prep.download_shard import StoreSettings
from data_prep.errors import UserError
from data_prep.fetch import FetchSettings
from data_prep.images import ImageSettings
from data_prep.shards import Manifest

# What a status means and what can be done about many of them.
ADVICE = {
    "http_404": "dead link: normal for old lists; a mirror of the data set has more",
    "http_410": "dead link, removed for good",
    "http_403": "the host refuses downloads; --contact with your address sometimes helps",
    "http_429": "the host asks for fewer requests: lower --per-host, then --retry-failed",
    "http_503": "the host was overloaded: --retry-failed later",
    "timeout": "slow hosts or a full line: fewer --threads or longer timeouts, then --retry-failed",
    "dns": "unknown hosts; where nearly all fail so, this machine's name server is the cause",
    "connection": "refused or broken off; where nearly all fail so, a firewall is in the way",
    "tls": "expired or wrong certificate of the host",
    "too_large": "raise --max-bytes if these images are wanted",
    "too_small": "lower --min-side if these images are wanted",
    "too_many_pixels": "raise --max-pixels if these images are wanted and memory allows",
    "not_an_image": "mostly pages that replace a removed image",
    "truncated": "cut short on the way or at the source: --retry-failed",
    "opted_out": "the site's X-Robots-Tag asks not to use it",
    "duplicate": "the very same file as an earlier row, mostly a placeholder for a removed image",
    "redirects": "redirect loop",
    "private_address": "the URL leads into an inner network: --allow-private NET if that is meant",
    "bad_url": "no usable http(s) address",
    "no_file": "the list names a file that is not there: check --images",
    "broken": "dropped by verify --repair: --retry-failed fetches it again",
}


def run(args: argparse.Namespace) -> int:
    """Run one source; return the exit code."""
    console = Console(stderr=True, highlight=False)
    try:
        if args.source == "mirror":
            return _mirror(args, console)
        if args.source == "scan":
            return _scan(args, console)
        if args.source == "set" and args.name != "cc3m-val":
            return _set(args, console)
        if args.source == "set":
            return _cc3m_validation(args, console)
        return _list(args, console)
    except KeyboardInterrupt:
        console.print("interrupted; finished shards are kept, the same command continues")
        return 130


# --------------------------------------------------------------------------------- caption lists


def _list(args: argparse.Namespace, console: Console) -> int:
    table = read_captions(
        args.captions,
        args.format,
        location=args.url_column,
        caption=args.caption_column,
        split=args.split,
        images=args.images,
        limit=args.limit,
    )
    dropped = ", ".join(f"{count} {reason}" for reason, count in table.dropped.items())
    console.print(f"{len(table):,} images in {args.captions} (dropped: {dropped or 'nothing'})")
    if args.source == "folder" and table.location != "path":
        raise UserError("the list holds URLs, not files", str(args.captions), "use `prepare urls`")
    plan = _plan(args, table)
    with ProgressLine(console) as progress:
        result = download(plan, progress)
    return _conclude(args, plan, result, console)


def _plan(args: argparse.Namespace, table: CaptionTable) -> DownloadPlan:
    network = {
        name: getattr(args, name) for name in FetchSettings.model_fields if hasattr(args, name)
    }
    if "allow_private" in network:
        network["allow_private"] = tuple(network["allow_private"])
        network["respect_opt_out"] = not args.ignore_opt_out
    image = {name: getattr(args, name) for name in ImageSettings.model_fields}
    more = {} if args.processes is None else {"processes": args.processes}
    from pydantic import ValidationError

    if args.rows_per_shard < 1 or args.threads < 1 or (args.processes or 1) < 1:
        raise UserError("--rows-per-shard, --threads and --processes must be at least 1")
    try:
        return DownloadPlan(
            table,
            args.out,
            args.prefix,
            rows_per_shard=args.rows_per_shard,
            fetch=FetchSettings(**network),
            store=StoreSettings(
                image=ImageSettings(**image),
                keep_duplicates=args.keep_duplicates,
                near_duplicates=args.near_duplicates,
            ),
            threads=args.threads,
            part=parse_slice(args.slice),
            retry_failed=args.retry_failed,
            **more,
        )
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][-1]).replace("_", "-")
        raise UserError(f"{first['msg']} (it is {first['input']})", where=option) from None


def parse_slice(text: str) -> tuple[int, int]:
    """Read `I/N`.

    Raises:
        UserError: it is not of that form, or I is not below N.
    """
    index, _, parts = text.partition("/")
    if not (index.isdigit() and parts.isdigit() and int(index) < int(parts)):
        raise UserError(f"{text!r} is no slice", "--slice", "write I/N with I from 0 to N - 1")
    return int(index), int(parts)


def _conclude(
    args: argparse.Namespace, plan: DownloadPlan, result: DownloadResult, console: Console
) -> int:
    entries = result.manifest.shards if result.manifest else result.entries
    samples = sum(entry.samples for entry in entries)
    failures = Manifest(shards=list(entries)).failures
    rows = samples + sum(failures.values())
    if failures:
        console.print(failure_table(failures, rows))
    what = "the set" if result.manifest else "this slice"
    console.print(
        f"{what}: {samples:,} samples of {rows:,} rows ({samples / max(rows, 1):.1%}) in "
        f"{len(entries)} shards; {result.worked} worked on now"
    )
    if result.missing:
        console.print(
            f"{result.missing} shards of other slices are not finished; the slice that ends last "
            "writes the manifest"
        )
    if rows and not samples:
        console.print("not one row gave a sample: read the advice above before repeating")
        return 1
    retriable = sum(n for s, n in failures.items() if s not in ("opted_out", "duplicate"))
    if retriable and not args.retry_failed:
        console.print(f"{retriable:,} rows can be asked for again with --retry-failed")
    return 0


def failure_table(failures: dict[str, int], rows: int) -> Table:
    """Return the histogram of failures, most frequent first, with advice."""
    table = Table("status", "rows", "share", "what it means", box=None, pad_edge=False)
    for status, count in sorted(failures.items(), key=lambda item: (-item[1], item[0])):
        advice = ADVICE.get(status, "see `detail` in the rows.parquet beside the shard")
        table.add_row(status, f"{count:,}", f"{count / max(rows, 1):.1%}", advice)
    return table


class ProgressLine(Progress):
    """A bar on a terminal, a line every ten seconds in a log."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.begin, self.said, self.rows = time.monotonic(), 0.0, 0
        self.bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip

    def __enter__(self) -> ProgressLine:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def start(self, rows: int) -> None:
        """Announce how many rows will be asked for."""
        self.rows, self.begin = rows, time.monotonic()
        self.task = self.bar.add_task("rows", total=rows, state="")

    def update(self, rows: int, ok: int, stored: int) -> None:
        """Show rows finished, the share that gave a sample, and the rate."""
        seconds = max(time.monotonic() - self.begin, 1e-3)
        state = f"{ok / max(rows, 1):.1%} ok, {rows / seconds:,.0f} rows/s, {stored / 1e9:.2f} GB"
        self.bar.update(self.task, completed=rows, state=state)
        if not self.console.is_terminal and time.monotonic() - self.said > 10:
            self.said = time.monotonic()
            left = (self.rows - rows) * seconds / max(rows, 1)
            print(f"{rows:,}/{self.rows:,} rows, {state}, {left:,.0f} s left", file=sys.stderr)


# --------------------------------------------------------------------------------- other sources


def _mirror(args: argparse.Namespace, console: Console) -> int:
    from data_prep.existing import fetch_mirror, mirror_shortfall, scan

    index, parts = parse_slice(args.slice)
    paths = fetch_mirror(
        args.out,
        repository=args.repository,
        patterns=args.pattern,
        part=(index, parts),
        revision=args.revision,
        workers=args.workers,
    )
    names = [str(path.relative_to(args.out)) for path in paths]
    target = args.out / "manifest.json"
    if parts > 1:
        # Slices must not write one file at the same time; `scan` joins them at the end.
        console.print(f"{len(paths)} shards fetched; after all slices: inherclip prepare scan "
                      f"{args.out}")  # fmt: skip
        return 0
    manifest = scan(args.out, names, out=target, source=args.repository, progress=_count(console))
    console.print(f"{manifest.num_samples:,} samples in {len(manifest.shards)} shards: {target}")
    if not args.pattern and args.repository == "pixparse/cc3m-wds":
        problems = mirror_shortfall(manifest)
        for problem in problems:
            console.print(f"not the whole mirror: {problem}")
        return 1 if problems else 0
    return 0


def _scan(args: argparse.Namespace, console: Console) -> int:
    from data_prep.existing import mirror_shortfall, scan

    manifest = scan(args.folder, args.pattern or "*.tar", out=args.out, progress=_count(console))
    target = args.out or args.folder / "manifest.json"
    console.print(f"{manifest.num_samples:,} samples in {len(manifest.shards)} shards: {target}")
    for problem in mirror_shortfall(manifest):
        console.print(f"note: {problem}")
    return 0


def _count(console: Console) -> Callable[[int, int], None]:
    """Return a callback that says how many shards were read, now and then."""
    said = [time.monotonic()]

    def report(done: int, total: int) -> None:
        if done == total or time.monotonic() - said[0] > 10:
            said[0] = time.monotonic()
            console.print(f"{done}/{total} shards read")

    return report


def _set(args: argparse.Namespace, console: Console) -> int:
    from data_prep.sets import SetRequest, build_set

    image = {name: getattr(args, name) for name in ImageSettings.model_fields}
    request = SetRequest(
        args.name,
        args.images,
        args.out,
        annotations=args.annotations,
        split=args.split,
        split_list=args.split_list,
        samples_per_shard=args.rows_per_shard,
        image=ImageSettings(**image),
        partial=args.allow_partial,
    )
    manifest, problems = build_set(request)
    for problem in problems:
        console.print(f"[bold]partial set:[/bold] {problem}")
    console.print(f"{args.name}: {manifest.num_samples:,} samples in {args.out}")
    return 0


def _cc3m_validation(args: argparse.Namespace, console: Console) -> int:
    """CC3M's validation images exist only as shards that somebody downloaded: count these."""
    from data_prep.existing import scan
    from data_prep.sets import CC3M_VALIDATION_ROWS

    if not args.images.is_dir() or not list(args.images.glob("*.tar")):
        raise UserError(
            "CC3M's validation set has no folder of images, only URLs",
            where=str(args.images),
            todo="`inherclip prepare cc3m Validation_GCC-1.1.0-Validation.tsv --prefix cc3m-val "
            "--out DIR`, or `inherclip prepare mirror --pattern 'cc3m-validation-*.tar'`; then "
            "`prepare set cc3m-val --images DIR`",
        )
    if args.out.resolve() != args.images.resolve():
        raise UserError(
            "the shards stay where they are", "--out", f"give the same folder, {args.images}"
        )
    patterns = ["cc3m-val*.tar"] if list(args.images.glob("cc3m-val*.tar")) else ["*.tar"]
    target = args.out / "cc3m-val.manifest.json"
    manifest = scan(args.images, patterns, out=target, source="cc3m-val")
    console.print(
        f"cc3m-val: {manifest.num_samples:,} of the official {CC3M_VALIDATION_ROWS:,} rows have an "
        f"image ({CC3M_VALIDATION_ROWS - manifest.num_samples:,} are missing)"
    )
    return 0
