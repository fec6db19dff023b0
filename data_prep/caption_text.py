"""Captions and keys as text: repaired, and fit to be names in a tar."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufffd]")


def repair_text(text: str) -> str:
    """Repair a caption: wrong encodings undone, control characters and extra blanks removed."""
    if not text.isascii():
        import ftfy

        text = unicodedata.normalize("NFC", ftfy.fix_text(text))
    elif "&" in text:
        text = html.unescape(text)
    if not text.isprintable():
        text = _CONTROL.sub("", text)
    return " ".join(text.split())


def unique_keys() -> Callable[[str], str]:
    """Return a function from paths to keys: the stem, made unique where stems collide."""
    used: dict[str, int] = {}

    def make(path: str) -> str:
        stem = re.sub(r"[^\w+-]", "_", Path(path).stem) or "sample"
        while stem in used:
            used[stem] += 1
            stem = f"{stem}-{used[stem]}"
        used[stem] = 0
        return stem

    return make
