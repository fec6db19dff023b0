"""Verify: a table of damages, each of which has to be found; repair; the real shards are clean."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data_prep.errors import UserError
from data_prep.reader import ShardSet
from data_prep.repair import repair
from data_prep.shards import Manifest, write_shards
from data_prep.verify import verify
from tests.data_prep.conftest import samples
from tests.data_prep.misbehaving_server import bomb, picture

Members = list[tuple[str, bytes]]


def members(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]


def rewrite(path: Path, change: Callable[[Members], Members]) -> None:
    """Change members and bring the manifest up to date, so that only the change is wrong."""
    changed = change(members(path))
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in changed:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    update_manifest(path)


def update_manifest(path: Path, samples_too: bool = True) -> None:
    place = path.parent / "set.manifest.json"
    manifest = Manifest.load(place)
    for entry in manifest.shards:
        if entry.name == path.name:
            data = path.read_bytes()
            entry.bytes, entry.sha256 = len(data), hashlib.sha256(data).hexdigest()
            if samples_too:
                keys = {name.rpartition("/")[2].partition(".")[0] for name, _ in members(path)}
                entry.samples = len(keys)
    manifest.save(place)


def bytes_at(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def replace_member(name: str, data: bytes | None, new_name: str = "") -> Callable[[Path], None]:
    """Damage: one member of the first sample gets other bytes, another name, or goes."""

    def change(found: Members) -> Members:
        out = []
        for old, content in found:
            if old != f"s00000.{name}":
                out.append((old, content))
            elif data is not None:
                out.append((new_name or old, data if data != b"=" else content))
        return out

    return lambda folder: rewrite(folder / "set-000000.tar", change)


def add_members(*extra: tuple[str, bytes], at: int = 3) -> Callable[[Path], None]:
    return lambda folder: rewrite(
        folder / "set-000000.tar", lambda found: [*found[:at], *extra, *found[at:]]
    )


def on_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: bytes_at(folder / "set-000000.tar", change)


def flip(position: int) -> Callable[[bytes], bytes]:
    return lambda d: d[:position] + bytes([d[position] ^ 0x55]) + d[position + 1 :]


def on_manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:  # type: ignore[type-arg]
    def damage(folder: Path) -> None:
        place = folder / "set.manifest.json"
        record = json.loads(place.read_text())
        record.pop("totals")
        change(record)
        place.write_text(json.dumps(record))

    return damage


def png(data: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).save(buffer, "PNG")
    return buffer.getvalue()


def leak(folder: Path) -> None:
    write_shards(samples(3, start=10), folder, "test")


JSON = json.dumps({"captions": ["picture 0", "noise number 0"], "label": 0}).encode()
PICTURE = picture(0, (24, 20))
# name: (how to damage, the kind that verify has to name, what --repair can do about it)
DAMAGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "cut in half": (on_bytes(lambda d: d[: len(d) // 2]), "cut short", "mends"),
    "cut inside a header": (on_bytes(lambda d: d[: 512 * 9 + 100]), "cut short", "mends"),
    "end mark missing": (on_bytes(lambda d: d.rstrip(b"\0") + bytes(-len(d.rstrip(b"\0")) % 512)),
                         "cut short", "mends"),
    "ragged end": (on_bytes(lambda d: d + b"\0\0\0"), "ragged end", "mends"),
    "header byte flipped": (on_bytes(lambda d: flip(d.index(b"s00001.jpg"))(d)), "damaged header",
                            "mends"),
    "zeros in the middle": (on_bytes(lambda d: d[:10240] + bytes(5120) + d[15360:]),
                            "data after the end|damaged header|broken image", "mends"),
    "data after the end": (on_bytes(lambda d: d + b"x" * 512), "data after the end", "mends"),
    "empty file": (on_bytes(lambda d: b""), "empty file", "cannot"),
    "gzipped": (on_bytes(gzip.compress), "compressed", "cannot"),
    "a page instead": (on_bytes(lambda d: b"<html>no</html>" * 100), "not a tar file", "cannot"),
    "no samples left": (on_bytes(lambda d: bytes(10240)), "no samples", "cannot"),
    "image byte flipped": (on_bytes(flip(512 + 512 + 512 + 90)), "checksum", "mends"),
    "shard missing": (lambda f: (f / "set-000001.tar").unlink(), "missing", "cannot"),
    "shard exchanged": (lambda f: shutil.copy(f / "set-000001.tar", f / "set-000000.tar"),  # type: ignore[arg-type, return-value]
                        "key twice", "mends"),
    "shard unlisted": (lambda f: shutil.copy(f / "set-000001.tar", f / "set-000007.tar"),  # type: ignore[arg-type, return-value]
                       "unlisted", "mends"),
    "manifest is no json": (lambda f: (f / "set.manifest.json").write_text("{"),  # type: ignore[arg-type, return-value]
                            "damaged manifest", "cannot"),
    "manifest of another format": (on_manifest(lambda r: r.update(format=9)), "damaged manifest",
                                   "cannot"),
    "manifest counts wrong": (on_manifest(lambda r: r["shards"][0].update(samples=9)), "samples",
                              "mends"),
    "manifest checksum wrong": (on_manifest(lambda r: r["shards"][2].update(sha256="0" * 64)),
                                "checksum", "mends"),
    "manifest size wrong": (on_manifest(lambda r: r["shards"][1].update(bytes=1)), "bytes",
                            "mends"),
    "image gone": (replace_member("jpg", None), "no image", "mends"),
    "image empty": (replace_member("jpg", b""), "empty image", "mends"),
    "image truncated": (replace_member("jpg", PICTURE[: len(PICTURE) // 2]), "broken image",
                        "mends"),
    "image is a page": (replace_member("jpg", b"<html>"), "wrong image type|broken image", "mends"),
    "image is a png called jpg": (replace_member("jpg", png(PICTURE)), "wrong image type", "mends"),
    "image is a bomb": (replace_member("jpg", bomb(), "s00000.png"), "broken image", "mends"),
    "two images": (add_members(("s00000.png", png(PICTURE))), "several images", "mends"),
    "captions gone": (replace_member("json", b"{}"), "no caption|none", "mends"),
    "json broken": (replace_member("json", b"{"), "unreadable json", "mends"),
    "json is a list": (replace_member("json", b"[]"), "unreadable json", "mends"),
    "a caption empty": (replace_member("json", b'{"captions": ["picture 0", " "]}'),
                        "empty caption", "mends"),
    "captions of another sample": (replace_member("json", b'{"captions": ["else"]}'),
                                   "captions differ", "mends"),
    "txt empty": (replace_member("txt", b" "), "empty caption", "mends"),
    "control characters": (replace_member("json", b'{"captions": ["picture\\u0000 0"]}'),
                           "control characters", "mends"),
    "label is no number": (replace_member("json", b'{"label": "dog"}'), "bad label", "mends"),
    "label negative": (replace_member("json", b'{"label": -1}'), "bad label", "mends"),
    "member twice": (add_members(("s00000.jpg", PICTURE)), "member twice", "mends"),
    "members apart": (add_members(("s00000.npy", b"x"), at=9), "members apart", "mends"),
    "stray member": (add_members(("README", b"x")), "stray member", "mends"),
    "unsafe name": (add_members(("../x.jpg", PICTURE), ("../x.json", JSON)), "unsafe name",
                    "mends"),
    "size differs from json": (replace_member("json", JSON[:-1] + b', "width": 9, "height": 9}'),
                               "wrong size", "mends"),
    "test images in the training set": (leak, "leak", "cannot"),
    "a build that was killed": (lambda f: (f / ".set.progress.json").write_text("{}"),  # type: ignore[arg-type, return-value]
                                "unfinished", "cannot"),
}  # fmt: skip
# Without any caption a label is enough, so "captions gone" needs the txt gone as well.
DAMAGES["captions gone"] = (
    lambda f: rewrite(f / "set-000000.tar", lambda found: [found[0], *found[3:]]),
    "no caption", "mends",
)  # fmt: skip


def test_the_table_has_at_least_thirty_kinds() -> None:
    assert len(DAMAGES) >= 30


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_named(small_set: tuple[Path, Manifest], name: str) -> None:
    folder, _ = small_set
    assert verify(folder, processes=1).clean
    damage, kind, hope = DAMAGES[name]
    damage(folder)
    found = verify(folder, processes=1)
    kinds = {item.kind for item in found.findings}
    assert kinds & set(kind.split("|")), found.findings
    repair(found)
    left = verify(folder, processes=1)
    if hope == "mends":
        assert left.clean, left.findings
        assert sum(len(report.keys) for report in left.reports) >= 10, "good samples were dropped"
        assert len(ShardSet.find(folder, "set-*.tar")) == sum(r.samples for r in left.reports)
    else:
        assert not left.clean


@pytest.mark.parametrize("name", ["shard exchanged", "shard unlisted"])
def test_repair_drops_only_the_later_copy(small_set: tuple[Path, Manifest], name: str) -> None:
    folder, _ = small_set
    DAMAGES[name][0](folder)
    repair(verify(folder, processes=1))
    shards = ShardSet.find(folder, "set-*.tar")
    keys = [shards.read(index).key for index in range(len(shards))]
    assert len(keys) == len(set(keys))


def test_repair_saves_everything_around_a_damaged_place(small_set: tuple[Path, Manifest]) -> None:
    folder, _ = small_set
    path = folder / "set-000000.tar"
    header = path.read_bytes().index(b"s00003.jpg")
    bytes_at(path, lambda d: d[:header] + b"\xff" * 512 + d[header + 512 :])
    done = repair(verify(folder, processes=1))
    assert [item.kept for item in done] == [7]
    shards = ShardSet.find(folder, "set-*.tar")
    assert [shards.read(i).key for i in range(7)] == [f"s0000{i}" for i in (0, 1, 2, 4, 5, 6, 7)]
    manifest = Manifest.load(folder / "set.manifest.json")
    assert manifest.shards[0].failures
    assert manifest.num_samples == 19


def test_leaks_against_another_folder_are_removed_from_training_only(tmp_path: Path) -> None:
    write_shards(samples(20), tmp_path / "a", "x-train", samples_per_shard=8)
    write_shards(samples(4, start=5), tmp_path / "b", "y-test")
    before = (tmp_path / "b" / "y-test-000000.tar").read_bytes()
    found = verify(tmp_path / "a", against=[tmp_path / "b"], processes=1)
    assert sorted(item.key for item in found.findings) == ["s00005", "s00006", "s00007", "s00008"]
    assert {item.kind for item in found.findings} == {"leak"}
    repair(found)
    assert verify(tmp_path / "a", against=[tmp_path / "b"], processes=1).clean
    assert len(ShardSet.find(tmp_path / "a", "*.tar")) == 16
    assert (tmp_path / "b" / "y-test-000000.tar").read_bytes() == before


def test_lookalikes_between_sets_are_found(tmp_path: Path) -> None:
    pytest.importorskip("imagehash")
    from data_prep.shards import Sample
    from tests.data_prep.test_images import drawing

    one, other = drawing(quality=70), drawing(quality=90)
    write_shards([Sample.of("a", one, captions=["x"])], tmp_path, "x-train")
    write_shards([Sample.of("b", other, captions=["x"])], tmp_path, "x-test")
    assert verify(tmp_path, processes=1).clean
    found = verify(tmp_path, looks=True, processes=1)
    assert [item.kind for item in found.findings] == ["leak"]
    assert "looks alike" in found.findings[0].detail


def test_what_cannot_be_checked_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        verify(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no shard matches"):
        verify(tmp_path)
    with pytest.raises(UserError, match="only local"):
        verify("s3://bucket/x")


def test_processes_find_the_same(small_set: tuple[Path, Manifest]) -> None:
    folder, _ = small_set
    DAMAGES["image truncated"][0](folder)
    assert verify(folder, processes=3).findings == verify(folder, processes=1).findings


@pytest.mark.slow
def test_real_flickr8k_and_imagenet_are_clean(shared_data: Path) -> None:
    result = verify(shared_data, ["flickr8k-*.tar", "imagenet-*.tar"])
    assert result.clean, result.findings[:5]
    assert sum(report.samples for report in result.reports) == 9000
