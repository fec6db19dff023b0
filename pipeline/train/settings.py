"""What a user can set about training: one schema, its units and its defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.config import Strict


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

    steps: int = Field(..., ge=1, description="optimizer updates")
    batch_size: int = Field(..., ge=2, description="pairs per update, over all processes")
    accumulate: int = Field(
        1, ge=1, description="chunks per update; cached features keep the loss of the whole batch"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
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
    zero_stage: Literal[0, 1, 2] = 0
    deepspeed: Path | None = Field(None, description="a DeepSpeed JSON merged under our settings")
    workers: int = Field(0, ge=0, description="loader processes per rank")
    cache_decoded: bool = Field(
        False, description="keep decoded images in memory; for sets of a few gigabytes at most"
    )
    augment: AugmentSettings = AugmentSettings()
    max_corrupt_share: float = Field(0.01, ge=0, le=1, description="stop above this share")
    log_every: int = Field(10, ge=1, description="steps between lines of train.jsonl")
    save_every: int = Field(200, ge=1, description="steps between resumable checkpoints")
    save_every_minutes: float = Field(15.0, gt=0)
    keep: int = Field(2, ge=1, description="resumable checkpoints kept")
    timeout_minutes: float = Field(10.0, gt=0, description="a collective that waits longer fails")

    @model_validator(mode="after")
    def _consistent(self) -> TrainSettings:
        if self.warmup >= self.steps:
            raise ValueError(f"warmup ({self.warmup}) must be smaller than steps ({self.steps})")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate ({self.accumulate}) must divide batch_size ({self.batch_size})"
            )
        return self


def merged(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the keys of `override` laid over it, section by section."""
    result = dict(base)
    for key, value in override.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if nested else value
    return result
