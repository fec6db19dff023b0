"""Asking for an objective: presets, weights, options, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.objectives import PRESETS, REGISTRY, ObjectiveConfig


def read(value: Any) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate(value)


def weights(value: Any) -> dict[str, float]:
    return {name: term.weight for name, term in read(value).terms.items()}


def test_presets_overrides_and_numbers() -> None:
    assert weights("clip_kd") == {"task": 1, "crd": 1, "fd": 2000, "icl": 1}
    assert weights({"preset": "clip_kd", "fd": 500, "crd": 0}) == {"task": 1, "fd": 500, "icl": 1}
    assert weights({"kd": {"alpha": 0.7, "tau": 4}}) == {"kd": 1}
    assert read("distill").needs_teacher
    assert not read("task").needs_teacher
    assert read({"mfd": 1, "fd": 1}).views == ("masked_image",)


@pytest.mark.parametrize("name", list(PRESETS))
def test_written_config_reads_back(name: str) -> None:
    config = read(name)
    assert read(config.model_dump()) == config
    assert read(config.model_dump(mode="json")) == config
    assert set(config.model_dump()) == set(PRESETS[name])


def test_all_faults_come_at_once_with_their_keys() -> None:
    wrong = {
        "crdd": 1,
        "fd": "1e8",
        "kd": {"alpha": 2, "temperature": 3},
        "icl": True,
        "gd": -1,
        "mfd": {"patch": 0.5},
        "crd": float("nan"),
        "afd": None,
    }
    with pytest.raises(ValidationError) as caught:
        read(wrong)
    found = {".".join(map(str, error["loc"])): error["msg"] for error in caught.value.errors()}
    keys = ["crd.weight", "crdd", "fd", "gd.weight", "icl", "kd.alpha", "kd.temperature"]
    assert sorted(found) == [*keys, "mfd.patch"]
    assert "1.0e+8" in found["fd"]
    assert "{weight: 1}" in found["icl"]


@pytest.mark.parametrize("value", [{}, {"task": 0}])
def test_an_objective_without_a_loss_is_refused(value: Any) -> None:
    with pytest.raises(
        ValidationError, match="no loss has a weight above 0; give one of task, crd"
    ):
        read(value)


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(
        ValidationError, match=r"no objective named 'clipkd'; there are task, clip_kd"
    ):
        read("clipkd")


def test_reading_a_config_needs_no_torch() -> None:
    code = (
        "import sys; from pipeline.objectives import ObjectiveConfig;"
        "ObjectiveConfig.model_validate('clip_kd'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_registry_line_loads_and_says_what_its_class_says() -> None:
    for name, entry in REGISTRY.items():
        assert entry.load().needs_teacher == entry.needs_teacher, name
