"""A scheduler in one file: `sbatch`, `squeue`, `scontrol`, `scancel`, `sacct` on PATH, no daemon.

Jobs are kept in $FAKE_SLURM/jobs.json as {id: {...}} and never run; tests set their states.
"""

import json
import os
import re
import sys
from pathlib import Path

home = Path(os.environ["FAKE_SLURM"])
store = home / "jobs.json"
jobs = json.loads(store.read_text()) if store.exists() else {}
program, arguments = Path(sys.argv[0]).name, sys.argv[1:]
with (home / "calls").open("a") as log:
    log.write(" ".join([program, *arguments]) + "\n")


def expand(text: str) -> list[int]:
    parts = []
    for piece in text.split("%")[0].split(","):
        first, _, last = piece.partition("-")
        parts += range(int(first), int(last or first) + 1)
    return parts


if program == "sbatch":
    if "--test-only" in arguments:
        print("sbatch: Job 1 to start at some time", file=sys.stderr)
        sys.exit(0)
    text = Path(arguments[-1]).read_text()
    refused = home / "refuse"
    if refused.exists() and re.search(refused.read_text(), text):
        sys.exit("sbatch: error: Batch job submission failed: Invalid account or partition")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.MULTILINE))
    number = str(int(max(jobs, key=int, default="100")) + 1)
    array = next((a.split("=")[1] for a in arguments if a.startswith("--array=")), None)
    array = array or options.get("array")
    jobs[number] = {
        "state": "PENDING",
        "reason": "Dependency" if "dependency" in options else "Priority",
        "dependency": options.get("dependency", ""),
        "array": expand(array) if array else None,
        "slices": {},
    }
    print(number)
elif program == "squeue":
    for number, job in jobs.items():
        for part in job["array"] or [None]:
            shown = number if part is None else f"{number}_{part}"
            state = job["slices"].get(str(part), job["state"])
            if state != "GONE":
                print(f"{shown}|{shown}|{state}|{job['reason']}|1:00|n0")
elif program == "scontrol" and arguments[:1] == ["ping"]:
    print("Slurmctld(primary) at here is UP")
elif program == "scontrol" and arguments[:2] == ["show", "job"]:
    job = jobs[arguments[-1].split("_")[0]]
    print(
        f"JobId={arguments[-1]} JobState={job['state']} Dependency={job['dependency'] or '(null)'}"
    )
elif program == "scontrol" and arguments[:1] == ["update"]:
    number = arguments[1].split("=")[1]
    jobs[number]["dependency"] = arguments[2].split("=", 1)[1]
elif program == "scontrol" and arguments[:1] == ["requeue"]:
    sys.exit("scontrol: error: Requested operation is presently disabled")
elif program == "scancel":
    for number in arguments:
        base, _, part = number.partition("_")
        if part:
            jobs[base]["slices"][part] = "CANCELLED"
        else:
            jobs[base]["state"] = "CANCELLED"
elif program == "sacct":
    sys.exit("sacct: error: Slurm accounting storage is disabled")
store.write_text(json.dumps(jobs))
