"""The doctor's questions to a cluster: limits, partitions, and a job that looks around."""

import shutil
from pathlib import Path

import pytest

from slurm.jobs import ClusterProfile, Resources
from slurm.probe import (
    Partition,
    check_requeue,
    check_resources,
    controller,
    parse_partitions,
    probe,
    seconds_of,
)
from tests.slurm.conftest import Cluster

GPU = Partition("gpu", True, "1-00:00:00", 4, 96, 1_000_000, 8)
SINFO = """gpu*|1-00:00:00|3|96|1000000|gpu:h100:8(S:0-1)
gpu*|1-00:00:00|1|64+|500000+|gpu:a100:4,nvme:1
cpu|infinite|10|128|256000|(null)
"""


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("90:30", 5430),
        ("04:00:00", 14_400),
        ("1-12", 129_600),
        ("2-00:30:00", 174_600),
        ("infinite", float("inf")),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


def test_partitions_are_merged_over_kinds_of_nodes() -> None:
    assert parse_partitions(SINFO) == [
        GPU,
        Partition("cpu", False, "infinite", 10, 128, 256_000, 0),
    ]


@pytest.mark.parametrize(
    ("wanted", "state", "text"),
    [
        (Resources(gpus_per_node=8, tasks_per_node=8, cpus_per_task=12), "OK", "fits"),
        (Resources(gpus_per_node=9), "missing", "9 GPUs per node of 8"),
        (Resources(nodes=5), "missing", "5 nodes of 4"),
        (Resources(tasks_per_node=8, cpus_per_task=16), "missing", "128 cores per node of 96"),
        (Resources(memory="2T"), "missing", "2T memory"),
        (Resources(memory="0"), "OK", "fits"),
        (Resources(time="2-00:00:00"), "missing", "above the limit 1-00:00:00"),
        (Resources(partition="gone"), "missing", "no partition 'gone'"),
    ],
)
def test_what_does_not_fit_is_named(wanted: Resources, state: str, text: str) -> None:
    (finding,) = check_resources("train", wanted, ClusterProfile(), [GPU])
    assert finding.state == state
    assert text in finding.text
    assert bool(finding.remedy) == (state != "OK")


def test_requeue_of_the_site() -> None:
    assert check_requeue(ClusterProfile(), {"JobRequeue": "1"}).state == "OK"
    assert check_requeue(ClusterProfile(), {"JobRequeue": "0"}).state == "warning"
    assert check_requeue(ClusterProfile(requeue=False), {"JobRequeue": "0"}).state == "OK"


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.xdist_group("slurm")
def test_probe_on_a_real_cluster(cluster: Cluster, run: Path, tmp_path: Path) -> None:
    found = {f.name: f for f in probe(cluster.profile, run, [tmp_path, tmp_path / "gone"])}
    assert found["partitions"].text == "main (2 nodes, limit infinite)"
    assert found["resources.default"].state == "OK"
    assert found["probe job"].state == "OK"
    assert found[str(run)].state == "OK"
    assert found[str(tmp_path)].state == "OK"
    assert found[str(tmp_path / "gone")].state == "missing"
    too_much = cluster.profile.model_copy(update={"resources": {"train": Resources(nodes=9)}})
    assert any(f.state == "missing" for f in controller(too_much))
    refused = probe(cluster.profile.model_copy(update={"partition": "nowhere"}), run)
    assert refused[-1].name == "probe job"
    assert "SLURM refuses" in refused[-1].text
    shutil.rmtree(run / "slurm")
