"""One of several processes that share a small JAX program: `python -m tests.support.small_process`.

The environment says what goes wrong in the sixth step, and where: FAULT=raise:1.
"""

from __future__ import annotations

import errno
import os
import sys
import time

from stages.core import cli
from stages.core.common.errors import StageError
from stages.core.processes import together
from stages.core.processes.group import current

FAULTS = {
    "raise": RuntimeError("a mistake of ours"),
    "diverge": StageError("Training diverged: the loss is nan."),
    "disk": OSError(errno.ENOSPC, "No space left on device", "adapter.safetensors"),
}


def main() -> None:
    """Take steps that all processes take together."""
    fault, _, victim = os.environ.get("FAULT", "").partition(":")
    with cli.ended_with_others(), cli.mistakes_in_lines(verbose=False), together.joined(60, lambda: {"Python": "3"}):
        import jax
        import numpy as np
        from jax.sharding import NamedSharding, PartitionSpec

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 2)
        mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
        values = np.arange(4 * len(jax.devices()), dtype="float32")
        array = jax.make_array_from_callback(
            values.shape, NamedSharding(mesh, PartitionSpec("x")), lambda index: values[index]
        )
        total = jax.jit(lambda x: x.sum())
        for step in range(1, 1 + int(os.environ.get("STEPS", "100"))):
            current().doing(f"step {step}", 1.0 if fault == "stuck" and step > 5 else 60)
            total(array).block_until_ready()
            if step == 5:
                print("five steps", file=sys.stderr, flush=True)
            if step == 6 and str(current().index) == victim:
                if fault == "stuck":
                    time.sleep(60)
                raise FAULTS[fault]
            time.sleep(0.1)


if __name__ == "__main__":
    main()
