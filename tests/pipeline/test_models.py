"""Checkpoints rebuild themselves; teachers load from every format; damage is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from data_prep.errors import UserError
from pipeline.inherit import inherit
from pipeline.models import (
    Clip,
    build,
    build_tokenizer,
    load_checkpoint,
    parameters,
    preprocessing,
    save_checkpoint,
)
from pipeline.teachers import load_teacher
from tests.pipeline.conftest import tiny_model


@pytest.fixture
def clip() -> Clip:
    architecture = tiny_model()
    return Clip(build(architecture, seed=1).eval(), architecture, provenance={"seed": 1})


def outputs(model: Any, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(3, 3, 32, 32, generator=generator)
    tokens = torch.randint(1, 1022, (3, 24), generator=generator)
    tokens[:, 10] = 1023
    with torch.no_grad():
        return torch.cat([model.encode_image(images), model.encode_text(tokens)])


def test_a_dense_checkpoint_comes_back_the_same(clip: Clip, tmp_path: Path) -> None:
    digest = save_checkpoint(clip, tmp_path)
    again = load_checkpoint(tmp_path)
    assert torch.equal(outputs(clip.model), outputs(again.model))
    assert (again.sha256, again.provenance) == (digest, {"seed": 1})
    assert json.loads((tmp_path / "model.json").read_text())["parameters"] == parameters(clip.model)


def test_an_inherited_checkpoint_comes_back_without_its_teacher(clip: Clip, tmp_path: Path) -> None:
    model, plan = inherit(clip.model, budget="params=0.5", arm="svd", heads=2)
    small = Clip(model.eval(), clip.architecture, plan.structure)
    save_checkpoint(small, tmp_path)
    again = load_checkpoint(tmp_path)
    assert torch.equal(outputs(small.model), outputs(again.model))
    assert parameters(again.model) <= 0.5 * parameters(clip.model)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / "model.json").read_text())
        change(content)
        (folder / "model.json").write_text(json.dumps(content))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.json").unlink(), "model.json is missing"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: (f / "model.json").write_text("{"), "damaged model.json"),
        (lambda f: cut(f / "model.safetensors"), "SHA-256 differs"),
        (edit(lambda d: d.update(format=99)), "format 99 is newer"),
        (edit(lambda d: d.pop("format")), "of another program"),
        (edit(lambda d: d.pop("inherited")), "lacks inherited"),
        (edit(lambda d: d["architecture"].pop("text_cfg")), "text_cfg missing"),
        (edit(lambda d: d["architecture"]["text_cfg"].update(width=48)), "weights do not fit"),
        (edit(lambda d: d["architecture"]["text_cfg"].update(layers=1)), "names differ"),
        (edit(lambda d: d["architecture"]["vision_cfg"].update(depth=9)), "open_clip cannot build"),
    ],
)
def test_a_damaged_foreign_or_newer_checkpoint_is_refused(
    clip: Clip, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    save_checkpoint(clip, tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path)


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(
    clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(clip, tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.models.save_file", full)
    with pytest.raises(UserError, match="no space left"):
        save_checkpoint(Clip(build(tiny_model(), seed=2), clip.architecture), tmp_path)
    assert torch.equal(outputs(load_checkpoint(tmp_path).model), outputs(clip.model))
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the tiny architecture under names, as open_clip does for RN101 and its sibling."""
    configs = open_clip.factory._MODEL_CONFIGS
    monkeypatch.setitem(configs, "RN-tiny", tiny_model())
    monkeypatch.setitem(configs, "RN-tiny-quickgelu", tiny_model() | {"quick_gelu": True})


def as_open_clip_training(state: dict[str, torch.Tensor]) -> Any:
    state = {f"module.{k}": v for k, v in state.items()}
    return {"epoch": 3, "name": "x", "state_dict": state, "optimizer": {"lr": 1e-3}}


def as_clip_kd(state: dict[str, torch.Tensor]) -> Any:
    extra = {
        "module.visual_proj.weight": torch.zeros(2, 2),
        "module.text_proj.bias": torch.zeros(2),
    }
    return {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()} | extra}


@pytest.mark.parametrize("form", [dict, as_open_clip_training, as_clip_kd])
@pytest.mark.usefixtures("named")
def test_a_local_pt_file_is_a_teacher(clip: Clip, tmp_path: Path, form: Callable[..., Any]) -> None:
    state = dict(clip.model.state_dict())
    state["logit_scale"] = state["logit_scale"].reshape(())  # open_clip's scalar form
    torch.save(form(state), tmp_path / "w.pt")
    teacher = load_teacher(f"RN-tiny:{tmp_path / 'w.pt'}")
    assert torch.equal(outputs(teacher.model), outputs(clip.model))


@pytest.mark.usefixtures("named")
def test_a_safetensors_file_is_a_teacher(clip: Clip, tmp_path: Path) -> None:
    save_file(clip.model.state_dict(), tmp_path / "w.safetensors")
    teacher = load_teacher(f"RN-tiny:{tmp_path / 'w.safetensors'}")
    assert torch.equal(outputs(teacher.model), outputs(clip.model))


class Archive(torch.nn.Module):
    """A TorchScript archive with the parameter names of a CLIP, as OpenAI published them."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.visual = model.visual
        self.transformer = model.transformer
        self.token_embedding = model.token_embedding
        self.ln_final = model.ln_final
        for name in ("positional_embedding", "text_projection", "logit_scale"):
            setattr(self, name, getattr(model, name))
        for name, value in (("input_resolution", 32), ("context_length", 24), ("vocab_size", 1024)):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.visual(images)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("named")
def test_an_openai_archive_needs_the_quickgelu_architecture(tmp_path: Path) -> None:
    architecture = tiny_model() | {"quick_gelu": True}
    model = build(architecture, seed=4).eval()
    # text layers hold Python control flow that scripting refuses; tracing the image tower keeps
    # every parameter and buffer in the archive, which is all that is read
    torch.jit.trace(Archive(model), torch.zeros(1, 3, 32, 32)).save(str(tmp_path / "openai.pt"))
    teacher = load_teacher(f"RN-tiny-quickgelu:{tmp_path / 'openai.pt'}")
    assert torch.equal(outputs(teacher.model), outputs(model))
    with pytest.raises(UserError, match="RN-tiny-quickgelu:"):
        load_teacher(f"RN-tiny:{tmp_path / 'openai.pt'}")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("pickled code ran",)


@pytest.mark.usefixtures("named")
def test_a_file_with_code_in_it_is_refused_and_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="cannot read the weights safely"):
        load_teacher(f"RN-tiny:{tmp_path / 'evil.pt'}")
    assert "pickled code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("RN101:openai", "use RN101-quickgelu:openai"),
        ("RN101-quickgelu:laion2b", "known tags: openai, yfcc15m"),
        ("RN101", "has no weights"),
        ("RN-101:openai", "did you mean RN101"),
        ("RN101:nowhere.pt", "no such weights file"),
    ],
)
def test_a_teacher_that_cannot_be_is_named(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_teacher(spec)


@pytest.mark.usefixtures("named")
def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    torch.save(build(tiny_model(4, 16)).state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match="not the weights of RN-tiny"):
        load_teacher(f"RN-tiny:{tmp_path / 'w.pt'}")


def test_untrained_weights_are_only_had_by_asking() -> None:
    with pytest.raises(UserError, match="untrained"):
        load_teacher("RN101-quickgelu:openai", untrained=True)


def test_a_smaller_vocabulary_is_a_prefix_of_clips_own() -> None:
    small = build_tokenizer({"text_cfg": {"context_length": 24, "vocab_size": 1024}})
    full = build_tokenizer({"text_cfg": {"context_length": 24}})
    tokens = small(["a photo of the cat"])
    assert tokens.max() == 1023
    assert tokens[0, 0] == 1022
    assert small.decode(tokens[0].tolist()) == (
        "<start_of_text>a photo of the cat <end_of_text>" + "!" * int((tokens[0] == 0).sum())
    )
    common = [a for a, b in zip(tokens[0].tolist(), full(["a photo of the cat"])[0].tolist(),
                                strict=True) if a == b]  # fmt: skip
    assert common  # frequent words keep their ids


def test_a_named_seed_gives_the_same_weights_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two = build(tiny_model(), seed=3), build(tiny_model(), seed=3)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(outputs(one.eval()), outputs(two.eval()))
    assert one.logit_scale.shape == (1,)


def test_the_default_normalisation_is_open_clips() -> None:
    import open_clip

    shape = preprocessing({})
    assert shape["mean"] == open_clip.OPENAI_DATASET_MEAN
    assert shape["std"] == open_clip.OPENAI_DATASET_STD
