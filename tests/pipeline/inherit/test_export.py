"""Exports equal the model; heads that always mix alike are merged, with the drift reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from data_prep.errors import UserError
from pipeline.export import Tower, example, export
from pipeline.inherit import inherit, rebuild
from pipeline.inherit.collapse import collapse, gate_statistics
from pipeline.inherit.layers import InheritedConv2d, InheritedLinear
from pipeline.models import Clip, build, load_checkpoint
from tests.pipeline.conftest import inherclip, tiny_model

TOWERS = ("image", "text")


def batch_of(clip: Clip, count: int = 6, seed: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return example(clip, "image", count, seed), example(clip, "text", count, seed)


def inherited(heads: int, gates: float = 0.0) -> Clip:
    """A small inherited CLIP; `gates` is the spread of random gate weights."""
    architecture = tiny_model()
    dense = Clip(build(architecture, seed=1).eval(), architecture)
    model, plan = inherit(dense.model, "params=0.5", batch_of(dense), heads)
    torch.manual_seed(0)
    for layer in gated(model):
        nn.init.normal_(layer.gate.weight, std=gates)
    return Clip(model.eval(), architecture, plan.structure)


def gated(model: nn.Module) -> list[InheritedConv2d | InheritedLinear]:
    return [
        m
        for m in model.modules()
        if isinstance(m, InheritedConv2d | InheritedLinear) and m.gate is not None
    ]


@torch.no_grad()
def embeddings(clip: Clip, tower: str, x: torch.Tensor) -> torch.Tensor:
    return Tower(clip.model, tower)(x)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [1, 3])
def test_onnx_agrees_in_onnxruntime_on_both_towers(heads: int, tmp_path: Path) -> None:
    import onnxruntime

    clip = inherited(heads, gates=1.0)
    lines = export(clip, "onnx", tmp_path)
    assert any("image.onnx" in line for line in lines)
    for tower in TOWERS:
        session = onnxruntime.InferenceSession(
            str(tmp_path / f"{tower}.onnx"), providers=["CPUExecutionProvider"]
        )
        for count in (1, 5):  # another batch size than the traced one
            x = example(clip, tower, count, seed=11)
            (found,) = session.run(["embeddings"], {session.get_inputs()[0].name: x.numpy()})
            expected = embeddings(clip, tower, x)
            assert float((torch.from_numpy(found) - expected).abs().max()) < 1e-4
    record = json.loads((tmp_path / "export.json").read_text())
    assert set(record["max_difference"]) == set(TOWERS)
    assert max(record["max_difference"].values()) < 1e-4


@pytest.mark.slow
def test_torch_export_agrees_and_takes_any_batch_size(tmp_path: Path) -> None:
    clip = inherited(3, gates=1.0)
    export(clip, "torch-export", tmp_path)
    for tower in TOWERS:
        program = torch.export.load(tmp_path / f"{tower}.pt2").module()
        x = example(clip, tower, 5, seed=11)
        torch.testing.assert_close(program(x), embeddings(clip, tower, x), rtol=1e-4, atol=1e-5)


def test_dense_export_is_an_ordinary_checkpoint_that_agrees(tmp_path: Path) -> None:
    clip = inherited(3)  # gates at rest: one head is exact
    export(clip, "dense", tmp_path)
    dense = load_checkpoint(tmp_path)
    assert dense.structure == []
    assert not any("inherit" in type(m).__module__ for m in dense.model.modules())
    for tower in TOWERS:
        x = example(clip, tower, 4, seed=11)
        torch.testing.assert_close(
            embeddings(dense, tower, x), embeddings(clip, tower, x), rtol=1e-4, atol=1e-5
        )


def test_an_export_that_differs_is_refused_and_not_kept(tmp_path: Path) -> None:
    clip = inherited(3, gates=2.0)  # gates that look at their input have no dense equivalent
    with pytest.raises(UserError, match="dense export differs from the model"):
        export(clip, "dense", tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_export_command_writes_and_verifies(tmp_path: Path) -> None:
    from pipeline.models import save_checkpoint

    save_checkpoint(inherited(1), tmp_path / "checkpoint")
    out = tmp_path / "dense"
    done = inherclip("export", tmp_path / "checkpoint", "--format", "dense", "--out", out)
    assert "image: differs by at most" in done.stdout
    assert (out / "export.json").exists()
    missing = inherclip("export", tmp_path / "nowhere", "--format", "dense", "--out", out, code=2)
    assert "nowhere" in missing.stderr


def test_nearly_constant_gates_are_merged_and_the_drift_is_reported() -> None:
    clip = inherited(3)
    layers = {n: m for n, m in clip.model.named_modules() if m in set(gated(clip.model))}
    names = sorted(layers)
    moving, still = names[0], names[1:]
    nn.init.normal_(layers[moving].gate.weight, std=5.0)
    for name in still:  # constant, but not uniform
        nn.init.normal_(layers[name].gate.weight, std=1e-4)
        nn.init.normal_(layers[name].gate.bias, std=1.0)
    batch = batch_of(clip)
    statistics = gate_statistics(clip.model, batch)
    assert set(statistics) == set(names)
    assert statistics[moving][1] > 0.01
    for mean, spread in statistics.values():
        assert float(mean.sum()) == pytest.approx(1.0)
        assert spread >= 0
    before = [embeddings(clip, t, x) for t, x in zip(TOWERS, batch, strict=True)]
    report = collapse(clip.model, clip.structure, batch)
    assert set(report["kept"]) == {moving}
    assert set(report["merged"]) == set(still)
    after = [embeddings(clip, t, x) for t, x in zip(TOWERS, batch, strict=True)]
    drift = sum(float((1 - (a * b).sum(-1)).mean()) for a, b in zip(before, after, strict=True)) / 2
    assert report["drift"] == pytest.approx(drift, abs=1e-6)
    assert drift < 1e-5
    heads = {entry["name"]: entry["heads"] for entry in clip.structure if "heads" in entry}
    assert {heads[name] for name in still} == {1}
    assert heads[moving] == 3
    # what is left rebuilds from its structure
    fresh = build(clip.architecture).eval()
    rebuild(fresh, clip.structure)
    fresh.load_state_dict(clip.model.state_dict())
    again = Clip(fresh.eval(), clip.architecture)
    for tower, x in zip(TOWERS, batch, strict=True):
        torch.testing.assert_close(embeddings(again, tower, x), embeddings(clip, tower, x))


def test_merging_gates_that_do_move_shows_in_the_drift() -> None:
    clip = inherited(3, gates=5.0)
    for layer in gated(clip.model):  # heads that differ enough for the mixture to matter
        layer.up.data += 0.5 * layer.up.data.std() * torch.randn_like(layer.up)
    report = collapse(clip.model, clip.structure, batch_of(clip), threshold=1.0)
    assert not report["kept"]
    assert report["drift"] > 1e-4  # ten times what the constant gates above may cost
