"""Evaluation sets from their usual layouts: splits, labels, counts, shortfalls by name."""

from __future__ import annotations

import gzip
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep import sets
from data_prep.errors import UserError
from data_prep.imagenet import check_order, imagenet_classes, imagenet_wnids
from data_prep.reader import ShardSet
from data_prep.sets import EvaluationSet, SetRequest, build_set
from data_prep.verify import verify
from tests.data_prep.misbehaving_server import picture


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The official numbers of sets that fit a test; everything else is the real code."""
    spec = EvaluationSet("retrieval", {"train": 2, "val": 1, "test": 2}, {"test": 10})
    for name in ("coco", "flickr8k"):
        monkeypatch.setitem(sets.SETS, name, spec)
    for name, count in (("imagenet-val", 1000), ("imagenet-v2", 1000), ("imagenet-r", 200)):
        classes = sets.SETS[name].classes
        monkeypatch.setitem(sets.SETS, name, EvaluationSet("zero_shot", {"": count}, {}, classes))


def put(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(number, (24, 20)))


def karpathy(folder: Path) -> Path:
    images = []
    for number, split in enumerate(["test", "test", "val", "train", "restval"]):
        name = f"COCO_{number:03d}.jpg"
        put(folder / "val2014" / name, number)
        images.append(
            {"filepath": "val2014", "filename": name, "split": split,
             "sentences": [{"raw": f"caption {k} of {number}"} for k in range(5)]}
        )  # fmt: skip
    path = folder / "dataset_coco.json"
    path.write_text(json.dumps({"images": images}))
    return path


@pytest.mark.usefixtures("small")
def test_coco_by_karpathy_split(tmp_path: Path) -> None:
    annotations = karpathy(tmp_path / "coco")
    request = SetRequest("coco", tmp_path / "coco", tmp_path / "out", annotations)
    manifest, problems = build_set(request)
    assert (manifest.num_samples, problems) == (2, [])
    shards = ShardSet.find(tmp_path / "out", "coco-test-*.tar")
    assert shards.read(1).captions == [f"caption {k} of 1" for k in range(5)]
    assert shards.read(1).image_bytes == picture(1, (24, 20)), "the original bytes are kept"
    assert verify(tmp_path / "out", processes=1).clean
    before = (tmp_path / "out" / "coco-test-000000.tar").stat().st_mtime_ns
    build_set(request)
    assert (tmp_path / "out" / "coco-test-000000.tar").stat().st_mtime_ns == before
    train, _ = build_set(replace(request, split="train"))
    assert train.num_samples == 2, "restval belongs to train"


@pytest.mark.usefixtures("small")
def test_a_shortfall_is_named_and_only_accepted_on_request(tmp_path: Path) -> None:
    annotations = karpathy(tmp_path / "coco")
    (tmp_path / "coco" / "val2014" / "COCO_001.jpg").unlink()
    request = SetRequest("coco", tmp_path / "coco", tmp_path / "out", annotations)
    with pytest.raises(UserError, match=r"1 images, the official number is 2; missing.*COCO_001"):
        build_set(request)
    manifest, problems = build_set(replace(request, partial=True))
    assert manifest.num_samples == 1
    assert manifest.settings["shortfall"] == problems


@pytest.mark.usefixtures("small")
def test_a_broken_image_stops_the_set(tmp_path: Path) -> None:
    annotations = karpathy(tmp_path / "coco")
    (tmp_path / "coco" / "val2014" / "COCO_000.jpg").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"COCO_000.jpg: the image cannot be used"):
        build_set(SetRequest("coco", tmp_path / "coco", tmp_path / "out", annotations))


@pytest.mark.usefixtures("small")
def test_flickr8k_by_token_file_and_split_list(tmp_path: Path) -> None:
    lines = []
    for number in range(3):
        put(tmp_path / "Flicker8k_Dataset" / f"{number}.jpg", number)
        lines += [f"{number}.jpg#{k}\tcaption {k} of {number}" for k in range(5)]
    token, chosen = tmp_path / "Flickr8k.token.txt", tmp_path / "Flickr_8k.testImages.txt"
    token.write_text("\n".join(lines))
    chosen.write_text("2.jpg\n0.jpg\n")
    request = SetRequest("flickr8k", tmp_path, tmp_path / "out", token, split_list=chosen)
    build_set(request)
    shards = ShardSet.find(tmp_path / "out", "flickr8k-test-*.tar")
    assert [shards.read(i).key for i in range(2)] == ["2", "0"]
    with pytest.raises(UserError, match="does not know splits"):
        build_set(replace(request, split_list=None))


def test_open_clips_names_follow_the_sorted_wnids() -> None:
    classes = imagenet_classes()
    assert len(classes.wnids) == len(classes.names) == 1000
    assert classes.wnids == sorted(classes.wnids)
    assert classes.names[0] == "tench"
    assert classes.templates[0] == "a bad photo of a {}."
    assert len(classes.templates) == 80
    lemmas = dict(zip(classes.wnids, classes.names, strict=True))
    check_order(classes.wnids, classes.names, lemmas)
    with pytest.raises(UserError, match="another class order"):
        check_order(classes.wnids, [*classes.names[1:], classes.names[0]], lemmas)


@pytest.mark.usefixtures("small")
def test_imagenet_layouts_agree_on_labels(tmp_path: Path) -> None:
    wnids = imagenet_wnids()
    solution = ["ImageId,PredictionString"]
    for number, wnid in enumerate(wnids):
        put(tmp_path / "folders" / wnid / f"ILSVRC2012_val_{number:08d}.JPEG", number % 5)
        put(tmp_path / "numbers" / str(number) / f"{number:05d}.jpeg", number % 5)
        put(tmp_path / "flat" / f"ILSVRC2012_val_{number:08d}.JPEG", number % 5)
        solution.append(f"ILSVRC2012_val_{number:08d},{wnid} 1 2 3 4")
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(solution))
    with tarfile.open(tmp_path / "flat.tar", "w") as tar:
        tar.add(tmp_path / "flat", arcname=".")
    (tmp_path / "flat.tar.gz").write_bytes(gzip.compress((tmp_path / "flat.tar").read_bytes()))
    truth = tmp_path / "LOC_val_solution.csv"
    requests = [
        SetRequest("imagenet-val", tmp_path / "folders", tmp_path / "a"),
        SetRequest("imagenet-v2", tmp_path / "numbers", tmp_path / "b"),
        SetRequest("imagenet-val", tmp_path / "flat", tmp_path / "c", truth),
        SetRequest("imagenet-val", tmp_path / "flat.tar", tmp_path / "d", truth),
        SetRequest("imagenet-val", tmp_path / "flat.tar.gz", tmp_path / "e", truth),
    ]
    for request in requests:
        build_set(request)
        shards = ShardSet.find(request.out, f"{request.name}-*.tar")
        assert {shards.read(i).record["wnid"]: shards.read(i).label for i in range(1000)} == {
            wnid: number for number, wnid in enumerate(wnids)
        }
        classes = json.loads((request.out / f"{request.name}.classes.json").read_text())
        assert classes["classes"][0] == "tench"
    with pytest.raises(UserError, match="not in folders named by WordNet id"):
        build_set(replace(requests[2], annotations=None, out=tmp_path / "f"))
    truth.write_text("\n".join(str(n) for n in range(1000)))
    with pytest.raises(UserError, match="labels without names"):
        build_set(replace(requests[2], out=tmp_path / "f"))


@pytest.mark.usefixtures("small")
def test_variants_with_200_classes_count_within_them(tmp_path: Path) -> None:
    chosen = imagenet_wnids()[::5]
    for wnid in chosen:
        put(tmp_path / "imagenet-r" / wnid / "art_0.jpg", 1)
    build_set(SetRequest("imagenet-r", tmp_path / "imagenet-r", tmp_path / "out"))
    shards = ShardSet.find(tmp_path / "out", "imagenet-r-*.tar")
    assert [shards.read(i).label for i in range(200)] == list(range(200))
    assert [shards.read(i).record["wnid"] for i in range(200)] == chosen
    classes = json.loads((tmp_path / "out" / "imagenet-r.classes.json").read_text())
    assert classes["wnids"] == chosen
    (tmp_path / "imagenet-r" / chosen[0] / "art_0.jpg").unlink()
    with pytest.raises(UserError, match="199 class folders"):
        build_set(SetRequest("imagenet-r", tmp_path / "imagenet-r", tmp_path / "out2"))


def test_unknown_sets_and_missing_inputs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no set is called"):
        build_set(SetRequest("imagenet-x", tmp_path, tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        build_set(SetRequest("coco", tmp_path / "no", tmp_path))
    with pytest.raises(UserError, match="no images"):
        build_set(SetRequest("coco", tmp_path, tmp_path))
    put(tmp_path / "1.jpg", 1)
    with pytest.raises(UserError, match="captions are missing"):
        build_set(SetRequest("coco", tmp_path, tmp_path))
