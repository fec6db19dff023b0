"""`data.prepare`: the experiment makes its own shards, whole or in the slices of an array."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_prep.errors import UserError
from data_prep.scenes import ScenesConfig, build_scenes
from pipeline.experiment import load_experiment
from pipeline.graph import Graph
from tests.pipeline.conftest import inherclip


@pytest.fixture
def prepared(tmp_path: Path, tiny: Callable[..., Path]) -> Path:
    """An experiment whose training images lie in a folder, with a .txt beside each."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(24):
        Image.new("RGB", (48, 40), (number * 9, 80, 255 - number * 9)).save(
            photos / f"{number:03d}.png"
        )
        (photos / f"{number:03d}.txt").write_text(f"a plain picture number {number}\n")
    shards = tmp_path / "shards"
    build_scenes(ScenesConfig(image_size=32, train=8, val=8, test=8, zero_shot=8), shards)

    def change(content: dict[str, Any]) -> None:
        arguments = ["folder", str(photos), "--prefix", "mine", "--rows-per-shard", "6"]
        content["data"] = {
            "root": str(shards),
            "train": "mine-*.tar",
            "prepare": {"arguments": arguments, "slices": 4},
        }
        content["arms"] = {"student": content["arms"]["student"]}

    return tiny(change)


@pytest.mark.slow
def test_slices_in_any_order_make_the_set_and_the_last_one_marks_it(
    prepared: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    common = ("run", prepared, "--out", run, "--stage", "prepare", "--slice")
    for part in (2, 0, 3):
        inherclip(*common, f"{part}/4")
        assert not (run / "stages/prepare.json").exists()
    inherclip("run", prepared, "--out", run, "--stage", "data", code=2)
    inherclip(*common, "1/4")
    assert (run / "stages/prepare.json").exists()
    done = inherclip("run", prepared, "--out", run, "--stage", "data")
    assert "24 training pairs in 4 shards" in done.stdout
    before = Graph(load_experiment(prepared), run)
    assert before.is_done("prepare")
    assert before.is_done("data")


def test_options_that_the_experiment_fills_in_are_refused(prepared: Path) -> None:
    with pytest.raises(UserError, match="--out is filled in"):
        load_experiment(prepared, ["data.prepare.arguments=[folder, x, --out, y]"])


def test_before_preparing_the_plan_shows_the_stage_and_no_shards_are_missed(
    prepared: Path, tmp_path: Path
) -> None:
    done = inherclip("run", prepared, "--out", tmp_path / "run", "--dry-run")
    assert "prepare" in done.stdout
    assert "Nothing is missing" in done.stdout
