"""`inherclip evaluate` and `compare`: any checkpoint, one suite, one table."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from data_prep.scenes import ScenesConfig, build_scenes
from pipeline.models import Clip, build, save_checkpoint
from tests.pipeline.conftest import inherclip, tiny_experiment, tiny_model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    config = ScenesConfig(image_size=32, train=8, val=8, test=16, zero_shot=24)
    build_scenes(config, folder / "data")
    architecture = tiny_model()
    clip = Clip(build(architecture, seed=1), architecture, provenance={"seed": 1})
    save_checkpoint(clip, folder / "ours")
    torch.save({"state_dict": clip.model.state_dict()}, folder / "open_clip.pt")
    (folder / "tiny.json").write_text(json.dumps(architecture))
    (folder / "suite.yaml").write_text(yaml.safe_dump(tiny_experiment()["eval"]))
    return folder


def test_a_folder_and_a_foreign_file_of_the_same_weights_measure_the_same(place: Path) -> None:
    foreign = f"{place / 'tiny.json'}:{place / 'open_clip.pt'}"
    common = ("--suite", place / "suite.yaml", "--root", place / "data", "--out", place / "out")
    inherclip("evaluate", place / "ours", foreign, *common)
    table = pd.read_csv(place / "out" / "compare.csv")
    metrics = [c for c in table.columns if c.startswith(("scenes/", "classes/"))]
    assert len(table) == 2
    assert "scenes/t2i_r10" in metrics
    assert table[metrics].iloc[0].equals(table[metrics].iloc[1].rename(0))
    again = inherclip("evaluate", place / "ours", *common)
    assert "measured already" in again.stdout
    joint = place / "joint"
    inherclip("compare", place / "out", place / "out", "--out", joint)
    assert len(pd.read_csv(joint / "compare.csv")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "unknown model 'nowhere'"),
        (["RN101:openai"], "use RN101-quickgelu:openai"),
    ],
)
def test_a_checkpoint_that_cannot_be_is_named(
    place: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    common = ("--suite", place / "suite.yaml", "--root", place / "data", "--out", tmp_path / "x")
    done = inherclip("evaluate", *arguments, *common, code=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_suite_without_a_folder_says_what_to_give(place: Path, tmp_path: Path) -> None:
    done = inherclip(
        "evaluate", place / "ours", "--suite", place / "suite.yaml", "--out", tmp_path, code=2
    )
    assert "give --root DIR" in done.stderr
