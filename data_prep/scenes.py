"""The embedded data set: rendered scenes with captions and classes, made on the spot.

In: a `ScenesConfig`. Out: a folder of shards `scenes-train`, `scenes-val`, `scenes-test` (image,
captions), `scenes-classes` (image, label) and `classes.json`, written by the same shard writer as
every other data set. All of it is a function of the configuration: no download, no licence.

What a scene holds is in `scene_content`, how it is said in `scene_captions`, how it is drawn in
`scene_drawing`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

from pydantic import BaseModel, ConfigDict, Field

from data_prep.files import atomic_write
from data_prep.scene_captions import captions
from data_prep.scene_content import Scene, class_names, draw_scene, draw_scene_of_class
from data_prep.scene_drawing import encode, render
from data_prep.shards import Manifest, Sample, manifest_path, write_shards

Progress = Callable[[str, int, int], None]

# Raise this when the same configuration gives other scenes: finished folders are then rebuilt.
GENERATOR = 1
SPLITS = ("test", "classes", "val", "train")  # held-out scenes are drawn before training scenes
TEMPLATES = (
    "a {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "a small {}.",
    "a large {}.",
    "a {} in the middle.",
    "a {} on a plain background.",
)


class ScenesConfig(BaseModel):
    """What the embedded data set looks like.

    Attributes:
        seed: Seed of everything that is random.
        image_size: Side of the square images in pixels.
        train: Number of training images.
        val: Number of validation images.
        test: Number of test images for retrieval.
        zero_shot: Number of images of the class-labelled set, classes in turn.
        captions_per_train_image: Different captions of a training or validation image.
        captions_per_test_image: Different captions of a test image.
        samples_per_shard: Images per tar file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(default=0, ge=0)
    image_size: int = Field(default=64, ge=32, le=512)
    train: int = Field(default=12_000, ge=1, le=1_000_000)
    val: int = Field(default=500, ge=1, le=10_000)
    test: int = Field(default=1_000, ge=1, le=10_000)
    zero_shot: int = Field(default=960, ge=1, le=10_000)
    captions_per_train_image: int = Field(default=2, ge=1, le=10)
    captions_per_test_image: int = Field(default=5, ge=1, le=10)
    samples_per_shard: int = Field(default=1_000, ge=1)


def _random(config: ScenesConfig, *names: object) -> random.Random:
    """A generator of its own for every image, so that no image depends on how many there are."""
    return random.Random("/".join(map(str, (config.seed, *names))))


def held_out_scenes(config: ScenesConfig) -> dict[str, list[Scene]]:
    """Draw the scenes of test, classes and val; no two of them have the same signature."""
    taken: set[str] = set()
    scenes: dict[str, list[Scene]] = {}
    classes = len(class_names())
    for split, number in (
        ("test", config.test),
        ("classes", config.zero_shot),
        ("val", config.val),
    ):
        scenes[split] = []
        for index in range(number):
            rng = _random(config, split, index, "scene")
            while True:
                labelled = split == "classes"
                scene = draw_scene_of_class(rng, index % classes) if labelled else draw_scene(rng)
                if scene.signature not in taken:
                    break
            taken.add(scene.signature)
            scenes[split].append(scene)
    return scenes


def train_scene(config: ScenesConfig, index: int, held_out: set[str]) -> Scene:
    """Draw training scene number `index`; its signature is not in `held_out`."""
    rng = _random(config, "train", index, "scene")
    while True:
        scene = draw_scene(rng)
        if scene.signature not in held_out:
            return scene


def _sample(config: ScenesConfig, split: str, index: int, scene: Scene) -> Sample:
    rng = _random(config, split, index, "image")
    image = encode(render(rng, scene, config.image_size, noise_seed=config.seed))
    key = f"{split}-{index:07d}"
    if split == "classes":
        label, name = index % len(class_names()), scene.things[0].name
        return Sample.of(key, image, label=label, name=name, scene=scene.signature)
    test = split == "test"
    number = config.captions_per_test_image if test else config.captions_per_train_image
    sentences = captions(rng, scene, number)
    return Sample.of(key, image, captions=sentences, scene=scene.signature)


class _Samples(Sequence[Sample]):
    """The samples of a split, made on access, so that a resumed build skips what it has."""

    def __init__(
        self,
        config: ScenesConfig,
        split: str,
        held_out: dict[str, list[Scene]],
        progress: Progress | None,
    ) -> None:
        self.config, self.split, self.progress = config, split, progress
        self.scenes = held_out.get(split)
        self.taken = {scene.signature for scenes in held_out.values() for scene in scenes}

    def __len__(self) -> int:
        return self.config.train if self.scenes is None else len(self.scenes)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self.scenes is None:
            scene = train_scene(self.config, index, self.taken)
        else:
            scene = self.scenes[index]
        if self.progress is not None:
            self.progress(f"scenes-{self.split}", index + 1, len(self))
        return _sample(self.config, self.split, index, scene)


def _is_complete(folder: Path, prefix: str, settings: dict[str, Any]) -> bool:
    """Whether a split's manifest belongs to these settings and all its shards have their size."""
    path = manifest_path(folder, prefix)
    if not path.exists():
        return False
    manifest = Manifest.load(path)
    shards = [(folder / entry.name, entry.bytes) for entry in manifest.shards]
    return manifest.settings == settings and all(
        shard.is_file() and shard.stat().st_size == size for shard, size in shards
    )


def build_scenes(config: ScenesConfig, folder: Path, progress: Progress | None = None) -> None:
    """Write the data set of `config` to `folder`; what is already there and whole is kept.

    A folder of another configuration is rebuilt; after a kill the same call goes on.

    Args:
        config: What to make.
        folder: Where to put it; made if missing.
        progress: Called with (split prefix, images done, images in all) before every image.

    Raises:
        UserError: no space is left, or a manifest in the folder is damaged.
    """
    folder = Path(folder)
    settings: dict[str, Any] = {"generator": GENERATOR, **config.model_dump()}
    wanted = [split for split in SPLITS if not _is_complete(folder, f"scenes-{split}", settings)]
    classes = json.dumps({"classes": class_names(), "templates": TEMPLATES}, indent=1) + "\n"
    classes_file = folder / "classes.json"
    if not wanted and classes_file.exists() and classes_file.read_text() == classes:
        return
    # First the manifests: a kill from here on must not leave train and test of two
    # configurations side by side that both look finished (their scenes may overlap).
    classes_file.unlink(missing_ok=True)
    for split in wanted:
        manifest_path(folder, f"scenes-{split}").unlink(missing_ok=True)
    held_out = held_out_scenes(config)
    for split in wanted:
        write_shards(
            _Samples(config, split, held_out, progress),
            folder,
            f"scenes-{split}",
            samples_per_shard=config.samples_per_shard,
            source="rendered scenes",
            settings=settings,
        )
    atomic_write(classes_file, classes)
