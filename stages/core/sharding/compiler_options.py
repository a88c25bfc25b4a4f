"""What XLA's compiler is told for the training step, by chip: one table for the plan and for `finetune`.

Purpose: the plan is of the program that runs. Each option is here because the compiler's own estimate of the step falls
by it; docs/training.md says by how much. A name that the installed compiler doesn't know would be an error of its own.
"""

from __future__ import annotations

from typing import Any

# By what JAX calls a device.
OPTIONS: dict[str, dict[str, str]] = {
    # More of a core's 128 MiB for one fusion's operands: larger tiles of matrix products.
    "TPU v5 lite": {"xla_tpu_scoped_vmem_limit_kib": "65536"},
}


def options_for(device: Any) -> dict[str, str] | None:
    """Return the options for a JAX device, real or described, as `jax.jit` takes them; None for none."""
    return OPTIONS.get(device.device_kind)
