"""`inherclip inherit`: plans of real architectures, JSON for programs, groups, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.pipeline.conftest import inherclip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "teacher", "most"),
    # every heavy layer: convolutions, attention pool, MLP, attention, the token embedding
    [
        ("RN101", 119_688_033, 59.85e6),
        ("ViT-B-32", 151_277_313, 75.65e6),
    ],
)
def test_a_plan_lists_every_heavy_layer_of_both_towers(
    name: str, teacher: int, most: float
) -> None:
    import open_clip

    done = inherclip(
        "inherit", name, "--untrained", "--budget", "params=0.5", "--plan", "--json", timeout=900
    )
    plan = json.loads(done.stdout)
    assert plan["total_before"] == teacher
    assert 0.49 * teacher <= plan["total_after"] <= most
    assert plan["total_after"] <= 0.5 * teacher
    assert set(plan["towers"]) == {"visual", "text"}
    assert sum(t["before"] for t in plan["towers"].values()) == plan["total_before"]
    assert sum(t["after"] for t in plan["towers"].values()) == plan["total_after"]
    keys = {
        "name", "kind", "shape", "rank", "heads", "params_before", "params_after",
        "macs_before", "macs_after", "reason",
    }  # fmt: skip
    for layer in plan["layers"]:
        assert keys <= set(layer)
        assert layer["macs_before"] is not None
        assert (layer["rank"] is None) == bool(layer["reason"])
        assert layer["params_after"] <= layer["params_before"]
    # every weight of at least two axes is in the plan, but for tables that are not layers
    model = open_clip.create_model(name)
    tables = {"positional_embedding", "class_embedding", "text_projection", "proj"}
    heavy = sum(
        p.numel()
        for n, p in model.named_parameters()
        if p.ndim > 1 and n.rpartition(".")[2] not in tables
    )
    listed = 0
    for layer in plan["layers"]:
        product = 1
        for size in layer["shape"]:
            product *= size
        listed += product
    assert listed == heavy
    assert "token_embedding" in {layer["name"] for layer in plan["layers"]}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    from pipeline.models import Clip, build, save_checkpoint
    from tests.pipeline.conftest import tiny_model

    architecture = tiny_model()
    save_checkpoint(Clip(build(architecture, seed=1), architecture), tmp_path / "teacher")
    return tmp_path / "teacher"


def test_a_plan_writes_no_weights_and_groups_hold(checkpoint: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = inherclip(
        "inherit", checkpoint, "--plan", "--budget", "visual.*:params=0.6", "--budget", "params=0.4"
    )
    assert "budget visual.*:params=0.6: " in done.stdout
    assert "total: " in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_a_descendant_and_its_report_are_written(checkpoint: Path, tmp_path: Path) -> None:
    from pipeline.models import load_checkpoint, parameters

    inherclip(
        "inherit", checkpoint, "--budget", "params=0.5", "--heads", "2",
        "--out", tmp_path / "small", "--report", tmp_path / "report",
    )  # fmt: skip
    small = load_checkpoint(tmp_path / "small")
    assert small.provenance["budget"] == "params=0.5"
    assert parameters(small.model) <= 0.5 * parameters(load_checkpoint(checkpoint).model)
    assert {p.name for p in (tmp_path / "report").iterdir()} == {
        "plan.json", "plan.txt", "spectra.png",
    }  # fmt: skip


def test_bad_calls_are_refused_with_exit_code_two(checkpoint: Path, tmp_path: Path) -> None:
    import tarfile

    empty = tmp_path / "texts-000000.tar"
    with tarfile.open(empty, "w") as tar:  # captions alone
        (tmp_path / "a.txt").write_text("a caption")
        tar.add(tmp_path / "a.txt", "a.txt")
    for arguments, message in (
        (["--budget", "params=0.5"], "nowhere to write"),
        (["--plan", "--budget", "params=0.001"], "rank 1 everywhere needs"),
        (["--plan", "--budget", "size=1"], "is not a budget"),
        (["--plan", "--calibration", empty], "hold 0 readable ones"),
        (["--plan", "--calibration", tmp_path / "none-*.tar"], "none-"),
    ):
        done = inherclip("inherit", checkpoint, *arguments, code=2)
        assert message in done.stderr
        assert "Traceback" not in done.stderr
