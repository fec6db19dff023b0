"""Checkpoint -> what other programs read: ONNX, `torch.export`, dense weights; always verified.

In: a loaded checkpoint. Out: a folder with the exported towers and `export.json`, which says what
they are and how far they are from the model on random inputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.errors import UserError
from data_prep.files import atomic_path, atomic_write, sha256_file
from pipeline.inherit.collapse import dense_state
from pipeline.models import Clip, build, save_checkpoint

TOWERS = ("image", "text")
OPSET = 18


class Tower(nn.Module):
    """One encoder as a module: images [B,3,S,S] or tokens [B,L] -> normalised embeddings [B,D]."""

    def __init__(self, model: nn.Module, tower: str) -> None:
        super().__init__()
        self.model, self.tower = model, tower

    def forward(self, x: Tensor) -> Tensor:
        """Encode and normalise."""
        model: Any = self.model
        features = model.encode_image(x) if self.tower == "image" else model.encode_text(x)
        return F.normalize(features, dim=-1)


def example(clip: Clip, tower: str, batch: int, seed: int = 0) -> Tensor:
    """Return random inputs of a tower; texts have a start, words, an end and padding."""
    generator = torch.Generator().manual_seed(seed)
    if tower == "image":
        shape = (batch, 3, clip.image_size, clip.image_size)
        return torch.randn(shape, generator=generator)
    vocabulary = int(clip.architecture["text_cfg"].get("vocab_size", 49408))
    length = clip.context_length
    tokens = torch.zeros(batch, length, dtype=torch.long)
    for row in tokens:
        words = int(torch.randint(1, length - 1, (1,), generator=generator))
        row[1 : words + 1] = torch.randint(0, vocabulary - 2, (words,), generator=generator)
        row[0] = vocabulary - 2
        row[min(words + 1, length - 1)] = vocabulary - 1
    return tokens


def export(clip: Clip, form: str, out: Path, *, tolerance: float = 1e-4) -> list[str]:
    """Write `clip` in another form and verify it; return lines that say what was done.

    Args:
        clip: the model.
        form: "dense" (a checkpoint folder without inherited layers), "onnx" or "torch-export".
        out: folder to write.
        tolerance: largest absolute difference of the normalised embeddings.

    Raises:
        UserError: a package is missing, or the export differs by more than the tolerance.
    """
    clip.model.eval()
    writer = {"dense": _dense, "onnx": _onnx, "torch-export": _torch_export}[form]
    with torch.no_grad():
        differences, files = writer(clip, out)
    lines = [f"{tower}: differs by at most {value:.1e}" for tower, value in differences.items()]
    wrong = {tower: value for tower, value in differences.items() if not value <= tolerance}
    if wrong:
        for file in files:
            (out / file).unlink(missing_ok=True)
        worst = max(wrong.values())
        raise UserError(
            f"the {form} export differs from the model by {worst:.1e}, more than {tolerance:g}",
            where=str(out),
            todo="heads whose gates look at the input can only be merged approximately: export "
            "another format, collapse the gates first, or raise --tolerance"
            if form == "dense"
            else "please report this; nothing was kept",
        )
    record = {
        "format": form,
        "model_sha256": clip.sha256,
        "image_size": clip.image_size,
        "context_length": clip.context_length,
        "preprocess": clip.architecture.get("preprocess", {}),
        "logit_scale": float(clip.model.logit_scale.detach().exp()),  # type: ignore[operator]
        "max_difference": differences,
        "files": {file: sha256_file(out / file) for file in files},
    }
    atomic_write(out / "export.json", json.dumps(record, indent=1) + "\n")
    return [*lines, f"written: {', '.join(str(out / file) for file in files)}"]


def _compare(clip: Clip, tower: str, run: Callable[[Tensor], Tensor]) -> float:
    """Return the largest difference between `run` and the model on two batch sizes."""
    worst = 0.0
    for batch in (1, 3):
        x = example(clip, tower, batch, seed=batch)
        worst = max(worst, float((run(x) - Tower(clip.model, tower)(x)).abs().max()))
    return worst


def _dense(clip: Clip, out: Path) -> tuple[dict[str, float], list[str]]:
    model = build(clip.architecture).eval()
    model.load_state_dict(dense_state(clip.model, set(model.state_dict())))
    differences = {tower: _compare(clip, tower, Tower(model, tower)) for tower in TOWERS}
    merged = {**clip.provenance, "merged_from": clip.sha256}
    save_checkpoint(Clip(model, clip.architecture, [], merged), out)
    return differences, ["model.safetensors", "model.json"]


def _torch_export(clip: Clip, out: Path) -> tuple[dict[str, float], list[str]]:
    differences, files = {}, []
    for tower in TOWERS:
        program = torch.export.export(
            Tower(clip.model, tower),
            (example(clip, tower, 2),),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
        )
        file = f"{tower}.pt2"
        with atomic_path(out / file) as path:
            # save() insists on the suffix
            plain = path.with_suffix(".pt2")
            torch.export.save(program, plain)
            plain.replace(path)
        differences[tower] = _compare(clip, tower, torch.export.load(out / file).module())
        files.append(file)
    return differences, files


def _onnx(clip: Clip, out: Path) -> tuple[dict[str, float], list[str]]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise UserError(
            f"the package {error.name} is missing", todo="pip install 'inherclip[export]'"
        ) from error
    differences, files = {}, []
    for tower in TOWERS:
        program = torch.onnx.export(
            Tower(clip.model, tower),
            (example(clip, tower, 2),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images" if tower == "image" else "tokens"],
            output_names=["embeddings"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
            verbose=False,
        )
        assert program is not None
        file = f"{tower}.onnx"
        with atomic_path(out / file) as path:
            program.save(str(path), external_data=False)
        session = onnxruntime.InferenceSession(str(out / file), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name

        def run(x: Tensor, session: Any = session, name: str = name) -> Tensor:
            return torch.from_numpy(session.run(None, {name: x.numpy()})[0])

        differences[tower] = _compare(clip, tower, run)
        files.append(file)
    return differences, files
