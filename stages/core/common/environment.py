"""Removes environment switches of JAX, XLA and Keras before these are imported: results depend on params.yaml only.

Purpose: DVC sees no environment variable and no `~/.keras/keras.json`, so none of them may change a number.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator, MutableMapping, Sequence
from types import ModuleType

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


@contextlib.contextmanager
def hidden(packages: Sequence[str]) -> Iterator[None]:
    """Within the block those of some packages that were not imported yet seem not to be installed."""
    names = [name for name in packages if name not in sys.modules]
    # None makes Python raise ImportError.
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


class KerasAlone(importlib.abc.MetaPathFinder):
    """Lets Keras be imported without pandas, which it takes for optional: a fifth of the time that imports take."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find Keras, once."""
        if name != "keras":
            return None
        sys.meta_path.remove(self)
        found = importlib.util.find_spec(name)
        if found is not None and found.loader is not None:
            run = found.loader.exec_module

            def without_pandas(module: ModuleType) -> None:
                with hidden(["pandas"]):
                    run(module)

            found.loader.exec_module = without_pandas  # type: ignore[method-assign]
        return found


sys.meta_path.insert(0, KerasAlone())
# One line about this process, or None.
IGNORED = isolate()
