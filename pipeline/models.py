"""Architectures and checkpoint folders: build a CLIP, save it, load it back without its teacher.

A checkpoint folder holds `model.safetensors` (weights) and `model.json` (everything that rebuilds
the architecture, and where the weights came from). `model.json` is written last and carries the
hash of the weights, so a folder is either whole or recognisably not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from data_prep.errors import UserError
from data_prep.files import atomic_path, atomic_write, sha256_file
from pipeline.inherit import rebuild

FORMAT = 1
FULL_VOCABULARY = 49408  # CLIP's byte-pair vocabulary
TokenizerT = Callable[[list[str]], torch.Tensor]


# open_clip's OPENAI_DATASET_MEAN and _STD, without the seconds that importing it takes
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class Clip:
    """A model with what is needed to use it and to write it down.

    Attributes:
        model: `encode_image(images [B,3,S,S])` and `encode_text(tokens [B,L])`, both to [B,D].
        architecture: open_clip's model configuration, plus an optional `preprocess` section.
        structure: The inherited layers, as `pipeline.inherit.rebuild` wants them; empty if dense.
        provenance: Where the weights came from (teacher hash, budget, steps, seed, ...).
        sha256: Hash of the weights file this model was loaded from, if it was.
    """

    model: nn.Module
    architecture: dict[str, Any]
    structure: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    sha256: str | None = None

    @property
    def image_size(self) -> int:
        """Side of the square input image, in pixels."""
        size = self.architecture["vision_cfg"].get("image_size", 224)
        return int(size[0] if isinstance(size, (list, tuple)) else size)

    @property
    def context_length(self) -> int:
        """Length of a tokenised caption."""
        return int(self.architecture["text_cfg"].get("context_length", 77))

    @property
    def embed_dim(self) -> int:
        """Width of the joint embedding."""
        return int(self.architecture["embed_dim"])

    def tokenizer(self) -> TokenizerT:
        """Return the tokenizer that this model's text tower was built for."""
        return build_tokenizer(self.architecture)

    def transform(self) -> Callable[[Any], torch.Tensor]:
        """Return open_clip's evaluation transform, `PIL.Image` to [3,S,S], for this model."""
        import open_clip

        return open_clip.image_transform(
            self.image_size, is_train=False, **preprocessing(self.architecture)
        )


def refuse_other_input(student: dict[str, Any], teacher: dict[str, Any], where: str) -> None:
    """Refuse two architectures that cannot read the same batch.

    Raises:
        UserError: naming what differs, with both values.
    """

    def inputs(architecture: dict[str, Any]) -> dict[str, Any]:
        vision, text = architecture["vision_cfg"], architecture["text_cfg"]
        shape = preprocessing(architecture)
        return {
            "image size": vision.get("image_size", 224),
            "context length": text.get("context_length", 77),
            "vocabulary": (text.get("vocab_size", 49408), text.get("hf_tokenizer_name")),
            "normalisation": (shape["mean"], shape["std"]),
        }

    ours, theirs = inputs(student), inputs(teacher)
    different = [f"{k}: {ours[k]} and {theirs[k]}" for k in ours if ours[k] != theirs[k]]
    if different:
        raise UserError(
            f"student and teacher differ in {'; '.join(different)}",
            where=where,
            todo="both read the same batch; give them the same input",
        )


def preprocessing(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return mean, std, interpolation and resize mode of an architecture (default: CLIP's)."""
    defaults = {
        "mean": CLIP_MEAN,
        "std": CLIP_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    given = {k: v for k, v in architecture.get("preprocess", {}).items() if k in defaults}
    chosen = defaults | given
    return chosen | {"mean": tuple(chosen["mean"]), "std": tuple(chosen["std"])}


def read_architecture(model: str | Path | Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return an open_clip model configuration.

    Args:
        model: The configuration itself, the path of a JSON file (looked up from `folder`, then
            from the working directory), or the name of an architecture that open_clip ships.
        folder: Where relative paths start: the folder of the experiment's YAML file.

    Raises:
        UserError: no such file or architecture, or the file is not a model configuration.
    """
    if isinstance(model, Mapping):
        return _checked_architecture(dict(model), "model")
    name = str(model)
    if name.endswith(".json"):
        for path in (folder / name, Path(name)):
            if path.is_file():
                try:
                    return _checked_architecture(json.loads(path.read_text()), str(path))
                except json.JSONDecodeError as error:
                    raise UserError(f"not valid JSON: {error}", where=str(path)) from error
        raise UserError(
            "no such model configuration",
            where=str(folder / name),
            todo="give a path relative to the experiment's YAML, or an open_clip name, e.g. RN101",
        )
    import open_clip

    config = open_clip.get_model_config(name)
    if config is None:
        import difflib

        near = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.4)
        raise UserError(
            f"unknown model {name!r}",
            todo=(f"did you mean {', '.join(near)}? " if near else "")
            + "open_clip.list_models() lists all; a path must end in .json",
        )
    return _checked_architecture(config, name)


def _checked_architecture(config: Any, where: str) -> dict[str, Any]:
    if not isinstance(config, dict):
        raise UserError("a model configuration must be a mapping", where=where)
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if missing:
        raise UserError(
            f"not a model configuration: {', '.join(missing)} missing",
            where=where,
            todo="use open_clip's format: embed_dim, vision_cfg, text_cfg",
        )
    return deepcopy(config)


def build(architecture: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """Build a CLIP with random weights that depend on `seed` alone.

    The logit scale has one element instead of none: DeepSpeed 0.19.8 cannot broadcast 0-d
    parameters, and open_clip reshapes either form on load.

    Raises:
        UserError: the configuration is not one that open_clip can build.
    """
    from open_clip.model import CLIP, CustomTextCLIP

    config = {k: deepcopy(v) for k, v in architecture.items() if k != "preprocess"}
    custom_text = config.pop("custom_text", False)
    if config["text_cfg"].get("hf_model_name") or "multimodal_cfg" in config:
        raise UserError(
            "text towers from transformers and CoCa decoders are not supported",
            todo="choose a CLIP whose text tower is open_clip's own transformer",
        )
    model_class = CustomTextCLIP if custom_text else CLIP
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model: nn.Module = model_class(**config, nonscalar_logit_scale=True)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise UserError(
                f"open_clip cannot build this architecture: {error}",
                where="model",
                todo="compare it with the JSON files that open_clip ships",
            ) from error
    return model


def build_tokenizer(architecture: Mapping[str, Any]) -> TokenizerT:
    """Return the tokenizer for an architecture: `list[str]` to token ids [B, context_length].

    A `vocab_size` below CLIP's 49,408 means CLIP's own byte-pair code stopped early: its merges
    are ordered by frequency, so the first ones alone are a valid code with a smaller embedding.
    """
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer

    text = architecture["text_cfg"]
    context_length = int(text.get("context_length", 77))
    vocabulary = int(text.get("vocab_size", FULL_VOCABULARY))
    if text.get("hf_tokenizer_name"):
        return open_clip.tokenizer.HFTokenizer(
            text["hf_tokenizer_name"],
            context_length=context_length,
            tokenizer_mode=text.get("tokenizer_mode"),
            **(text.get("tokenizer_kwargs") or {}),
        )
    tokenizer = SimpleTokenizer(
        context_length=context_length, **(text.get("tokenizer_kwargs") or {})
    )
    if vocabulary < FULL_VOCABULARY:
        _stop_merging_at(tokenizer, vocabulary)
    return tokenizer


def _stop_merging_at(tokenizer: Any, vocabulary: int) -> None:
    """Keep the 512 byte tokens, the first merges, and the two special tokens as the last ids."""
    merges = vocabulary - 512 - 2
    if merges < 0:
        raise UserError(
            f"vocab_size {vocabulary} is too small",
            where="text_cfg.vocab_size",
            todo="bytes and the two special tokens alone need 514",
        )
    specials = ["<start_of_text>", "<end_of_text>"]
    kept = sorted(tokenizer.encoder, key=tokenizer.encoder.__getitem__)[: 512 + merges] + specials
    tokenizer.encoder = {token: index for index, token in enumerate(kept)}
    tokenizer.decoder = {index: token for token, index in tokenizer.encoder.items()}
    ranked = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)[:merges]
    tokenizer.bpe_ranks = {pair: rank for rank, pair in enumerate(ranked)}
    tokenizer.cache = {token: token for token in specials}
    tokenizer.vocab_size = vocabulary
    tokenizer.all_special_ids = [vocabulary - 2, vocabulary - 1]
    tokenizer.sot_token_id, tokenizer.eot_token_id = vocabulary - 2, vocabulary - 1


def parameters(model: nn.Module) -> int:
    """Return the number of parameters, both towers and the token embedding included."""
    return sum(p.numel() for p in model.parameters())


def save_checkpoint(clip: Clip, folder: str | Path) -> str:
    """Write a checkpoint folder and return the SHA-256 of its weights.

    Raises:
        UserError: the disk is full; a checkpoint that was there before is then still whole.
    """
    folder = Path(folder)
    state = {name: t.detach().cpu().contiguous() for name, t in clip.model.state_dict().items()}
    with atomic_path(folder / "model.safetensors") as path:
        save_file(state, path)
        digest = sha256_file(path)
    description = {
        "format": FORMAT,
        "architecture": clip.architecture,
        "inherited": clip.structure,
        "parameters": parameters(clip.model),
        "provenance": clip.provenance,
        "weights_sha256": digest,
    }
    atomic_write(folder / "model.json", json.dumps(description, indent=1) + "\n")
    clip.sha256 = digest
    return digest


def read_description(folder: str | Path) -> dict[str, Any]:
    """Return the content of a checkpoint's `model.json`.

    Raises:
        UserError: missing, damaged, foreign, or of a newer format.
    """
    path = Path(folder) / "model.json"
    try:
        description = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            "not a checkpoint: model.json is missing",
            where=str(folder),
            todo="give the folder that holds model.json and model.safetensors",
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, NotADirectoryError) as error:
        raise UserError(f"damaged model.json: {error}", where=str(path)) from error
    if not isinstance(description, dict) or "format" not in description:
        raise UserError(
            "a model.json of another program: it has no 'format'",
            where=str(path),
            todo="an open_clip checkpoint is given as NAME:TAG or NAME:FILE",
        )
    if not isinstance(description["format"], int) or description["format"] > FORMAT:
        raise UserError(
            f"checkpoint format {description['format']!r} is newer than this program's ({FORMAT})",
            where=str(path),
            todo="update inherclip",
        )
    absent = [k for k in ("architecture", "inherited", "weights_sha256") if k not in description]
    if absent:
        raise UserError(f"model.json lacks {', '.join(absent)}", where=str(path))
    return description


def load_checkpoint(folder: str | Path, device: str | torch.device = "cpu") -> Clip:
    """Rebuild a model from its checkpoint folder alone.

    Raises:
        UserError: the folder is damaged (weights do not match their hash or their layers),
            foreign, or of a newer format.
    """
    folder = Path(folder)
    description = read_description(folder)
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError("model.safetensors is missing", where=str(folder))
    digest = sha256_file(path)
    if digest != description["weights_sha256"]:
        raise UserError(
            "model.safetensors is not the file that model.json describes (its SHA-256 differs)",
            where=str(folder),
            todo="the checkpoint is damaged or half-copied: copy or make it again",
        )
    architecture = _checked_architecture(description["architecture"], str(folder / "model.json"))
    model = build(architecture)
    rebuild(model, description["inherited"])
    try:
        incompatible = model.load_state_dict(load_file(path), strict=False)
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"the weights do not fit: {error}", where=str(folder)) from error
    wrong = [*incompatible.missing_keys, *incompatible.unexpected_keys]
    if wrong:
        raise UserError(
            f"the weights do not fit the architecture: {len(wrong)} names differ, e.g. {wrong[0]}",
            where=str(folder),
        )
    return Clip(
        model=model.to(device).eval(),
        architecture=architecture,
        structure=description["inherited"],
        provenance=description.get("provenance", {}),
        sha256=digest,
    )
