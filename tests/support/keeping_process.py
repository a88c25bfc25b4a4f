"""One of several processes that keep and find checkpoints of an array, without a model.

Command: `python -m tests.support.keeping_process`
Each has equal rows of the array, whose values are the step. Environment: STEPS to save (JSON), DISK_FULL=process:step.
The last line that it prints is what it found, as JSON.
"""

from __future__ import annotations

import json
import os
import resource

import numpy as np

from stages.core.finetune import resuming
from stages.core.finetune.checkpoint import Store
from stages.core.finetune.pieces import Piece
from stages.core.processes import meeting
from stages.core.processes.group import current, set_current

ROWS = 12


def main() -> None:
    """Find the newest checkpoint and save some more."""
    count, index = int(os.environ.get("NUM_PROCESSES", "1")), int(os.environ.get("PROCESS_ID", "0"))
    if count > 1:
        star = meeting.meet(os.environ["COORDINATOR_ADDRESS"], index, count, {}, 60)
        set_current(star)
        star.start()
    store = Store("a-run", 2, {"processes": count})
    found = resuming.newest(store)
    told = {"writers": store.writers, "step": None}
    if found:
        told |= {"step": found.step, "written by": found.layout["processes"], "state": found.state}
        told["values"] = found.files and np.unique(found.files.read("a")).tolist()
    own = slice(index * ROWS // count, (index + 1) * ROWS // count) if store.writers == count else slice(0, ROWS)
    for step in json.loads(os.environ.get("STEPS", "[]")):
        full = os.environ.get("DISK_FULL") == f"{index}:{step}"
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 if full else hard, hard))
        values = np.full((ROWS, 5), step, "f4")
        store.save(step, [Piece("a", (own.start, 0), values.shape, values[own])], {"rows": step})
        store.finish()
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    told["saved"] = store.newest_saved()
    print(json.dumps(told), flush=True)
    if count > 1:
        current().finish()


if __name__ == "__main__":
    main()
