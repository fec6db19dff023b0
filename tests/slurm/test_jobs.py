"""Profiles and resources: what is refused, and how it is said."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from slurm.errors import SlurmError
from slurm.jobs import PROFILES, ClusterProfile, Resources, load_cluster


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_profile_is_valid(path: Path) -> None:
    profile = load_cluster(path.stem)
    assert profile.name == path.stem
    for kind in ("data", "train", "evaluate", "compare"):
        assert profile.for_kind(kind).nodes >= 1


def test_all_faults_of_a_profile_at_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "partion: gpu\nmax_tries: 0\nresources: {train: {memory: lots, time: soon, nodes: 0}}\n"
    )
    with pytest.raises(SlurmError) as caught:
        load_cluster(str(file))
    text = str(caught.value)
    assert str(file) in text
    for part in (
        "5 faults",
        "partion: unknown key",
        "max_tries: ",
        "resources.train.memory: 'lots' is no memory size",
        "resources.train.time: 'soon' is no duration",
        "resources.train.nodes: ",
    ):
        assert part in text


def test_unknown_profile_names_the_known_ones() -> None:
    with pytest.raises(SlurmError, match=r"no cluster profile 'nowhere'.*\n.*h100x8"):
        load_cluster("nowhere")


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "just text"])
def test_no_mapping(text: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(SlurmError, match="not a YAML mapping"):
        load_cluster(str(file))


@pytest.mark.parametrize("time", ["30", "90:00", "04:00:00", "100:00:00", "2-0", "1-12:30:00"])
def test_durations_that_slurm_knows(time: str) -> None:
    assert Resources(time=time).time == time


@pytest.mark.parametrize("time", ["0", "-1", "1:2:3", "1h", "", "24:60:00", "1 2", "INFINITE"])
def test_durations_that_it_does_not(time: str) -> None:
    with pytest.raises(ValidationError):
        Resources(time=time)


def test_kinds_fall_back_to_default() -> None:
    profile = ClusterProfile(resources={"default": Resources(nodes=3), "train": Resources(nodes=4)})
    assert profile.for_kind("train").nodes == 4
    assert profile.for_kind("evaluate").nodes == 3
    assert ClusterProfile().for_kind("train") == Resources()
