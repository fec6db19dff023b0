"""What a model costs: parameters, multiply-adds, latency, throughput, memory."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from eval.contracts import encode, evaluating, floating_dtype


def parameters(model: nn.Module) -> int:
    """Return the number of parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _vector_flops(first: Any, second: Any, *_: Any, **__: Any) -> int:
    return int(2 * prod(first))


def _added_vector_flops(_: Any, matrix: Any, *__: Any, **___: Any) -> int:
    return int(2 * prod(matrix))


def _uncounted_operators() -> dict[Any, Callable[..., int]]:
    """Operators that multiply and add but are unknown to FlopCounterMode in some torch versions."""
    aten = torch.ops.aten
    extra: dict[Any, Callable[..., int]] = {
        aten.mv: _vector_flops,
        aten.dot: _vector_flops,
        aten.addmv: _added_vector_flops,
    }
    on_cpu = getattr(aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    if on_cpu is not None:
        extra[on_cpu] = _attention_flops
    return extra


@contextmanager
def _decomposed_attention() -> Iterator[None]:
    """Switch off nn.MultiheadAttention's fused path: one opaque operator that counts as nothing."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _inputs(
    model: nn.Module, batch: int, image_size: int, context_length: int
) -> tuple[Tensor, Tensor]:
    """Return random images [B, 3, S, S] and full-length tokens [B, L] on the model's device."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, image_size, image_size, generator=generator)
    # The highest id marks the end of the text: at the last position nothing is padding.
    tokens = torch.zeros(batch, context_length, dtype=torch.long)
    tokens[:, -1] = 1
    return images.to(device, floating_dtype(model)), tokens.to(device)


def multiply_adds(model: nn.Module, image_size: int, context_length: int) -> int:
    """Return the multiply-adds of embedding one image and one caption of full length.

    Half of FlopCounterMode's count: matrix products, convolutions and attention, whatever module
    calls them; element-wise work, normalisation and look-ups are not counted. A masked product
    counts in full.
    """
    images, tokens = _inputs(model, 1, image_size, context_length)
    counter = FlopCounterMode(display=False, custom_mapping=_uncounted_operators())
    with evaluating(model), _decomposed_attention(), counter:
        encode(model, images, image=True)
        encode(model, tokens, image=False)
    return int(counter.get_total_flops()) // 2


def _seconds(run: Callable[[], Any], threads: int, min_seconds: float) -> float:
    """Return the median seconds of one call, after warming up; waits for the GPU by itself."""
    from torch.utils.benchmark import Timer  # its import warns where a CUDA toolkit has no GPU

    for _ in range(2):
        run()
    timer = Timer("run()", globals={"run": run}, num_threads=threads)
    return float(timer.blocked_autorange(min_run_time=min_seconds).median)


def latency(
    model: nn.Module,
    image_size: int,
    context_length: int,
    *,
    batch_size: int = 32,
    threads: int | None = None,
    min_seconds: float = 0.5,
) -> dict[str, float]:
    """Measure on the model's device, with `threads` CPU threads (None: as many as torch uses now).

    Returns:
        `latency_ms_b1`: median milliseconds to embed one image and one caption.
        `images_per_s`, `texts_per_s`: median throughput of each tower at `batch_size`.
        `peak_memory_mb`: on a GPU, the most memory allocated while doing so, weights included.
    """
    threads = threads or torch.get_num_threads()
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    one = _inputs(model, 1, image_size, context_length)
    many = _inputs(model, batch_size, image_size, context_length)

    def pair() -> None:
        encode(model, one[0], image=True)
        encode(model, one[1], image=False)

    with evaluating(model):
        alone = _seconds(pair, threads, min_seconds)
        images = _seconds(lambda: encode(model, many[0], image=True), threads, min_seconds)
        texts = _seconds(lambda: encode(model, many[1], image=False), threads, min_seconds)
    measured = {
        "latency_ms_b1": alone * 1e3,
        "images_per_s": batch_size / images,
        "texts_per_s": batch_size / texts,
    }
    if device.type == "cuda":
        measured["peak_memory_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
    return measured


def conditions(model: nn.Module, *, batch_size: int, threads: int | None = None) -> dict[str, Any]:
    """Say under which conditions `latency` measured: device, precision, threads, batch."""
    device = next(model.parameters()).device
    return {
        "device": device_name(device),
        "dtype": str(floating_dtype(model)).removeprefix("torch."),
        "threads": threads or torch.get_num_threads(),
        "batch": batch_size,
        "torch": torch.__version__,
    }


def device_name(device: torch.device) -> str:
    """Return the name of the processor behind a torch device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
