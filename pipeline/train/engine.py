"""Student and objective in, DeepSpeed engine out; what is decayed, and what DeepSpeed is told."""

from __future__ import annotations

import json
import logging
from typing import Any

import torch
from torch import nn

from data_prep.errors import UserError
from pipeline.train.parameters import parameter_groups
from pipeline.train.processes import Processes
from pipeline.train.settings import TrainSettings, merged


def resolved_precision(settings: TrainSettings, processes: Processes) -> str:
    """Return `bf16` or `fp32` for this device.

    Raises:
        UserError: bf16 was asked for on a GPU that has no such arithmetic.
    """
    if settings.precision != "auto":
        unsupported = processes.device.type == "cuda" and not torch.cuda.is_bf16_supported()
        if settings.precision == "bf16" and unsupported:
            raise UserError("this GPU has no bf16", where="train.precision", todo="set fp32")
        return settings.precision
    return "bf16" if processes.device.type == "cuda" else "fp32"


def deepspeed_config(settings: TrainSettings, processes: Processes) -> dict[str, Any]:
    """Return DeepSpeed's configuration: the user's JSON with ours laid over it.

    Raises:
        UserError: the batch does not divide over the processes, or the user's JSON contradicts
            the experiment's configuration.
    """
    parts = processes.world_size * settings.accumulate
    if settings.batch_size % parts:
        raise UserError(
            f"batch_size {settings.batch_size} does not divide into {processes.world_size} "
            f"processes x {settings.accumulate} chunks",
            where="train.batch_size",
            todo=f"use a multiple of {parts}",
        )
    ours: dict[str, Any] = {
        "train_batch_size": settings.batch_size,
        "train_micro_batch_size_per_gpu": settings.batch_size // parts,
        "gradient_accumulation_steps": settings.accumulate,
        "gradient_clipping": settings.clip_grad_norm or 0.0,
        "zero_optimization": {"stage": settings.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
    }
    if resolved_precision(settings, processes) == "bf16":
        # Parameters, optimizer state and BatchNorm stay float32. An empty list of safe modules
        # keeps the gradients of stages 1 and 2 from being reduced in bf16.
        ours["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
    if settings.deepspeed is None:
        return ours
    try:
        theirs = json.loads(settings.deepspeed.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read: {error}", where=str(settings.deepspeed)) from error
    _refuse_contradictions(ours, theirs, str(settings.deepspeed))
    return merged(theirs, ours)


def _refuse_contradictions(
    ours: dict[str, Any], theirs: dict[str, Any], where: str, prefix: str = ""
) -> None:
    refused = ("optimizer", "scheduler", "fp16", "bf16")
    for key in (k for k in refused if k in theirs and not prefix):
        raise UserError(
            f"{key!r} belongs to the experiment's own configuration",
            where=where,
            todo="remove it; set train.lr, train.schedule or train.precision instead",
        )
    for key, value in theirs.items():
        if key not in ours or value == "auto":
            continue
        if isinstance(value, dict) and isinstance(ours[key], dict):
            _refuse_contradictions(ours[key], value, where, f"{prefix}{key}.")
        elif value != ours[key]:
            raise UserError(
                f"{prefix}{key} is {value!r}, but the experiment's configuration makes it "
                f"{ours[key]!r}",
                where=where,
                todo="remove the key from the DeepSpeed JSON, or change the experiment",
            )


def start_engine(
    module: nn.Module, settings: TrainSettings, processes: Processes
) -> tuple[Any, torch.optim.Optimizer]:
    """Return DeepSpeed's engine around `module`, and its optimizer.

    Raises:
        UserError: see `deepspeed_config`.
    """
    config = deepspeed_config(settings, processes)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # see processes.joined
    module = module.to(processes.device)
    if settings.channels_last:
        module = module.to(memory_format=torch.channels_last)
    groups = parameter_groups(module, settings)
    optimizer = torch.optim.AdamW(
        groups,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,  # a kernel of its own for CUDA and for the CPU: one pass over the weights
    )
    engine, optimizer, _, _ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config=config,
        dist_init_required=None,
    )
    if processes.world_size == 1 and settings.zero_stage == 0:
        # DeepSpeed copies all gradients into a bucket and back, even for a group of one
        engine.enable_backward_allreduce = False
    return engine, optimizer
