"""Fixtures of the data tests: local servers, small shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.shards import Manifest, Sample, write_shards
from tests.data_prep.misbehaving_server import MisbehavingServer, picture


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests to 127.0.0.1 must not take the way of the machine's proxy."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server() -> Iterator[MisbehavingServer]:
    """A server that misbehaves, and one further inside that must never be reached."""
    inner, outer = MisbehavingServer(), MisbehavingServer()
    outer.inner_port = inner.port
    outer.inner = inner  # type: ignore[attr-defined]
    yield outer
    for one in (outer, inner):
        one.stop()


def samples(count: int, start: int = 0) -> list[Sample]:
    """Samples with real images, two captions and a label."""
    return [
        Sample.of(
            f"s{i:05d}",
            picture(i, (24, 20)),
            captions=[f"picture {i}", f"noise number {i}"],
            label=i % 7,
        )
        for i in range(start, start + count)
    ]


@pytest.fixture
def small_set(tmp_path: Path) -> tuple[Path, Manifest]:
    """Three shards of 8, 8 and 4 samples in a folder of their own."""
    folder = tmp_path / "set"
    manifest = write_shards(samples(20), folder, "set", samples_per_shard=8, source="noise")
    return folder, manifest
