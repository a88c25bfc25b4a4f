"""Imports libraries once, and forks a process for each client that asks for one: see the package."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pkgutil
import runpy
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path

# As `python -P` has it: without this file's folder.
SEARCHED = list(sys.path)

IMPORTED = {
    "stages": (
        *(
            "click",
            "pydantic",
            "ruamel.yaml",
            "requests",
            "filelock",
            "packaging.requirements",
            "jinja2",
            "rich.progress",
        ),
        *("numpy", "pyarrow.parquet", "h5py", "safetensors.numpy", "sentencepiece", "gguf", "ml_dtypes"),
        *("jax", "jax.numpy", "jax.experimental.topologies", "jax._src.compilation_cache", "keras", "keras_hub"),
    ),
    "records": ("pydantic", "ruamel.yaml"),
    "dvc": ("dvc.cli.parser", "dvc.repo", "dvc.repo.reproduce", "dvc.repo.experiments", "dvc_data.index", "pygit2"),
}
"""By kind. None of them reads the environment that a test may change, or only what the client looks at."""

# What `stages.core.load.backbone` hides from keras-hub, which takes it for optional.
OPTIONAL = ("tensorflow", "tensorflow_text", "kagglehub", "pandas")
HEADER = 4
# Standard input, which ends with the process that started this one.
STOP = 0


def import_all(kind: str) -> None:
    """Import what a kind lists, as the stages do."""
    os.environ.update(KERAS_BACKEND="jax", KERAS_HOME=os.devnull)
    hidden = OPTIONAL if kind == "stages" else ()
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    for name in IMPORTED[kind]:
        importlib.import_module(name)
    for name in hidden:
        del sys.modules[name]
    if kind == "dvc":
        # Imports the module of each command.
        sys.modules["dvc.cli.parser"].get_main_parser()


def install(folder: Path) -> Path:
    """Write the client as an executable beside the socket, named `python` so that a shell finds it on its path."""
    executable = folder / "python"
    executable.write_text(f"#!{sys.executable} -IS\n" + Path(__file__).with_name("client.py").read_text())
    executable.chmod(0o755)
    return executable


class Server:
    """Forks, passes signals on, tells how processes ended, and kills those whose client is gone."""

    def __init__(self, listening: socket.socket) -> None:
        """Serve on a socket until standard input ends."""
        self.listening = listening
        self.clients: dict[int, socket.socket] = {}
        self.selector = selectors.DefaultSelector()
        self.woken, waker = os.pipe()
        for each in (self.woken, waker):
            os.set_blocking(each, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for each in (STOP, self.woken, listening):
            self.selector.register(each, selectors.EVENT_READ)

    def serve(self) -> tuple[list[str], list[int]] | None:
        """Return None at the end, and in a forked process what its client asked for and its standard streams."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj == STOP:
                    for pid in self.clients:
                        os.kill(pid, signal.SIGKILL)
                        os.waitpid(pid, 0)
                    return None
                if key.fileobj == self.woken:
                    os.read(self.woken, 4096)
                    self._collect()
                elif key.fileobj is self.listening:
                    asked = self._fork()
                    if asked is not None:
                        return asked
                elif key.data in self.clients:
                    self._pass_on(key.data)

    def _fork(self) -> tuple[list[str], list[int]] | None:
        client, _ = self.listening.accept()
        head, streams, _, _ = socket.recv_fds(client, HEADER, 3)
        request = b""
        while head and len(request) < int.from_bytes(head, "big"):
            part = client.recv(65536)
            if not part:
                head = b""
            request += part
        if not head:
            # It was killed before it had asked.
            client.close()
            for each in streams:
                os.close(each)
            return None
        pid = os.fork()
        if pid == 0:
            for each in (client, self.listening, self.selector, *self.clients.values()):
                each.close()
            return request.decode("utf-8", "surrogateescape").split("\0"), list(streams)
        for each in streams:
            os.close(each)
        self.clients[pid] = client
        self.selector.register(client, selectors.EVENT_READ, pid)
        return None

    def _pass_on(self, pid: int) -> None:
        """Send a process the signals that its client got; SIGKILL is only seen by the client's end."""
        try:
            received = self.clients[pid].recv(64)
        except ConnectionError:
            received = b""
        for number in received or [signal.SIGKILL]:
            os.kill(pid, number)
        if not received:
            self.selector.unregister(self.clients[pid])

    def _collect(self) -> None:
        """Tell the clients of the processes that ended."""
        while self.clients:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            client = self.clients.pop(pid)
            with contextlib.suppress(KeyError):
                self.selector.unregister(client)
            with contextlib.suppress(ConnectionError):
                client.sendall(status.to_bytes(HEADER, "big"))
            client.close()


def become(parts: list[str], streams: list[int]) -> list[str]:
    """Make this forked process what its client is, and return the arguments."""
    cwd, mask, count, *rest = parts
    arguments, environment = rest[: int(count)], rest[int(count) :]
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    os.chdir(cwd)
    os.umask(int(mask))
    os.environ.clear()
    os.environ.update(each.split("=", 1) for each in environment)
    time.tzset()
    if os.environ.get("PYTHONUNBUFFERED"):
        for each in (sys.stdout, sys.stderr):
            each.reconfigure(write_through=True)  # type: ignore[union-attr]
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    path = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    sys.path[:] = [cwd if arguments[0] == "-m" else "", *path, *SEARCHED]
    importlib.invalidate_caches()
    # JAX looks for plugins while it is imported, which was before there was this path.
    if "jax" in sys.modules:
        for each in pkgutil.iter_modules([f"{entry}/jax_plugins" for entry in path], "jax_plugins."):
            importlib.import_module(each.name).initialize()
    return arguments


def run(arguments: list[str]) -> None:
    """Run the module or the program, as the main one."""
    option, what, *rest = arguments
    # Python has `-m` there until it has found the module.
    sys.argv[:] = [option, *rest]
    if option == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), main.__dict__)


def main() -> None:
    """Serve; a forked process leaves by here too, so that it ends as Python does."""
    import_all(sys.argv[1])
    # Of the threads that NumPy has started; they are prepared for it.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    gc.collect()
    gc.freeze()
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{folder}/socket")
    listening.listen(64)
    print(install(folder), flush=True)
    asked = Server(listening).serve()
    if asked is None:
        shutil.rmtree(folder)
    else:
        run(become(*asked))


if __name__ == "__main__":
    main()
