"""What a user can set about training: one schema, its units and its defaults."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from data_prep.errors import UserError
from pipeline.config import Strict

LENGTHS = ("steps", "epochs", "samples")


class AugmentSettings(Strict):
    """Image augmentation of the training loader (open_clip's defaults)."""

    scale: tuple[float, float] = Field(
        (0.9, 1.0), description="area of the random crop, as a share of the image"
    )
    ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="aspect ratio of the crop")
    color_jitter: tuple[float, float, float, float] | None = Field(
        None, description="brightness, contrast, saturation, hue strengths"
    )
    color_jitter_prob: float = Field(0.0, ge=0, le=1)
    gray_scale_prob: float = Field(0.0, ge=0, le=1)


class TrainSettings(Strict):
    """One arm's training. Steps count optimizer updates; batch_size is the global batch."""

    steps: int | None = Field(None, ge=1, description="length in optimizer updates")
    epochs: float | None = Field(None, gt=0, description="or in passes over the training pairs")
    samples: int | None = Field(None, ge=1, description="or in pairs seen")
    batch_size: int = Field(..., ge=2, description="pairs per update, over all processes")
    accumulate: int = Field(
        1, ge=1, description="chunks per update; cached features keep the loss of the whole batch"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    lr_factors: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {},
        description="factor of lr by kind (inherited, heads, gates, scales) or glob on parameter "
        "names; the first that fits counts",
    )
    freeze: dict[str, Literal["always"] | Annotated[int, Field(ge=1)]] = Field(
        {},
        description="glob on parameter names -> how long they stay as they are: a number of steps, "
        "or always",
    )
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(1e-6, gt=0)
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    schedule: Literal["cosine", "constant"] = "cosine"
    clip_grad_norm: float | None = Field(1.0, gt=0)
    max_logit_scale: float = Field(100.0, gt=1, description="upper clamp of exp(logit_scale)")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto = bf16 autocast on CUDA, fp32 on CPU"
    )
    channels_last: bool = Field(
        True, description="memory format of images and convolutions; about a quarter faster"
    )
    batchnorm: Literal["train", "frozen", "sync"] = Field(
        "train",
        description="train = a process normalises by its own pairs, statistics are averaged when "
        "saved; sync = by all pairs (CUDA); frozen = by the running statistics, which stay",
    )
    checkpoint_activations: bool = Field(
        False, description="recompute blocks in the backward pass: less memory, a third more time"
    )
    compile: bool = Field(False, description="torch.compile both towers; needs a C++ compiler")
    ema_samples: int | None = Field(
        None,
        ge=1,
        description="keep a running average of the weights in which a step's share halves after "
        "this many pairs; it is what is evaluated and kept",
    )
    zero_stage: Literal[0, 1, 2] = 0
    deepspeed: Path | None = Field(None, description="a DeepSpeed JSON merged under our settings")
    workers: int = Field(0, ge=0, description="loader processes per rank")
    cache_decoded: bool = Field(
        False, description="keep decoded images in memory; for sets of a few gigabytes at most"
    )
    decode: Literal["workers", "device"] = Field(
        "workers",
        description="device = decode JPEGs and crop on the training device (nvJPEG on a GPU)",
    )
    augment: AugmentSettings = AugmentSettings()
    max_corrupt_share: float = Field(0.01, ge=0, le=1, description="stop above this share")
    log_every: int = Field(10, ge=1, description="steps between lines of train.jsonl")
    save_every: int = Field(200, ge=1, description="steps between resumable checkpoints")
    save_every_minutes: float = Field(15.0, gt=0)
    keep: int = Field(2, ge=1, description="resumable checkpoints kept")
    validate_every: int | None = Field(
        None, ge=1, description="steps between looks at the suite's `quick` set; keeps the best"
    )
    select: Literal["last", "best"] = Field(
        "last", description="which weights become the arm's checkpoint"
    )
    trackers: list[Literal["tensorboard", "wandb"]] = Field(
        [], description="who else gets the records of train.jsonl"
    )
    timeout_minutes: float = Field(10.0, gt=0, description="a collective that waits longer fails")
    silence_seconds: float = Field(
        45.0, ge=5, description="a rank not heard of for so long is taken for lost"
    )

    @model_validator(mode="after")
    def _consistent(self) -> TrainSettings:
        given = [name for name in LENGTHS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(LENGTHS)} (given: {', '.join(given) or '-'})")
        if self.steps is not None and self.warmup >= self.steps:
            raise ValueError(f"warmup ({self.warmup}) must be smaller than steps ({self.steps})")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate ({self.accumulate}) must divide batch_size ({self.batch_size})"
            )
        if self.select == "best" and self.validate_every is None:
            raise ValueError("select: best needs validate_every")
        if self.zero_stage and any(until != "always" for until in self.freeze.values()):
            raise ValueError(
                "freeze for a number of steps needs zero_stage 0: stages 1 and 2 fix at the start "
                "which parameters learn"
            )
        return self

    def length(self, samples: int | None) -> int | None:
        """Return the number of updates; None if it takes the number of training pairs to tell.

        Args:
            samples: Training pairs in the shards; None where they are unknown.
        """
        if self.steps is not None:
            return self.steps
        if self.samples is not None:
            return math.ceil(self.samples / self.batch_size)
        assert self.epochs is not None
        return None if samples is None else max(1, round(self.epochs * samples / self.batch_size))

    def with_steps(self, samples: int) -> TrainSettings:
        """Return the settings with their length in steps.

        Raises:
            UserError: the warm-up takes all of them.
        """
        steps = self.length(samples)
        assert steps is not None
        if self.warmup >= steps:
            raise UserError(
                f"warmup ({self.warmup}) must be smaller than the steps ({steps}), which follow "
                f"from {samples:,} pairs",
                where="train.warmup",
            )
        return self.model_copy(update={"steps": steps, "epochs": None, "samples": None})


def overlaid(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Return an arm's `train` section over the shared one; a length replaces another's unit."""
    if any(name in override for name in LENGTHS):
        base = {key: value for key, value in base.items() if key not in LENGTHS}
    return merged(base, override)


def merged(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the keys of `override` laid over it, section by section."""
    result = dict(base)
    for key, value in override.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if nested else value
    return result
