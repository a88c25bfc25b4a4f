"""The pipeline: one click script per stage, run as `python -m stages.<name>`; the work is in `stages.core`."""

# Before any other import, in syntax that every Python parses: check that this one can run the stages.
import signal
import sys

# Ctrl-C while a command (`python -m stages.<name>`, not a test) still imports ends it without a traceback.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
if sys.platform == "win32":
    sys.exit("Error: the stages run on Linux and macOS. Received: Windows. Install WSL 2 and run them in its Linux.")
if not (3, 11) <= sys.version_info < (3, 14):
    sys.exit(
        "Error: the stages need Python 3.11, 3.12 or 3.13. Received: "
        + ".".join(map(str, sys.version_info[:3]))
        + " ("
        + sys.executable
        + "). Run `make venv PYTHON=python3.11`, then `. .venv/bin/activate`."
    )
try:
    # Packages that every command imports at once; stages.core.cli reports the others.
    import click  # noqa: F401
    import pydantic  # noqa: F401
    import ruamel.yaml  # noqa: F401
except ImportError as error:
    sys.exit(
        "Error: the project's packages cannot be imported by "
        + sys.executable
        + ": "
        + str(error).splitlines()[0]
        + ". Run `make venv` once, then `. .venv/bin/activate`."
    )
