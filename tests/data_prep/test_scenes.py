"""The embedded data set: what it promises, that it repeats, and that a kill does not hurt it."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from data_prep.files import sha256_file
from data_prep.reader import ShardSet
from data_prep.scene_captions import caption, captions
from data_prep.scene_content import (
    BACKGROUNDS,
    COLOURS,
    LAYOUTS,
    SHAPES,
    Scene,
    Thing,
    class_names,
    distinct,
    draw_scene,
    draw_scene_of_class,
)
from data_prep.scene_drawing import render
from data_prep.scenes import ScenesConfig, build_scenes

SMALL = ScenesConfig(
    seed=3, train=150, val=20, test=40, zero_shot=120, samples_per_shard=50, image_size=48
)


def create_tiny_scenes(folder: Path, config: ScenesConfig = SMALL) -> Path:
    build_scenes(config, folder)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(folder.glob("[!.]*"))}


def records(folder: Path, split: str) -> list[dict]:
    found = []
    for shard in sorted(folder.glob(f"scenes-{split}-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    handle = tar.extractfile(member)
                    assert handle is not None
                    found.append(json.load(handle))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_tiny_scenes(tmp_path_factory.mktemp("scenes"))


def test_every_split_has_its_size_and_contents(folder: Path) -> None:
    sizes = {"train": 150, "val": 20, "test": 40, "classes": 120}
    for split, size in sizes.items():
        shards = ShardSet.find(folder, f"scenes-{split}-*.tar")
        assert shards.num_samples == size
        sample = shards.read(size - 1)
        image = Image.open(io.BytesIO(sample.image_bytes))
        assert image.size == (48, 48)
        assert image.mode == "RGB"
        if split == "classes":
            assert sample.label == (size - 1) % len(class_names())
        else:
            assert len(set(sample.captions)) == (5 if split == "test" else 2)


def test_classes_file_names_every_label(folder: Path) -> None:
    classes = json.loads((folder / "classes.json").read_text())
    assert classes["classes"] == class_names()
    assert len(set(classes["classes"])) == len(SHAPES) * len(COLOURS)
    assert all(template.count("{}") == 1 for template in classes["templates"])
    assert all(r["name"] == classes["classes"][r["label"]] for r in records(folder, "classes"))


def test_no_held_out_scene_occurs_in_training_or_in_another_split(folder: Path) -> None:
    train = {record["scene"] for record in records(folder, "train")}
    held_out = [r["scene"] for split in ("test", "classes", "val") for r in records(folder, split)]
    assert len(held_out) == len(set(held_out)) == 180
    assert not train & set(held_out)


def test_training_avoids_held_out_scenes_even_where_they_are_likely(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With 60 possible scenes, a draw that did not look would repeat one at once."""
    ring = Thing("ring", "red", "small", "plain")

    def few(rng: random.Random) -> Scene:
        return Scene("group", (ring,), "white", "plain", count=rng.randrange(60))

    monkeypatch.setattr("data_prep.scenes.draw_scene", few)
    monkeypatch.setattr("data_prep.scene_captions.NUMBERS", dict.fromkeys(range(60), ("some",)))
    monkeypatch.setattr("data_prep.scene_drawing._centres", lambda *_: [(0.5, 0.5)] * 60)
    monkeypatch.setattr("data_prep.scenes.captions", lambda *_: ["a ring"])
    monkeypatch.setattr("data_prep.scenes.render", lambda *_, **__: Image.new("RGB", (8, 8)))
    config = ScenesConfig(train=80, val=20, test=30, zero_shot=1)
    create_tiny_scenes(tmp_path, config)
    held_out = {r["scene"] for split in ("test", "val") for r in records(tmp_path, split)}
    assert len(held_out) == 50
    assert not held_out & {r["scene"] for r in records(tmp_path, "train")}


def test_same_seed_same_bytes_other_seed_other_bytes(folder: Path, tmp_path: Path) -> None:
    again = create_tiny_scenes(tmp_path / "again")
    other = create_tiny_scenes(tmp_path / "other", SMALL.model_copy(update={"seed": 4}))
    assert hashes(again) == hashes(folder)
    assert hashes(other)["scenes-train-000000.tar"] != hashes(folder)["scenes-train-000000.tar"]


def test_finished_folder_is_left_alone(tmp_path: Path) -> None:
    create_tiny_scenes(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    calls: list[str] = []
    build_scenes(SMALL, tmp_path, progress=lambda *step: calls.append(step[0]))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert not calls


def test_changed_configuration_is_rebuilt_without_leftovers(folder: Path, tmp_path: Path) -> None:
    create_tiny_scenes(tmp_path, SMALL.model_copy(update={"train": 400, "seed": 9}))
    create_tiny_scenes(tmp_path)
    assert hashes(tmp_path) == hashes(folder)


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_damaged_shard_is_made_anew(folder: Path, tmp_path: Path, damage: str) -> None:
    create_tiny_scenes(tmp_path)
    shard = tmp_path / "scenes-train-000001.tar"
    if damage == "missing":
        shard.unlink()
    else:
        os.truncate(shard, 1000)
    create_tiny_scenes(tmp_path)
    assert hashes(tmp_path) == hashes(folder)


def test_killed_build_continues_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path\n"
        "from data_prep.scenes import ScenesConfig, build_scenes\n"
        "build_scenes(ScenesConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]),"
        " progress=lambda *_: time.sleep(0.005))\n"
    )
    for marker in ("scenes-test-000000.tar", "scenes-train-000000.tar"):
        child = subprocess.Popen(
            [sys.executable, "-c", program, SMALL.model_dump_json(), str(tmp_path)]
        )
        deadline = time.monotonic() + 60
        while not (tmp_path / marker).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert not (tmp_path / "classes.json").exists()
    create_tiny_scenes(tmp_path)
    assert hashes(tmp_path) == hashes(folder)


def test_an_image_does_not_depend_on_how_many_there_are(folder: Path, tmp_path: Path) -> None:
    """More training images extend the set; the held-out sets stay what they were."""
    create_tiny_scenes(tmp_path, SMALL.model_copy(update={"train": 200}))
    assert hashes(tmp_path)["scenes-train-000001.tar"] == hashes(folder)["scenes-train-000001.tar"]
    assert hashes(tmp_path)["scenes-test-000000.tar"] == hashes(folder)["scenes-test-000000.tar"]


def test_captions_tell_test_scenes_apart() -> None:
    rng = random.Random(0)
    said = [captions(rng, draw_scene(rng), 5) for _ in range(1000)]
    owners: dict[str, set[int]] = {}
    for index, sentences in enumerate(said):
        for sentence in sentences:
            owners.setdefault(sentence, set()).add(index)
    shared = sum(len(indices) > 1 for indices in owners.values())
    assert shared < 0.01 * len(owners)


def test_captions_are_varied_clean_and_fit_the_tokenizer() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        sentence = caption(rng, draw_scene(rng))
        assert sentence == sentence.strip()
        assert "  " not in sentence
        assert "{" not in sentence
        assert sentence.isascii()
        assert len(sentence.split()) <= 40
        assert " a a" not in f" {sentence}".replace(" a an", "")
    scene = draw_scene(rng, "side")
    assert len({caption(rng, scene) for _ in range(50)}) > 25


@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_caption_names_every_thing(layout: str) -> None:
    rng = random.Random(layout)
    for _ in range(50):
        scene = draw_scene(rng, layout)
        sentence = caption(rng, scene, full=True)
        assert scene.background in sentence
        for thing in scene.things:
            colour = {"grey": "gr", "purple": ("purple"), "turquoise": "t"}.get(thing.colour)
            assert (colour or thing.colour) in sentence or "violet" in sentence


@pytest.mark.parametrize("layout", LAYOUTS)
def test_things_are_visible_and_inside_the_image(layout: str) -> None:
    rng = random.Random(layout)
    for _ in range(30):
        scene = draw_scene(rng, layout)
        assert all(
            distinct(COLOURS[thing.colour], BACKGROUNDS[scene.background]) for thing in scene.things
        )
        if scene.pattern != "plain":
            continue
        pixels = np.asarray(render(rng, scene, 64)).astype(int)
        ground = np.median(pixels[[0, -1]].reshape(-1, 3), axis=0)
        apart = np.abs(pixels - ground).sum(axis=2) > 70
        border = np.concatenate([apart[0], apart[-1], apart[:, 0], apart[:, -1]])
        assert border.mean() < 0.05, scene.signature
        assert apart.mean() > 0.008, scene.signature


def test_every_class_can_be_drawn_as_named() -> None:
    rng = random.Random(5)
    for label, name in enumerate(class_names()):
        assert draw_scene_of_class(rng, label).things[0].name == name


@pytest.mark.parametrize(
    "wrong", [{"trian": 5}, {"image_size": 8}, {"train": 0}, {"test": 10**9}, {"seed": "x"}]
)
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        ScenesConfig.model_validate(wrong)
