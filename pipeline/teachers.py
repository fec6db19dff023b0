"""Teachers from outside: open_clip names and tags, local files, OpenAI archives, CLIP-KD.

A teacher is named in one string:

    FOLDER                    a checkpoint folder of ours
    RN101-quickgelu:openai    an open_clip architecture and one of its pre-trained tags
    RN101:weights.pt          an open_clip architecture and a local .pt, .pth, .bin or .safetensors
                              file: an open_clip or CLIP-KD training checkpoint, a bare state dict,
                              or an OpenAI TorchScript archive
    RN101                     an architecture alone: allowed only where untrained weights are asked

The activation is part of the name: `RN101-quickgelu` computes x*sigmoid(1.702x), `RN101` the exact
GELU, and the weights of one are wrong in the other although every shape fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import UserError
from data_prep.files import sha256_file
from pipeline.models import Clip, build, load_checkpoint, read_architecture

WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


def load_teacher(
    spec: str, *, untrained: bool = False, seed: int = 0, folder: Path | None = None
) -> Clip:
    """Load the teacher that `spec` names (see the module's first lines).

    Args:
        spec: The teacher.
        untrained: Allow, and demand, an architecture without weights.
        seed: Seed of the random weights when `untrained`.
        folder: Where a relative path of an architecture's JSON starts.

    Raises:
        UserError: unknown name or tag, missing or damaged file, weights that do not fit, or
            weights trained with the other activation.
    """
    folder = folder or Path.cwd()
    if Path(spec).is_dir():
        return load_checkpoint(spec)
    name, _, weights = spec.partition(":")
    architecture = read_architecture(name, folder)
    if untrained:
        if weights:
            raise UserError(
                f"{spec!r} names weights, but untrained weights were asked", todo=f"give {name!r}"
            )
        return Clip(
            build(architecture, seed).eval(),
            architecture,
            provenance={"teacher": name, "untrained": True, "seed": seed},
        )
    if not weights:
        tags = _tags(name)
        raise UserError(
            f"teacher {spec!r} has no weights",
            todo=f"give {name}:TAG or {name}:FILE"
            + (f" (tags: {', '.join(tags)})" if tags else "")
            + ", or ask for untrained weights",
        )
    if weights.endswith(WEIGHT_SUFFIXES):
        return _from_file(name, architecture, Path(weights))
    return _from_tag(name, architecture, weights)


def missing_weights(spec: str) -> str | None:
    """Say in one line what `load_teacher(spec)` would find missing, without loading; else None."""
    if Path(spec).is_dir():
        return None
    name, _, weights = spec.partition(":")
    if not weights:
        return f"no weights in {spec!r}"
    if weights.endswith(WEIGHT_SUFFIXES):
        return None if Path(weights).is_file() else f"weights file {weights}"
    _check_tag(name, weights, read_architecture(name, Path.cwd()))
    return None if _cached_tag_file(name, weights) else f"weights {spec} (not downloaded yet)"


def _tags(name: str) -> list[str]:
    import open_clip

    return list(open_clip.list_pretrained_tags_by_model(name))


def _check_tag(name: str, tag: str, architecture: Mapping[str, Any]) -> None:
    """Refuse an unknown tag, and one that was trained with the other activation."""
    import open_clip

    known = open_clip.pretrained.get_pretrained_cfg(name, tag)
    if not known:
        raise UserError(
            f"open_clip has no weights {tag!r} for {name}",
            todo=f"known tags: {', '.join(_tags(name)) or 'none'}",
        )
    trained, built = bool(known.get("quick_gelu")), bool(architecture.get("quick_gelu"))
    if trained != built:
        other = f"{name}-quickgelu" if trained else name.removesuffix("-quickgelu")
        raise UserError(
            f"the weights {tag!r} were trained with {'QuickGELU' if trained else 'GELU'}, but "
            f"{name} computes {'QuickGELU' if built else 'GELU'}",
            todo=f"use {other}:{tag}",
        )


def _cached_tag_file(name: str, tag: str) -> Path | None:
    """Return the local copy of a tag's weights, if the download was done before."""
    import open_clip
    from huggingface_hub import try_to_load_from_cache

    known = open_clip.pretrained.get_pretrained_cfg(name, tag)
    hub = known.get("hf_hub", "")
    if hub:
        repository, _, filename = hub.rpartition("/")
        for candidate in filter(None, (filename, "open_clip_model.safetensors")):
            found = try_to_load_from_cache(repository, candidate)
            if isinstance(found, str):
                return Path(found)
    url = known.get("url", "")
    path = Path("~/.cache/clip").expanduser() / Path(url).name
    return path if url and path.is_file() else None


def _from_tag(name: str, architecture: dict[str, Any], tag: str) -> Clip:
    import open_clip

    _check_tag(name, tag, architecture)
    known = open_clip.pretrained.get_pretrained_cfg(name, tag)
    try:
        path = open_clip.pretrained.download_pretrained(known)
    except Exception as error:  # every network library below raises its own kinds
        raise UserError(
            f"cannot download the weights: {type(error).__name__}: {error}",
            where=f"{name}:{tag}",
            todo=f"download them on a machine with internet access and give {name}:FILE",
        ) from error
    clip = _from_file(name, architecture, Path(path))
    preprocess = {k: known[k] for k in ("mean", "std", "interpolation") if k in known}
    if preprocess:
        clip.architecture["preprocess"] = preprocess
    clip.provenance["teacher"] = f"{name}:{tag}"
    return clip


def _from_file(name: str, architecture: dict[str, Any], path: Path) -> Clip:
    if not path.is_file():
        raise UserError("no such weights file", where=str(path))
    state, is_openai_archive = _read_state(path)
    if is_openai_archive and not architecture.get("quick_gelu"):
        raise UserError(
            f"an OpenAI archive computes QuickGELU, but {name} computes GELU",
            where=str(path),
            todo=f"use {name}-quickgelu:{path}",
        )
    model = build(architecture)
    _load_state(model, state, name, path)
    return Clip(
        model.float().eval(),
        architecture,
        provenance={"teacher": name, "file": path.name, "sha256": sha256_file(path)},
    )


def _read_state(path: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """Return (state dict in float32, whether the file is an OpenAI TorchScript archive)."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return _cleaned(load_file(path)), False
        except SafetensorError as error:
            raise UserError(f"damaged safetensors file: {error}", where=str(path)) from error
    try:
        archive = torch.jit.load(str(path), map_location="cpu")
    except RuntimeError:
        archive = None
    if archive is not None:
        return _cleaned(archive.state_dict()), True
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle, zip, end-of-file and runtime errors here
        raise UserError(
            f"cannot read the weights safely: {type(error).__name__}: {str(error).splitlines()[0]}",
            where=str(path),
            todo="the file is damaged, or holds more than tensors; convert it to safetensors",
        ) from error
    if isinstance(content, dict):
        for key in ("state_dict", "model"):  # training checkpoints of open_clip and CLIP-KD
            if isinstance(content.get(key), dict):
                content = content[key]
                break
    if not isinstance(content, dict) or not all(torch.is_tensor(v) for v in content.values()):
        raise UserError("the file holds no state dict", where=str(path))
    return _cleaned(content), False


def _cleaned(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop DDP's prefix and OpenAI's shape entries; half precision becomes float32."""
    shapes = ("input_resolution", "context_length", "vocab_size")
    cleaned = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.")
        if name not in shapes:
            cleaned[name] = tensor.float() if tensor.is_floating_point() else tensor
    return cleaned


def _load_state(
    model: torch.nn.Module, state: dict[str, torch.Tensor], name: str, path: Path
) -> None:
    """Load strictly; only shapes of scales, constant masks and CLIP-KD's extra parts may differ."""
    expected = model.state_dict()
    # CLIP-KD wraps the student in a module that also holds the distillation losses' parameters.
    extra = [key for key in state if key not in expected]
    prefixes = ("distill", "loss", "kd", "visual_proj", "text_proj", "attn_mask", "visual_fusion",
                "text_fusion", "cross_logit_scale", "fusion_logit_scale")  # fmt: skip
    unknown = [key for key in extra if not key.startswith(prefixes)]
    for key in extra:
        del state[key]
    for key in ("logit_scale", "logit_bias"):
        if key in state and key in expected:
            state[key] = state[key].reshape(expected[key].shape)
    missing = [key for key in expected if key not in state and "num_batches_tracked" not in key]
    shapes = [k for k in state if k in expected and state[k].shape != expected[k].shape]
    if missing or shapes or unknown:
        examples = [f"missing {k}" for k in missing[:2]] + [f"unknown {k}" for k in unknown[:2]]
        examples += [
            f"{k} is {tuple(state[k].shape)}, not {tuple(expected[k].shape)}" for k in shapes[:2]
        ]
        raise UserError(
            f"these are not the weights of {name}: {len(missing)} tensors missing, {len(unknown)} "
            f"unknown, {len(shapes)} of another shape ({'; '.join(examples)})",
            where=str(path),
            todo="name the architecture that the weights were trained with",
        )
    model.load_state_dict(state, strict=False)
