"""A plugin of JAX's for tests: programs for the CPU compile in a fifth of the time.

Purpose: most of the time of tests on tiny models is LLVM's. XLA's own passes and its partitioner stay as they are; what
is left out is optimizing the code of a kernel. JAX loads every module below `jax_plugins` on the path, in the processes
that tests start too; tests/pipeline/test_default_run.py compiles as a user's run does.
"""

from __future__ import annotations

from typing import Any

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_prefer_vector_width": 128,
    "xla_cpu_parallel_codegen_split_count": 1,
}


def initialize() -> None:
    """Have JAX compile in this way for the CPU from now on."""
    from jax._src import compiler

    usual = compiler.get_compile_options

    def quick(*arguments: Any, **options: Any) -> Any:
        backend = options.get("backend")
        if backend is not None and backend.platform == "cpu":
            options["env_options_overrides"] = QUICK | (options.get("env_options_overrides") or {})
        return usual(*arguments, **options)

    compiler.get_compile_options = quick
