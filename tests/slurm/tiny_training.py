"""A training in miniature: logs steps, saves on USR1 or TERM, leaves with 75, goes on where it was.

Its "weights" are a hash of everything it did, so equal weights mean an exact resume.
Usage: tiny_training.py FOLDER STEPS SECONDS_PER_STEP [crash-at STEP]
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

folder, steps, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
crash_at = int(sys.argv[5]) if len(sys.argv) > 5 else -1
rank = int(os.environ["RANK"])
folder.mkdir(parents=True, exist_ok=True)
resume, log = folder / f"resume-{rank}.json", folder / "train.jsonl"
state = json.loads(resume.read_text()) if resume.exists() else {"step": 0, "weights": f"{rank}"}
asked: list[int] = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda got, _: asked.append(got))


def save() -> None:
    temporary = folder / f".resume-{rank}.tmp"
    temporary.write_text(json.dumps(state))
    temporary.replace(resume)


began = time.time()
while state["step"] < steps:
    if state["step"] == crash_at:
        raise RuntimeError(f"the loss is not finite at step {crash_at}")
    time.sleep(pause)
    state["step"] += 1
    state["weights"] = hashlib.sha256(f"{state['weights']} {state['step']}".encode()).hexdigest()
    if rank == 0:
        with log.open("a") as handle:
            record = {"step": state["step"], "seconds": round(time.time() - began, 2)}
            handle.write(json.dumps(record) + "\n")
    if asked:
        save()
        print(f"rank {rank}: signal {asked}, saved at step {state['step']}", flush=True)
        sys.exit(75)
    if state["step"] % 5 == 0:
        save()
(folder / f"weights-{rank}.txt").write_text(state["weights"])
print(f"rank {rank}: finished", flush=True)
