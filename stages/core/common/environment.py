"""Removes environment switches of JAX, XLA and Keras before these are imported: results depend on params.yaml only.

Purpose: DVC sees no environment variable and no `~/.keras/keras.json`, so none of them may change a number.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# Families of variables that change what is computed (a dtype, a random generator, a compiler's option, the number of
# steps), and those among them that only set where the devices are, how memory is allocated, or what is logged.
SWITCHES = ("JAX_", "KERAS_", "XLA_", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
HARMLESS = (
    "JAX_COMPILATION_CACHE_",
    "JAX_CUDA_VISIBLE_DEVICES",
    "JAX_DEBUG_LOG_MODULES",
    "JAX_DUMP_IR",
    "JAX_LOG",
    "JAX_PERSISTENT_CACHE_",
    "JAX_PLATFORMS",
    "JAX_TRACEBACK_FILTERING",
    "KERAS_BACKEND",
    "KERAS_HOME",
    "XLA_PYTHON_CLIENT_",
)
FLAGS, DUMPS = "XLA_FLAGS", "--xla_dump_"


def isolate(environment: MutableMapping[str, str] = os.environ) -> str | None:
    """Remove the switches that would change results, and set those that choose Keras' backend and configuration.

    To be called before JAX and Keras are imported. Of `XLA_FLAGS` only the options that dump programs are kept.

    Args:
        environment: changed in place.

    Returns:
        One line that names what is ignored, or None if there was nothing.

    Example:
        >>> isolate({"JAX_ENABLE_X64": "1", "JAX_LOGGING_LEVEL": "INFO"})
        'Ignored, since it would change results that DVC ties to params.yaml: JAX_ENABLE_X64.'
    """
    ignored = []
    for name in sorted(environment):
        if not name.startswith(SWITCHES) or name.startswith(HARMLESS):
            continue
        kept = [flag for flag in environment[name].split() if name == FLAGS and flag.startswith(DUMPS)]
        if name == FLAGS and len(kept) == len(environment[name].split()):
            continue
        ignored.append(name)
        if kept:
            environment[name] = " ".join(kept)
        else:
            del environment[name]
    environment["KERAS_BACKEND"] = "jax"
    # Keras reads keras.json there and writes one where there is none: here it can do neither.
    environment["KERAS_HOME"] = os.devnull
    if not ignored:
        return None
    return f"Ignored, since it would change results that DVC ties to params.yaml: {', '.join(ignored)}."


# One line about this process, or None.
IGNORED = isolate()
