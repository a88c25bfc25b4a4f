"""`python -m tests.support.steps_ahead`: finetune, with steps dispatched ahead on the CPU as they are on a chip."""

from __future__ import annotations

import runpy

from stages.core.finetune import late_logs

if __name__ == "__main__":
    late_logs.AHEAD["cpu"] = late_logs.AHEAD_ELSEWHERE
    runpy.run_module("stages.finetune", run_name="__main__", alter_sys=True)
