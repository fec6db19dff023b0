"""What a cluster really offers, against what a profile asks: for `inherclip doctor`.

Asks the controller first (partitions, limits, requeue), then a job of one minute on a compute node
whether it sees the code, the run folder and the data.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm import client
from slurm.errors import SlurmError
from slurm.jobs import ClusterProfile, Resources
from slurm.ledger import Folder
from slurm.render import directive, quote

_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")
# Runs on the compute node with its Python; prints one JSON line.
_CODE = (
    "import json, os, socket, sys\n"
    "paths = {p: [os.path.exists(p), os.access(p, os.W_OK)] for p in sys.argv[2:]}\n"
    "gpus = len([n for n in os.listdir('/dev') if n[:6] == 'nvidia' and n[6:].isdigit()])\n"
    "record = dict(node=socket.gethostname(), python=sys.version.split()[0], gpus=gpus,\n"
    "              cpus=len(os.sched_getaffinity(0)), paths=paths)\n"
    "open(sys.argv[1], 'w').write(json.dumps(record))\n"
)


@dataclass(frozen=True)
class Finding:
    """One line for the doctor.

    Attributes:
        name: What was looked at.
        state: `OK`, `warning` or `missing`.
        text: What was found.
        remedy: What to do about it; empty where all is well.
    """

    name: str
    state: str
    text: str
    remedy: str = ""


def seconds_of(text: str) -> float:
    """Read a SLURM duration; infinity for `infinite` and `UNLIMITED`.

    Raises:
        ValueError: not a duration.
    """
    if text.lower() in ("infinite", "unlimited", "n/a"):
        return float("inf")
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:  # D-HH[:MM[:SS]]
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 1:
        hours, minutes, seconds = 0, parts[0], 0
    else:
        hours, minutes, seconds = ([0, *parts] if len(parts) == 2 else parts)[:3]
    return float(int(days or 0) * 86_400 + hours * 3_600 + minutes * 60 + seconds)


@dataclass(frozen=True)
class Partition:
    """What `sinfo` says of a partition's largest nodes; memory in MiB."""

    name: str
    default: bool
    limit: str
    nodes: int
    cpus: int
    memory: int
    gpus: int


def parse_partitions(text: str) -> list[Partition]:
    """Parse the lines of `sinfo -h -o '%P|%l|%D|%c|%m|%G'`; one partition may have several."""
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        shown, limit, nodes, cpus, memory, gres = (part.strip() for part in line.split("|"))
        name = shown.rstrip("*")
        gpus = sum(int(n) for n in re.findall(r"gpu(?::[\w.-]+)?:(\d+)", gres))
        digits = [int(re.sub(r"\D", "", value) or 0) for value in (nodes, cpus, memory)]
        old = found.get(name)
        found[name] = Partition(
            name,
            shown.endswith("*"),
            limit,
            digits[0] + (old.nodes if old else 0),
            max(digits[1], old.cpus if old else 0),
            max(digits[2], old.memory if old else 0),
            max(gpus, old.gpus if old else 0),
        )
    return list(found.values())


_UNITS = {"K": 1 / 1024, "M": 1, "": 1, "G": 1024, "T": 1024**2}


def check_resources(
    kind: str, wanted: Resources, cluster: ClusterProfile, partitions: Sequence[Partition]
) -> list[Finding]:
    """Compare the resources of a kind of stage with the partition that they go to."""
    name = f"resources.{kind}"
    chosen = wanted.partition or cluster.partition
    fitting = [p for p in partitions if (p.name == chosen if chosen else p.default)]
    if not fitting:
        known = ", ".join(p.name for p in partitions)
        what = f"no partition {chosen!r}" if chosen else "no default partition"
        return [Finding(name, "missing", what, f"set `partition` to one of {known}")]
    part = fitting[0]
    faults = []
    if wanted.nodes > part.nodes:
        faults.append(f"{wanted.nodes} nodes of {part.nodes}")
    cpus = wanted.tasks_per_node * (wanted.cpus_per_task or 1)
    if cpus > part.cpus:
        faults.append(f"{cpus} cores per node of {part.cpus}")
    if wanted.gpus_per_node > part.gpus:
        faults.append(f"{wanted.gpus_per_node} GPUs per node of {part.gpus}")
    size = re.fullmatch(r"(\d+)([KMGT]?)", wanted.memory or "0")
    if size and int(size[1]) * _UNITS[size[2]] > part.memory:
        faults.append(f"{wanted.memory} memory per node of {part.memory} MiB")
    if faults:
        text = f"partition {part.name} cannot give " + ", ".join(faults)
        return [Finding(name, "missing", text, f"lower it in the profile {cluster.name}")]
    if seconds_of(wanted.time) > seconds_of(part.limit):
        text = f"time {wanted.time} is above the limit {part.limit} of partition {part.name}"
        return [Finding(name, "missing", text, "lower `time`; trainings are continued anyway")]
    return [Finding(name, "OK", f"fits partition {part.name} (limit {part.limit})")]


def check_requeue(cluster: ClusterProfile, config: Mapping[str, str]) -> Finding:
    """Compare the profile's `requeue` with the site's setting."""
    allowed = config.get("JobRequeue", "1") == "1"
    if cluster.requeue and not allowed:
        text = "the site starts jobs without requeue unless they ask for it"
        return Finding("requeue", "warning", text, "set `requeue: false` if jobs do not come back")
    how = "requeue" if cluster.requeue else "successors"
    return Finding("requeue", "OK", f"jobs are continued by {how}")


def controller(cluster: ClusterProfile) -> list[Finding]:
    """Ask the controller about partitions, limits and requeue; submits nothing.

    Raises:
        SlurmError: no SLURM here.
    """
    answer = client.call(["sinfo", "-h", "-o", "%P|%l|%D|%c|%m|%G"])
    if answer.returncode != 0:
        error = client.refusal(answer, "sinfo")
        return [Finding("controller", "missing", error.what, error.todo)]
    partitions = parse_partitions(answer.stdout)
    shown = client.call(["scontrol", "show", "config"]).stdout
    config = dict(re.findall(r"^(\w+)\s*= (.*?)\s*$", shown, re.MULTILINE))
    names = ", ".join(f"{p.name} ({p.nodes} nodes, limit {p.limit})" for p in partitions)
    findings = [Finding("partitions", "OK" if partitions else "missing", names or "none")]
    findings.append(check_requeue(cluster, config))
    kinds = cluster.resources or {"default": Resources()}
    for kind, wanted in kinds.items():
        findings += check_resources(kind, wanted, cluster, partitions)
    store = config.get("AccountingStorageType", "")
    has = bool(store) and not store.endswith("none")
    text = "on" if has else "off: reasons come from the queue and the run folder"
    findings.append(Finding("accounting", "OK", text))
    return findings


def _script(cluster: ClusterProfile, out: Path, paths: Iterable[Path], python: str) -> str:
    options = {
        "job-name": "inherclip-probe",
        "time": "1",
        "ntasks": 1,
        "output": str(out.with_suffix(".log")),
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
    }
    head = [f"#SBATCH {directive(k, v)}" for k, v in options.items() if v is not None]
    words = [cluster.python or python, "-c", _CODE, str(out), *map(str, paths)]
    return "\n".join(["#!/bin/bash", *head, "", " ".join(quote(word) for word in words), ""])


def probe(
    cluster: ClusterProfile,
    folder: str | Path,
    paths: Sequence[Path] = (),
    *,
    wait_seconds: float = 180,
    python: str = sys.executable,
) -> list[Finding]:
    """Check a profile against the cluster, with a job of at most a minute.

    Args:
        cluster: The profile.
        folder: Run folder; must be visible and writable on the nodes.
        paths: What must be visible too: the shards, the weights.
        wait_seconds: How long to wait for the job; it is cancelled then.
        python: Interpreter of the job where the profile names none.

    Returns:
        What was found, worst news included; the caller prints it.

    Raises:
        SlurmError: no SLURM here.
    """
    findings = controller(cluster)
    if findings[0].state != "OK":
        return findings
    place = Folder(folder)
    code = Path(__file__).resolve().parent.parent
    seen = [code, place.run, *(Path(path).absolute() for path in paths)]
    out = place.root / "probe.json"
    out.unlink(missing_ok=True)
    script = out.with_suffix(".sbatch")
    place.write(script, _script(cluster, out, seen, python))
    try:
        job = client.sbatch(str(script))
    except SlurmError as error:
        return [*findings, Finding("probe job", "missing", error.what, error.todo)]
    deadline = time.monotonic() + wait_seconds
    while time.monotonic() < deadline:
        info = client.queue().get(job)
        if out.is_file() or info is None or info.state in _ENDED:
            break
        time.sleep(1)
    else:
        reason = info.reason if info else ""
        client.cancel([job])
        text = f"waited {wait_seconds:.0f} s in vain ({reason or 'still in the queue'})"
        return [
            *findings,
            Finding("probe job", "warning", text, "the partition is busy; try later"),
        ]
    for _ in range(20):  # a shared file system may show the file a little later
        if out.is_file():
            return [*findings, *_judge(json.loads(out.read_text()), seen)]
        time.sleep(0.5)
    log = out.with_suffix(".log")
    text = log.read_text().strip()[-200:] if log.is_file() else f"no log at {log}"
    remedy = f"is {place.run} on a file system that the nodes see? is {python} there?"
    return [*findings, Finding("probe job", "missing", f"job {job} left nothing: {text}", remedy)]


def _judge(record: dict[str, object], seen: Sequence[Path]) -> list[Finding]:
    node, paths = record["node"], record["paths"]
    assert isinstance(paths, dict)
    has = f"Python {record['python']}, {record['cpus']} cores, {record['gpus']} GPUs"
    findings = [Finding("probe job", "OK", f"ran on {node}: {has}")]
    for number, path in enumerate(seen):
        there, writable = paths[str(path)]
        state = "OK" if there else "missing"
        what = "visible" if there else f"not visible from node {node}"
        remedy = "" if there else "put it on a file system that the compute nodes share"
        if there and number == 1 and not writable:
            state, what, remedy = (
                "missing",
                f"not writable from node {node}",
                "choose another --out",
            )
        findings.append(Finding(str(path), state, what, remedy))
    return findings
