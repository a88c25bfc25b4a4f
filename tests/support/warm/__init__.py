"""A `python` that starts at once: it forks a server that has imported what the stages, or DVC, import.

Purpose: most of the time of a stage on a tiny model is importing JAX and Keras. What is run here still is a process of
its own with its own folder, environment, signals and exit code; the stages' own code is not imported by the server, so
that a copy of the repository runs its own. What runs here shares a seed for hashes, so tests that compare the bytes of
two runs start one of them by `sys.executable`, as do those of what is imported and of what JAX reads when it is.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

SERVER = Path(__file__).with_name("server.py")
# As it is before a test changes it; what a process that is forked has is what its caller gives it.
_ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


@functools.cache
def python(kind: str = "stages") -> str:
    """Return the path of an executable that takes the arguments `-m MODULE ...` or `-c PROGRAM ...` as Python does.

    Args:
        kind: what is imported already, a key of `server.IMPORTED`. The server ends with this process.

    Example:
        >>> subprocess.run([python(), "-m", "stages.load"], cwd=folder)  # doctest: +SKIP
    """
    # Its standard input is held open here and ends when this process does, however that ends.
    server = subprocess.Popen(
        [sys.executable, "-P", str(SERVER), kind],
        env=_ENVIRONMENT,
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert server.stdin is not None and server.stdout is not None
    _servers.append(server)
    executable = server.stdout.readline().strip()
    assert executable, f"the server of {kind} did not start"
    return executable


# Kept, so that their pipes stay open.
_servers: list[subprocess.Popen[str]] = []
