"""torch.compile around the towers, in place, so that weights keep their names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def compiled(model: Any) -> Iterator[None]:
    """Compile image and text tower within the block."""
    text = model.text if isinstance(getattr(model, "text", None), nn.Module) else model.transformer
    towers = [model.visual, text]
    for tower in towers:
        tower.compile()
    try:
        yield
    finally:
        for tower in towers:
            tower._compiled_call_impl = None
