"""Configuration: every fault at once, by its path; overrides; the resolved file runs itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import UserError
from pipeline.config import apply_overrides, read_yaml
from pipeline.experiment import InheritedArm, load_experiment
from tests.conftest import REPOSITORY


def set_in(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for key in parents:
            content = content.setdefault(key, {})
        content[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("train.stepz", 5, "train.stepz: unknown key; did you mean 'steps'?"),
        ("train.steps", "many", "train.steps: Input should be a valid integer"),
        ("train.steps", 0, "train.steps: Input should be greater than or equal to 1"),
        ("train.warmup", 60, "warmup (60) must be smaller than steps (60)"),
        ("train.accumulate", 3, "accumulate (3) must divide batch_size (16)"),
        ("arms.student.kind", "stduent", "arms.student: Input tag 'stduent'"),
        ("arms.student.train", {"lr": -1}, "arms.student.train.lr: Input should be greater than 0"),
        ("arms.inherited.budget", "params=0", "the share must be above 0 and at most 1, not 0"),
        ("arms.inherited.budget", "params=1.5", "above 0 and at most 1, not 1.5"),
        ("arms.inherited.budget", "0.4", "a budget reads params=0.4"),
        ("arms.inherited.budget", {"visual.*": "0.4"}, "a budget reads params=0.4"),
        ("arms.inherited.budget", {"visual.*": "latency=0.4"}, "latency belongs to a whole model"),
        ("arms.inherited.teacher", "master", "arms.inherited.teacher: no arm 'master'"),
        ("arms.student_clipkd.teacher", None, "the objective (task, crd, fd, icl) needs one"),
        ("arms.teacher.teacher", "student_clipkd", "teach each other in a circle"),
        ("arms.student.model", "RN102", "unknown model 'RN102'"),
        ("arms.student.model", "nowhere.json", "no such model configuration"),
        ("arms.student.objective", "clipkd", "no objective named 'clipkd'"),
        ("eval.sets", [], "eval.sets"),
        ("data.scenes", None, "give root (a folder of shards) or scenes"),
        ("name", "a/b", "name: String should match pattern"),
    ],
)
def test_a_wrong_value_is_refused_by_its_path(
    tiny: Callable[..., Path], path: str, value: Any, expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        load_experiment(tiny(set_in(path, value)))
    assert expected in str(caught.value)
    assert "tiny.yaml" in str(caught.value)


def test_groups_of_layers_may_have_their_own_budgets(tiny: Callable[..., Path]) -> None:
    budget = {"visual.*": "params=0.6", "*": "params=0.4"}
    arm = load_experiment(tiny(set_in("arms.inherited.budget", budget))).arms["inherited"]
    assert isinstance(arm, InheritedArm)
    assert arm.budget == budget


def test_all_faults_are_shown_at_once_and_a_shared_one_once(tiny: Callable[..., Path]) -> None:
    def spoil(content: dict[str, Any]) -> None:
        content["train"]["stepz"] = 1
        content["train"]["lr"] = "fast"
        content["sead"] = 3
        content["eval"]["sets"][0]["kind"] = "retrieve"

    with pytest.raises(UserError) as caught:
        load_experiment(tiny(spoil))
    text = str(caught.value)
    assert text.startswith(f"{tiny(spoil)}: 4 faults")
    for fault in (
        "train.stepz",
        "train.lr",
        "sead: unknown key; did you mean 'seed'?",
        "eval.sets.0",
    ):
        assert text.count(fault) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "not of the form a.b=value"),
        ("=3", "not of the form a.b=value"),
        ("train.steps=[1", "not valid YAML"),
        ("name.first=x", "'name' holds a value, not a section"),
    ],
)
def test_a_wrong_override_is_refused(
    tiny: Callable[..., Path], override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        load_experiment(tiny(), [override])


def test_an_override_changes_one_key_and_leaves_the_given_mapping_alone() -> None:
    given = {"a": {"b": 1, "c": 2}}
    assert apply_overrides(given, ["a.b=3.0", "d.e=[1, x]"]) == {
        "a": {"b": 3.0, "c": 2},
        "d": {"e": [1, "x"]},
    }
    assert given == {"a": {"b": 1, "c": 2}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "the key 'a' is given twice"),
        ("a: [1\n", "not valid YAML"),
        ("- 1\n", "the top level must be a mapping"),
        ("", "the top level must be a mapping"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_yaml(path)


def test_an_arm_overrides_the_shared_training_section(tiny: Callable[..., Path]) -> None:
    experiment = load_experiment(tiny(set_in("arms.student.train", {"steps": 7, "warmup": 1})))
    assert experiment.arms["student"].train.steps == 7
    assert experiment.arms["student"].train.batch_size == 16
    assert experiment.arms["teacher"].train.steps == 60


def test_the_resolved_configuration_means_the_same(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    experiment = load_experiment(tiny(), ["seed=3"])
    again = tmp_path / "elsewhere" / "config.yaml"
    again.parent.mkdir()
    again.write_text(experiment.dump())
    assert load_experiment(again) == experiment


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.name
)
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    load_experiment(path)


def test_a_student_that_reads_other_input_than_its_teacher_is_refused_before_anything_runs(
    tiny: Callable[..., Path],
) -> None:
    def shorter(content: dict[str, Any]) -> None:
        content["arms"]["student_clipkd"]["model"]["text_cfg"]["context_length"] = 16

    with pytest.raises(UserError, match="differ in context length: 16 and 24") as fault:
        load_experiment(tiny(shorter))
    assert "arms.student_clipkd" in str(fault.value)


def test_a_length_of_an_arm_replaces_the_shared_one_in_another_unit(
    tiny: Callable[..., Path],
) -> None:
    def epochs(content: dict[str, Any]) -> None:
        content["arms"]["student"]["train"] = {"epochs": 2}

    arms = load_experiment(tiny(epochs)).arms
    assert (arms["student"].train.steps, arms["student"].train.epochs) == (None, 2)
    assert arms["teacher"].train.steps == 60


def test_looks_during_training_need_a_set_to_look_at(tiny: Callable[..., Path]) -> None:
    def looks(content: dict[str, Any]) -> None:
        content["train"]["validate_every"] = 20

    with pytest.raises(UserError, match=r"give eval\.quick"):
        load_experiment(tiny(looks))
