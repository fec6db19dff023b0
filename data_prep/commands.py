"""The commands `inherclip prepare` and `inherclip verify`: arguments here, work elsewhere."""

from __future__ import annotations

import argparse
from pathlib import Path

_PREPARE = """\
examples:
  inherclip prepare mirror --out data/cc3m                     CC3M as shards from the hub (2.9 M)
  inherclip prepare cc3m Train_GCC-training.tsv --out data/cc3m    the same from its list of URLs
  inherclip prepare cc3m Train_GCC-training.tsv --out data/cc3m --retry-failed
  inherclip prepare cc3m Train_GCC-training.tsv --out data/cc3m --slice $SLURM_ARRAY_TASK_ID/16
  inherclip prepare urls list.parquet --url-column link --caption-column text --out data/mine
  inherclip prepare folder photos/ --out data/photos           images with a .txt beside each
  inherclip prepare scan laion-shards/                         a manifest for shards that exist
  inherclip prepare set coco --images coco/ --annotations dataset_coco.json --out data/coco
  inherclip prepare set imagenet-val --images imagenet/val --out data/imagenet

Every source may be interrupted at any time: the same command continues.
"""
_SOURCES = {
    "cc3m": "URLs of Conceptual Captions 3M: Train_GCC-training.tsv (caption<TAB>url)",
    "cc12m": "URLs of Conceptual 12M: cc12m.tsv (url<TAB>caption)",
    "urls": "any table of URLs or paths and captions: csv, tsv, parquet",
    "folder": "images on this machine: a folder with .txt files, or a caption list that names them",
    "mirror": "CC3M (or another data set of tars) from the Hugging Face hub",
    "scan": "write the manifest of shards made by img2dataset, open_clip's recipes or others",
    "set": "an evaluation set from its usual folder or tar, counted against the official numbers",
}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not "None", "False" and the like."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, "", []):
            return action.help
        return super()._get_help_string(action)


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sources of `inherclip prepare` and their options."""
    parser.description = "Turn captions and images into checked WebDataset shards."
    parser.epilog = _PREPARE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for name, text in _SOURCES.items():
        part = sources.add_parser(
            name,
            help=text,
            description=text,
            formatter_class=_Help,
        )
        if name in _OTHER_SOURCES:
            _OTHER_SOURCES[name](part)
        else:
            _list_arguments(part, name)


def _out(parser: argparse.ArgumentParser, prefix: str | None = None) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    if prefix is not None:
        parser.add_argument("--prefix", default=prefix, help="shards are PREFIX-000000.tar, ...")


def _slice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--slice", default="0/1", metavar="I/N",
        help="only every N-th shard from the I-th on (from 0), for the jobs of an array",
    )  # fmt: skip


def _list_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    kind = "folder of images, or caption list" if name == "folder" else "caption list (may be .gz)"
    parser.add_argument("captions", type=Path, help=kind)
    _out(parser, {"urls": "data", "folder": "data"}.get(name, name))
    _slice(parser)
    parser.add_argument(
        "--retry-failed", action="store_true", help="ask again for the rows that failed before"
    )
    parser.add_argument("--limit", type=int, help="only the first rows of the list")
    form = name if name in ("cc3m", "cc12m") else "auto"
    table = parser.add_argument_group("caption list")
    table.add_argument(
        "--format", default=form, help="cc3m, cc12m, table, folder, karpathy, coco, flickr-token"
    )
    table.add_argument("--url-column", help="column of the URL or path, in a table")
    table.add_argument("--caption-column", help="column of the caption, in a table")
    table.add_argument("--split", help="split of a Karpathy file: train, val or test")
    table.add_argument("--images", type=Path, help="folder that paths in the list are relative to")
    _image_arguments(parser, 256, 32)
    store = parser.add_argument_group("shards")
    store.add_argument(
        "--rows-per-shard", type=int, default=5000, help="rows of the list per shard"
    )
    store.add_argument(
        "--keep-duplicates", action="store_true",
        help="keep images with the very bytes of an earlier one in their shard",
    )  # fmt: skip
    store.add_argument(
        "--near-duplicates", action="store_true",
        help="list images that look alike in PREFIX.near-duplicates.csv (extra near-duplicates)",
    )  # fmt: skip
    store.add_argument("--processes", type=int, help="worker processes; one per core by default")
    store.add_argument("--threads", type=int, default=64, help="downloads at once per process")
    if name != "folder":
        _network_arguments(parser)


def _image_arguments(parser: argparse.ArgumentParser, size: int, least: int) -> None:
    image = parser.add_argument_group("images")
    image.add_argument(
        "--size", type=int, default=size, help="shorter side in pixels, never enlarged; 0 keeps it"
    )
    image.add_argument("--quality", type=int, default=95, help="JPEG quality, 1 to 100")
    image.add_argument(
        "--min-side", type=int, default=least, help="refuse images smaller than this"
    )
    image.add_argument("--max-pixels", type=int, default=100_000_000, help="refuse larger images")


def _network_arguments(parser: argparse.ArgumentParser) -> None:
    net = parser.add_argument_group("network")
    net.add_argument("--connect-timeout", type=float, default=5, help="seconds to connect")
    net.add_argument("--read-timeout", type=float, default=10, help="seconds without a byte")
    net.add_argument("--total-timeout", type=float, default=60, help="seconds for one URL")
    net.add_argument("--max-bytes", type=int, default=20 << 20, help="largest body in bytes")
    net.add_argument("--max-redirects", type=int, default=5, help="redirects followed")
    net.add_argument("--retries", type=int, default=2, help="further attempts after passing faults")
    net.add_argument("--backoff", type=float, default=1, help="seconds before the first of them")
    net.add_argument("--per-host", type=int, default=16, help="requests at once to one host")
    net.add_argument(
        "--allow-private", action="append", default=[], metavar="NET",
        help="reach an inner network: 10.0.0.0/8, ADDRESS:PORT, or all (repeatable)",
    )  # fmt: skip
    net.add_argument(
        "--ignore-opt-out", action="store_true",
        help="also take images whose X-Robots-Tag says noai, noimageai, noindex or noimageindex",
    )  # fmt: skip
    net.add_argument("--contact", default="", help="address or URL added to the user agent")


def _mirror_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repository", nargs="?", default="pixparse/cc3m-wds", help="data set")
    _out(parser)
    _slice(parser)
    parser.add_argument(
        "--pattern", action="append", help="files to fetch, glob; all tars if absent"
    )
    parser.add_argument("--revision", default="main", help="branch, tag or commit")
    parser.add_argument("--workers", type=int, default=8, help="files fetched at a time")


def _scan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder of tars")
    parser.add_argument(
        "--pattern", action="append", help="which tars, braces or globs; all if absent"
    )
    parser.add_argument("--out", type=Path, help="manifest file; FOLDER/manifest.json if absent")


def _set_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        help="cc3m-val, flickr8k, flickr30k, coco, imagenet-val, imagenet-v2, imagenet-r, "
        "imagenet-a or imagenet-sketch",
    )
    _out(parser)
    parser.add_argument("--images", type=Path, required=True, help="folder or tar of the images")
    parser.add_argument("--annotations", type=Path, help="Karpathy json, token file or label list")
    parser.add_argument(
        "--split", default="test", help="train, val or test, where there are splits"
    )
    parser.add_argument(
        "--split-list", type=Path, help="image names of the split, for a token file"
    )
    parser.add_argument("--rows-per-shard", type=int, default=1000, help="samples per shard")
    parser.add_argument(
        "--allow-partial", action="store_true", help="build a set with fewer images than official"
    )
    _image_arguments(parser, 0, 1)


_OTHER_SOURCES = {"mirror": _mirror_arguments, "scan": _scan_arguments, "set": _set_arguments}


def run_prepare(args: argparse.Namespace) -> int:
    """Run `inherclip prepare`; return the exit code.

    Raises:
        UserError: what the user can mend.
    """
    from data_prep import prepare

    return prepare.run(args)


# --------------------------------------------------------------------------------------- verify

_VERIFY = """\
examples:
  inherclip verify data/cc3m
  inherclip verify data/cc3m --no-decode                 structure, counts and checksums only
  inherclip verify data/cc3m --against data/coco         are evaluation images in the training set?
  inherclip verify data/cc3m --repair                    drop what is broken, update the manifest

The exit code is 0 where all is well, 1 where something is wrong, 2 where it could not be checked.
"""


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `inherclip verify`."""
    parser.description = (
        "Check shards: tars whole, members paired, captions there, images decodable, counts and "
        "checksums as in the manifest, no key twice, no image in two sets."
    )
    parser.epilog = _VERIFY
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="folder of shards")
    parser.add_argument("--shards", action="append", help="which shards, braces or globs (all)")
    parser.add_argument("--no-decode", action="store_true", help="do not decode the images")
    parser.add_argument(
        "--against", type=Path, action="append", default=[],
        help="another folder whose images must not be in this one (repeatable)",
    )  # fmt: skip
    parser.add_argument(
        "--near-duplicates", action="store_true",
        help="between sets, also find images that look alike (extra near-duplicates)",
    )  # fmt: skip
    parser.add_argument("--processes", type=int, help="worker processes (one per core)")
    parser.add_argument(
        "--repair", action="store_true",
        help="rewrite shards without their broken samples and update the manifest",
    )  # fmt: skip


def run_verify(args: argparse.Namespace) -> int:
    """Run `inherclip verify`; return the exit code.

    Raises:
        UserError: the folder cannot be checked at all.
    """
    from data_prep import verify_report

    return verify_report.run(args)
